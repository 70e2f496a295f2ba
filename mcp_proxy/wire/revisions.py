"""The MCP revisions and the two eras they belong to.

Legacy revisions open a session with `initialize`; modern ones carry their version in the `_meta` of
every request and know no sessions (MCP 2026-07-28, versioning, "Terminology").
"""

from __future__ import annotations

import re

import msgspec
from msgspec import Raw, UnsetType

#: Oldest first.
LEGACY = ("2024-11-05", "2025-03-26", "2025-06-18", "2025-11-25")
FIRST_MODERN = "2026-07-28"

#: The revision of a request without MCP-Protocol-Version where nothing else tells it (MCP
#: 2025-06-18, transports, "Protocol Version Header").
ASSUMED = "2025-03-26"

_DATE = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}")

_texts = msgspec.json.Decoder(list[str])


def named_in(payload: Raw | UnsetType) -> list[str]:
    """The revisions that a list in JSON names, none where it is no list of texts."""
    try:
        return _texts.decode(payload) if payload else []
    except (msgspec.DecodeError, UnicodeDecodeError):
        return []


def is_legacy(version: str) -> bool:
    """Whether `version` is a released revision of the session era."""
    return version in LEGACY


def is_modern(version: str) -> bool:
    """Whether `version` is a revision of the stateless era, known or future."""
    return _DATE.fullmatch(version) is not None and version >= FIRST_MODERN


def allows_batches(version: str) -> bool:
    """Whether a session at `version` may send batches: only 2025-03-26 has them."""
    return version == "2025-03-26"


def primes_streams(version: str) -> bool:
    """Whether streams at `version` begin with an event without data; older clients break on it."""
    return version >= "2025-11-25"

"""The MCP revisions and the two eras they belong to.

Legacy revisions open a session with `initialize`; modern ones carry their version in the `_meta` of
every request and know no sessions (MCP 2026-07-28, versioning, "Terminology").
"""

from __future__ import annotations

import re

#: Oldest first.
LEGACY = ("2024-11-05", "2025-03-26", "2025-06-18", "2025-11-25")
FIRST_MODERN = "2026-07-28"

#: What a request without MCP-Protocol-Version is taken for where nothing else tells (2025-06-18).
ASSUMED = "2025-03-26"

_DATE = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}")


def is_legacy(version: str) -> bool:
    """Whether `version` is a released revision of the session era."""
    return version in LEGACY


def is_modern(version: str) -> bool:
    """Whether `version` is a revision of the stateless era, also one that is not known yet."""
    return _DATE.fullmatch(version) is not None and version >= FIRST_MODERN


def allows_batches(version: str) -> bool:
    """Whether a session at `version` may send arrays: 2025-03-26 only, 2025-06-18 removed them."""
    return version == "2025-03-26"


def primes_streams(version: str) -> bool:
    """Whether a stream begins with an event without data, on which older clients break."""
    return version >= "2025-11-25"

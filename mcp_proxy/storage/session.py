"""The session record."""

from __future__ import annotations

import re
import time

import msgspec
from msgspec import Raw

from mcp_proxy.errors import StorageError

#: The largest record that a store takes, in bytes of JSON.
MAX_RECORD = 128 * 1024

# Metadata keys. Every session has a `backend_url`, and routing is one look-up of it.
BACKEND_URL = "backend_url"
BACKEND_HOST = "backend_host"
BACKEND_SID = "backend_sid"
INIT_BODY = "init_body"
PROTOCOL_VERSION = "protocol_version"
RESUME = "resume"
CLAIM = "claim"
LOST_AT = "lost_at"
UNSENT = "unsent"
COOKIES = "cookies"
PRINCIPAL = "principal"
KINDS = "kinds"
MOVED = "moved"
ENV_DIGEST = "env_digest"


#: The member that a shared store adds to a record: a nonce of the write.
SIGNED = "signed"


class Session(msgspec.Struct, frozen=True, kw_only=True, dict=True, forbid_unknown_fields=True):
    """The immutable record of a session, with metadata of strings.

    `type` is `streamable`, `sse`, `mcp` or `shared`; times are seconds since the epoch. A change is
    a new record, written with `Storage.swap`.
    """

    id: str
    type: str
    created_at: float
    updated_at: float
    metadata: dict[str, str]

    @property
    def backend_url(self) -> str | None:
        """The backend of the session's requests, None where none is recorded."""
        return self.metadata.get(BACKEND_URL)

    @property
    def stored(self) -> bytes | None:
        """The bytes that a shared store has for this record; None where they were not read."""
        return self.__dict__.get("stored")

    @property
    def others(self) -> dict[str, Raw]:
        """Members that a newer version has added; `with_metadata` and `encode` keep them."""
        others: dict[str, Raw] = self.__dict__.get("others", {})
        return others

    def with_metadata(self, **changes: str | None) -> Session:
        """A copy with these keys changed; None removes a key."""
        merged = {**self.metadata, **changes}
        metadata = {key: value for key, value in merged.items() if value is not None}
        changed = msgspec.structs.replace(self, metadata=metadata, updated_at=time.time())
        if self.others:
            changed.__dict__["others"] = self.others
        return changed


_MINTED = re.compile(r"mcp-([0-9a-f]{8})-[0-9a-f]{32}")


def minted_by(session_id: str) -> str | None:
    """The nonce of the process that minted an id of our own form; None for any other id."""
    minted = _MINTED.fullmatch(session_id)
    return None if minted is None else minted.group(1)


def new_session(session_id: str, kind: str, **metadata: str) -> Session:
    """A new record, created now."""
    now = time.time()
    return Session(id=session_id, type=kind, created_at=now, updated_at=now, metadata=metadata)


_encoder = msgspec.json.Encoder(order="deterministic")
_decoder = msgspec.json.Decoder(Session)
_members = msgspec.json.Decoder(dict[str, Raw])


def encode(session: Session) -> bytes:
    """The record as JSON; equal records give equal bytes. Raises StorageError over 128 KiB."""
    others = session.others
    times = (session.created_at, session.updated_at)
    if any(isinstance(moment, int) for moment in times):
        created, updated = map(float, times)  # 1 and 1.0 are equal but not the same bytes
        session = msgspec.structs.replace(session, created_at=created, updated_at=updated)
    data = _encoder.encode(session)
    if others:
        data = data.removesuffix(b"}") + b"," + _encoder.encode(others).removeprefix(b"{")
    if len(data) > MAX_RECORD:
        raise StorageError(f"The session record is larger than {MAX_RECORD} bytes")
    return data


def decode(data: bytes, stored: bytes | None = None) -> Session:
    """The record in `data`, of this version or a newer one. Raises StorageError if it is none.

    `stored` are the bytes that the store has for it, which `Storage.swap` compares.
    """
    try:
        session = _decoded(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise StorageError(f"The session record cannot be read: {error}") from error
    if stored is not None:
        session.__dict__["stored"] = stored
    return session


def _decoded(data: bytes) -> Session:
    try:
        return _decoder.decode(data)
    except msgspec.ValidationError:
        members = _members.decode(data)  # of a newer version, or signed by another store
    known = {name: members.pop(name) for name in Session.__struct_fields__ if name in members}
    session = _decoder.decode(_encoder.encode(known))
    members.pop(SIGNED, None)
    if members:
        session.__dict__["others"] = {name: Raw(bytes(value)) for name, value in members.items()}
    return session

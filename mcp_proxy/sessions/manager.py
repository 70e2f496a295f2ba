"""The session manager: one per server, shared by its transports, safe for any thread."""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Mapping
from typing import TYPE_CHECKING, NoReturn

from mcp_proxy.errors import (
    ConfigError,
    InvalidRequest,
    SessionEnded,
    SessionNotFound,
    SessionUnknown,
)
from mcp_proxy.replica import Replica
from mcp_proxy.sessions.facts import CallerKey
from mcp_proxy.storage.records import LocalStorage, Storage
from mcp_proxy.storage.session import ENV_DIGEST, PRINCIPAL, Session, minted_by
from mcp_proxy.wire.headers import MAX_SESSION_ID, SESSION_ID_FORM

if TYPE_CHECKING:
    from mcp_proxy.redis.client import Client

log = logging.getLogger(__name__)

# Claims of others that are remembered, the oldest forgotten first; each holds for a minute.
_MAX_CLAIMS_SEEN = 10_000


class SessionManager:
    """Mints ids, finds records, binds them to callers, and tells an ended session from an id that
    was never issued.

    Without `storage` the records are in memory, for `ttl` seconds after their last use; a `storage`
    has a time to live of its own. `unknown_status` is the HTTP status for an id that was never
    issued here, 400 or 404. The constructor raises ConfigError.
    """

    def __init__(
        self, storage: Storage | None = None, ttl: float = 7200, unknown_status: int = 400
    ) -> None:
        if storage is not None and not isinstance(storage, Storage):
            kind = type(storage).__name__
            raise ConfigError(f"storage must be a Storage, such as RedisStorage(url), not {kind}")
        if unknown_status not in (400, 404):
            raise ConfigError(f"unknown_status must be 400 or 404, not {unknown_status!r}")
        self.storage = storage if storage is not None else LocalStorage(ttl)
        self._unknown_status = unknown_status
        #: What stands for callers in records.
        self.callers = CallerKey(self.storage)
        #: The process whose nonce the ids have that are minted here.
        self.replica = Replica()
        self._lock = threading.Lock()  # guards what follows
        self._claims_seen: OrderedDict[str, float] = OrderedDict()
        self._claims_left: OrderedDict[str, Session] = OrderedDict()

    @classmethod
    def with_redis(
        cls,
        client_or_url: Client | str,
        ttl: float = 7200,
        prefix: str = "mcp-proxy:",
        name: str = "default",
    ) -> SessionManager:
        """A manager that shares its records with replicas of the same Redis, prefix and name.

        `name` is the name of the server, or of the embedded transport, that has the sessions; a
        server that is given by its command or URL alone has the name `default`.
        """
        from mcp_proxy.redis.storage import RedisStorage

        return cls(RedisStorage(client_or_url, ttl=ttl, prefix=prefix).scoped(name))

    def __repr__(self) -> str:
        return f"<SessionManager {self.storage!r}>"

    def mint_id(self) -> str:
        """A new id of our own form: a nonce of this process and 128 random bits."""
        return f"mcp-{self.replica.nonce}-{secrets.token_hex(16)}"

    def create(self, session: Session) -> None:
        """Stores a new session; raises SessionExists, StorageError or StorageUnavailable."""
        self.storage.create(session)

    def load(self, session_id: str) -> Session:
        """The session, its time to live restarted, in one round trip to the store.

        Raises InvalidRequest for a malformed id, SessionUnknown for one that was never issued,
        SessionEnded for one whose session has ended, StorageUnavailable.
        """
        if SESSION_ID_FORM.fullmatch(session_id) is None:
            raise InvalidRequest(
                f"Mcp-Session-Id must be 1 to {MAX_SESSION_ID} visible ASCII characters"
            )
        try:
            return self.storage.load(session_id)
        except SessionNotFound:
            self._explain_miss(session_id)

    # --- whose they are --------------------------------------------------------------------------

    def binding(self, principal: str | None, env: bytes | None = None) -> dict[str, str]:
        """The metadata that bind a record to the principal of this name, and to variables of its
        caller (`env`); none without either.

        Raises StorageError where the key for it has never been read.
        """
        bound = {}
        if principal is not None:
            text = principal.encode("utf-8", "replace")
            bound[PRINCIPAL] = self.callers.digest(b"principal\0" + text)
        if env is not None:
            bound[ENV_DIGEST] = self.callers.digest(b"env\0" + env)
        return bound

    def is_own(self, session: Session, principal: str | None, env: bytes | None = None) -> bool:
        """Whether a record is bound to the principal of this name, or to none and there is none.

        Without one the variables of the caller have to be the same. Raises as `binding` does.
        """
        if principal is None and env is None:
            return PRINCIPAL not in session.metadata and ENV_DIGEST not in session.metadata
        return whose(session.metadata) == whose(self.binding(principal, env))

    def require_own(
        self, session: Session, principal: str | None, env: bytes | None = None
    ) -> None:
        """Raises what `load` does for an id that is not known, after the same work, unless the
        session is this caller's.
        """
        if self.is_own(session, principal, env):
            return
        if minted_by(session.id) is not None:
            raise SessionEnded
        self.storage.issued(session.id)
        raise self.unknown()

    # --- their records ---------------------------------------------------------------------------

    def swap(self, old: Session, new: Session) -> bool:
        """Replaces `old` by `new`; False if the record has changed or the session has ended."""
        return self.storage.swap(old, new)

    def exists(self, session_id: str) -> bool:
        """Whether the session has not ended; does not restart its time to live."""
        return self.storage.exists(session_id)

    def peek(self, session_id: str) -> Session | None:
        """The session, None where it has ended; does not restart its time to live."""
        return self.storage.peek(session_id)

    def first_seen(self, claim: str) -> float:
        """When this process first saw a claim, by its monotonic clock."""
        with self._lock:
            seen = self._claims_seen.setdefault(claim, time.monotonic())
            if len(self._claims_seen) > _MAX_CLAIMS_SEEN:
                self._claims_seen.popitem(last=False)
            return seen

    def leave_claim(self, claim: str, claimed: Session) -> None:
        """A claim of this process could not be given back, as the store is away."""
        with self._lock:
            self._claims_left[claim] = claimed
            if len(self._claims_left) > _MAX_CLAIMS_SEEN:
                self._claims_left.popitem(last=False)

    def claims_left(self) -> dict[str, Session]:
        """The claims that are still to be given back, with their records."""
        with self._lock:
            return dict(self._claims_left)

    def forget_claim(self, claim: str) -> None:
        """A claim has been given back, or holds no more."""
        with self._lock:
            self._claims_left.pop(claim, None)

    def end(self, session_id: str) -> None:
        """Ends the session for every replica; harmless when it has ended already."""
        self.storage.delete(session_id)

    def _explain_miss(self, session_id: str) -> NoReturn:
        """Raises SessionEnded for an id that was once issued, SessionUnknown otherwise."""
        if minted_by(session_id) is not None or self.storage.issued(session_id):
            raise SessionEnded
        raise self.unknown()

    def unknown(self) -> SessionUnknown:
        """The error of an id that was never issued."""
        unknown = SessionUnknown()
        unknown.status = self._unknown_status
        return unknown

    def warn_of_other_process(self, session_id: str) -> None:
        """Says in the log what to set where another process has minted an id that is not here."""
        nonce = minted_by(session_id)
        if nonce is not None and not self.storage.is_shared and nonce != self.replica.nonce:
            log.warning(
                "a session id that another process minted was not found in this process's memory: "
                "after a restart or a reload that is normal; where several workers serve at once, "
                "set redis_url, so that they share their sessions"
            )


def whose(metadata: Mapping[str, str]) -> str | None:
    """What decides whose a record is: its principal, without one the variables of its caller."""
    return metadata.get(PRINCIPAL) or metadata.get(ENV_DIGEST)

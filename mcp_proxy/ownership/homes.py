"""Where modern calls to a stdio server go: to a home, one a key, which is routed as a session is.

The key is who calls and, in front of a legacy server, what that client can be asked for. A home is
a record of its own type, so that whichever worker a call reaches, it goes where the home lives.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import re
import threading
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

from mcp_proxy.auth import caller_env
from mcp_proxy.backends.bridge import Bridge
from mcp_proxy.backends.exchange import wait_for
from mcp_proxy.backends.modern_switchboard import ModernSwitchboard
from mcp_proxy.backends.owned import HOME_IDLE, OwnedBackend
from mcp_proxy.backends.switchboard import Switchboard
from mcp_proxy.config import ProxyOptions
from mcp_proxy.eras import probing
from mcp_proxy.eras.legacy_home import LegacyHome, Started
from mcp_proxy.eras.questions import QuestionSwitchboard
from mcp_proxy.eras.tool_headers import ToolHeaders
from mcp_proxy.errors import (
    BackendError,
    BadAnswer,
    SessionExists,
    SessionNotFound,
    StorageError,
    UncertainEra,
)
from mcp_proxy.ownership.owner import Owner
from mcp_proxy.servers import StdioServer
from mcp_proxy.sessions import claims
from mcp_proxy.sessions.facts import SharedEra
from mcp_proxy.storage.session import KINDS, PRINCIPAL, Session, new_session
from mcp_proxy.wire import modern
from mcp_proxy.wire.capabilities import capabilities_of

log = logging.getLogger(__name__)

#: The type of a home's record.
SHARED = "shared"

#: Homes of one caller in a replica, each for other things that its clients can be asked for.
MAX_SETS = 4

_STATE = re.compile(r"(home-[0-9a-f]{40})\..+")

# What the pauses between attempts to learn the era are remembered by.
_ERA = "era"

#: Seconds for a child of a home to answer, within a claim: it may have to be fetched first.
START_TIME = claims.CLAIM_TIME * 3 / 4


def home_of(state: str) -> str | None:
    """The id of the home that has given a `requestState`; None where none has."""
    found = _STATE.fullmatch(state)
    return None if found is None else found[1]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:20]


class _FirstHome(NamedTuple):
    """What was started to learn the server's era, for the first home."""

    home_id: str
    backend: OwnedBackend
    child: Bridge


class Homes:
    """The homes of one server, for every replica; those of this one are held by `owner`.

    Thread-safe. What the server speaks is learnt by the first modern call.
    """

    def __init__(self, owner: Owner, options: ProxyOptions) -> None:
        self._owner = owner
        self._options = options
        self._lock = threading.Lock()  # guards what follows
        self._is_modern: bool | None = None
        self._first_home: _FirstHome | None = None
        self._ended: dict[str, str] = {}  # why parked calls have, by their states
        self._learning: threading.Event | None = None  # set when somebody has learnt it, or failed
        self._era = _shared_era(owner)
        self._must_ask = False  # whether to learn the era from the server and not from others
        self._has_started = False  # whether a server has ever answered here
        self._form = 0  # how often the server has become another one
        self._is_per_replica = options.stateless_children == "per-replica"
        owner.starters[SHARED] = self._start
        #: The id of the home of a caller and of what that can be asked for.
        self._id_of = lru_cache(maxsize=1024)(self._new_id)

    def __repr__(self) -> str:
        return f"<Homes of {self._owner.server.name} is_modern={self._is_modern}>"

    def change(self, options: ProxyOptions, is_other: bool) -> None:
        """Has other settings from now on; of a server that `is_other` nothing is known."""
        self._options = options
        self._is_per_replica = options.stateless_children == "per-replica"
        self._id_of.cache_clear()
        if not is_other:
            return
        with self._lock:
            first, self._first_home = self._first_home, None
            self._is_modern, self._must_ask, self._has_started = None, True, False
            self._era = _shared_era(self._owner)
            self._form += 1
        if first is not None:
            first.backend.close()

    @property
    def knows_era(self) -> bool:
        """Whether `is_modern` is answered without asking anybody."""
        return self._is_modern is not None

    @property
    def is_known_modern(self) -> bool:
        """Whether the server is known to speak 2026-07-28."""
        return bool(self._is_modern)

    def is_modern(
        self, caller: str, kinds: frozenset[str], has_left: Callable[[], bool] | None
    ) -> bool:
        """Whether the server speaks 2026-07-28.

        The first time a child is started to find out, for the home of `caller`. Raises BackendError
        where that fails, Overloaded, StorageUnavailable, ClientLeft.
        """
        while (known := self._is_modern) is None:
            with self._lock:
                others, is_ours = self._learning, self._learning is None
                if is_ours:
                    self._learning = threading.Event()
            if is_ours:
                self._learn(caller, kinds, has_left)
            elif others is not None:
                wait_for(others, self._options.request_timeout, has_left)
        return known

    def is_modern_now(
        self, caller: str, kinds: frozenset[str], has_left: Callable[[], bool] | None
    ) -> bool:
        """As `is_modern`, of a server that may be another one than it was, or one of several.

        A modern one is left again, and not remembered.
        """
        with self._lock:
            before, self._is_modern, self._must_ask = self._is_modern, None, True
        is_modern = self.is_modern(caller, kinds, has_left)
        if is_modern:
            self.end_first_home(caller, kinds)
            with self._lock:
                self._is_modern = before
        return is_modern

    def id_for(self, caller: str, kinds: frozenset[str]) -> str:
        """The id of a caller's home."""
        return self._id_of(caller, self._relevant(kinds))

    def has_home(self, caller: str, kinds: frozenset[str]) -> bool:
        """Whether a caller has a home, in use or not; raises StorageError."""
        return self._owner.manager.peek(self.id_for(caller, kinds)) is not None

    def session_for(self, home_id: str, caller: str, kinds: frozenset[str]) -> Session:
        """The record of a caller's home, which has this id; made where there is none.

        Raises StorageError.
        """
        manager = self._owner.manager
        try:
            session = self._owner.load(home_id)  # the only round trip of nearly all calls
        except SessionNotFound:
            values = caller_env.current_values()
            binding = manager.binding(None, None if values is None else caller_env.as_text(values))
            metadata = {
                **binding,
                PRINCIPAL: caller,
                KINDS: ",".join(sorted(self._relevant(kinds))),
            }
            session = new_session(home_id, SHARED, **metadata)
            try:
                manager.create(session)
                return session
            except SessionExists:  # somebody else was faster
                session = manager.load(home_id)
        return session

    def session_of(self, state: str, caller: str) -> Session | None:
        """The record of the home that has given a `requestState`, if that was for this caller.

        Raises StorageError.
        """
        home_id = home_of(state)
        session = None if home_id is None else self._owner.manager.peek(home_id)
        if session is None or session.metadata.get(PRINCIPAL) != caller:
            return None
        return session

    def _relevant(self, kinds: frozenset[str]) -> frozenset[str]:
        return frozenset() if self._is_modern else kinds

    def _new_id(self, caller: str, kinds: frozenset[str]) -> str:
        """The first half says whose it is, whatever else the caller shows a server: one worker gets
        all homes of a caller, in front of whichever server.
        """
        key = "\0".join((self._owner.server.name, caller, *sorted(kinds)))
        if self._is_per_replica:
            key = f"{self._owner.replica.id}\0{key}"
        return f"home-{_digest(caller.partition('.')[0])}{_digest(key)}"

    # --- the server's era ------------------------------------------------------------------------

    def _learn(
        self, caller: str, kinds: frozenset[str], has_left: Callable[[], bool] | None
    ) -> None:
        """Finds out what the server speaks, from another replica or from a child."""
        try:
            told = None if self._era is None or self._must_ask else self._era.is_modern()
            if told is None:
                self._ask_child(caller, kinds, has_left)
            else:
                self._is_modern = told
        finally:
            with self._lock:
                learning, self._learning = self._learning, None
            if learning is not None:
                learning.set()

    def _ask_child(
        self, caller: str, kinds: frozenset[str], has_left: Callable[[], bool] | None
    ) -> None:
        """Starts a child to find out what it speaks, which the first home then has."""
        backoff = self._owner.backoff
        backoff.require_over(_ERA)
        form = self._form
        try:
            is_modern, first = self._probed(caller, kinds, has_left)
        except BackendError as error:
            backoff.note_failure(error)
            backoff.note_exit(_ERA, lifetime=0)
            raise
        backoff.note_success()
        backoff.forget(_ERA)
        with self._lock:
            is_current = form == self._form
            superseded: _FirstHome | None = first
            if is_current:
                superseded, self._first_home = self._first_home, first
                self._is_modern, self._must_ask, self._has_started = is_modern, False, True
        if superseded is not None:
            superseded.backend.close()
        if not is_current:
            return  # the server was changed meanwhile: whoever wants to know asks again
        era = "2026-07-28" if is_modern else "sessions"
        log.info("[%s] the server speaks %s", self._owner.server.name, era)
        if self._era is not None:
            with contextlib.suppress(StorageError):  # then others ask a child of theirs
                self._era.note(is_modern)

    def _probed(
        self, caller: str, kinds: frozenset[str], has_left: Callable[[], bool] | None
    ) -> tuple[bool, _FirstHome]:
        owner, timeout = self._owner, self._options.request_timeout
        home = self._legacy_home(self._id_of(caller, kinds), kinds)

        def note_lost(bridge: OwnedBackend) -> None:
            """Whose child it is shows only when it has answered."""
            if not home.note_lost(bridge):
                owner.note_lost(bridge)

        def spawn(switchboard: Switchboard) -> Bridge:
            return owner.spawn(switchboard, note_lost)

        owner.reserve()
        try:
            with owner.turns.take(timeout, has_left):
                declared = capabilities_of(kinds)
                found = probing.probe(spawn, home.new_switchboard, declared, timeout, has_left)
        finally:
            owner.unreserve()
        if found.switchboard is None:
            home_id = self._id_of(caller, frozenset())
            found.bridge.speak(self._modern_switchboard(home_id))
            modern_home = _as_home(found.bridge)
            return True, _FirstHome(home_id, modern_home, found.bridge)
        home.add(Started(found.bridge, found.switchboard, found.result))
        return False, _FirstHome(home.home_id, home, found.bridge)

    def end_first_home(self, caller: str, kinds: frozenset[str]) -> None:
        """Ends what a request of this key started to learn the era, unless a home has taken it.

        The home lives elsewhere, or there is none.
        """
        if self._first_home is None:
            return
        home_id = self._id_of(caller, self._relevant(kinds))
        with self._lock:
            first = self._first_home
            if first is None or first.home_id != home_id:
                return
            self._first_home = None
        first.backend.close()

    # --- starting a home -------------------------------------------------------------------------

    def _start(self, session: Session) -> OwnedBackend:
        """A new home, for a record that is claimed; raises BackendError.

        Of more than a caller may have the one that was unused for the longest time is to end.
        """
        home = self._started_home(session)
        home.caller = session.metadata.get(PRINCIPAL, "")
        others = [
            each
            for each in self._owner.backends
            if each.caller == home.caller and each.is_alive and not each.is_superseded
        ]
        others.sort(key=lambda each: (not each.is_watched, -each.last_used))
        for each in others[MAX_SETS - 1 :]:
            self._owner.supersede(each)
        return home

    def _started_home(self, session: Session) -> OwnedBackend:
        with self._lock:
            first, self._first_home = self._first_home, None
            is_modern = self._is_modern
        if first is not None and first.home_id == session.id and first.backend.is_alive:
            self._owner.spawned(first.child)
            return first.backend
        if first is not None:
            first.backend.close()
        kinds = frozenset(filter(None, session.metadata.get(KINDS, "").split(",")))
        try:
            home = self._modern_home(session.id) if is_modern else self._new_legacy(session, kinds)
        except BackendError as error:
            # It may be another server than it was. Or its first start takes longer than a claim
            # lasts, and who asks for the era waits longer.
            if isinstance(error, BadAnswer) or not self._has_started:
                with self._lock:
                    self._is_modern, self._must_ask = None, True
            if isinstance(error, BadAnswer):
                raise UncertainEra(error.message) from error
            raise
        self._has_started = True
        return home

    def _new_legacy(self, session: Session, kinds: frozenset[str]) -> OwnedBackend:
        home = self._legacy_home(session.id, kinds)
        home.add(self._started(home))
        return home

    def _modern_home(self, home_id: str) -> OwnedBackend:
        bridge = self._owner.spawn(self._modern_switchboard(home_id))
        try:
            probing.discovered(bridge, START_TIME)
        except BaseException:
            bridge.close()
            raise
        return _as_home(bridge)

    def _modern_switchboard(self, home_id: str) -> ModernSwitchboard:
        """A state has to come back to this worker only where others have homes of the same key."""
        return ModernSwitchboard(home_id if self._is_per_replica else "")

    def _legacy_home(self, home_id: str, kinds: frozenset[str]) -> LegacyHome:
        home = LegacyHome(
            home_id,
            kinds,
            self._further_child,
            self._owner.note_lost,
            self._owner.timer,
            self._options.stateless_children == "one",
            self._options.input_timeout,
            lambda: self._owner.end_parked_beyond(max(2, self._options.max_sessions // 4)),
            self._ended,
        )
        home.caller_values = caller_env.current_values()
        return home

    def _further_child(self, home: LegacyHome) -> Started:
        self._owner.reserve()
        try:
            with caller_env.on_behalf_of(home.caller_values):
                return self._started(home)
        finally:
            self._owner.unreserve()

    def _started(self, home: LegacyHome) -> Started:
        board: QuestionSwitchboard = home.new_switchboard()
        bridge = self._owner.spawn(board, home.note_lost)
        try:
            result = probing.initialized(bridge, capabilities_of(home.kinds), START_TIME)
        except BaseException:
            bridge.close()
            raise
        self._owner.spawned(bridge)
        return Started(bridge, board, result)


def _shared_era(owner: Owner) -> SharedEra | None:
    """Where replicas tell each other what a server speaks that each of them starts."""
    server = owner.server
    if not isinstance(server, StdioServer) or not owner.manager.storage.is_shared:
        return None
    return SharedEra(owner.manager.storage, [*server.argv, server.cwd or ""])


def _as_home(bridge: Bridge) -> Bridge:
    """A child that speaks 2026-07-28, as the home of all that its clients ask."""
    headers = ToolHeaders(modern.OWN_META)
    bridge.has_answered = lambda exchange: headers.has_refused(bridge, exchange)
    bridge.idle_limit = HOME_IDLE
    return bridge

"""The choice of an HTTP backend for a new session."""

from __future__ import annotations

import socket
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple, TypeVar

from mcp_proxy.background import KeyedExecutor
from mcp_proxy.errors import BackendUnreached
from mcp_proxy.transparent.reachability import Reachability
from mcp_proxy.wire.urls import Address, Origin, Target

T = TypeVar("T")

#: Seconds for which the addresses of a name are believed.
LOOK_UP = 2.0

#: Seconds that a request waits for them.
NAME_WAIT = 0.4

_KEPT = 300.0  # seconds for which addresses serve while the resolver fails


class _Found(NamedTuple):
    """`seen`: when each address was last found, those of the last five minutes and of now."""

    hosts: tuple[str, ...]
    looked_up: float
    was_good: float
    seen: dict[str, float]


#: The addresses of a host name, as strings; raises OSError.
Resolver = Callable[[str, int], Sequence[str]]


def resolve(host: str, port: int) -> list[str]:
    """The addresses that the system knows for a name, in its order, each once."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


class Names:
    """The addresses of host names, looked up by one thread, at most once in `LOOK_UP` seconds.

    Thread-safe. Old addresses serve while the resolver is silent, and for five minutes of errors.
    """

    def __init__(self, resolver: Resolver, clock: Callable[[], float] = time.monotonic) -> None:
        self._resolver = resolver
        self._clock = clock
        self._thread = KeyedExecutor("mcp-resolver", 1)
        self._changed = threading.Condition()  # guards and announces what follows
        self._found: dict[tuple[str, int], _Found] = {}
        self._asked: set[tuple[str, int]] = set()

    def addresses(self, host: str, port: int, wait: float) -> Sequence[str]:
        """The addresses, empty where none are known within `wait` seconds."""
        key = (host, port)
        with self._changed:
            known = self._found.get(key)
            if known is not None and known.looked_up + LOOK_UP > self._clock():
                return known.hosts
            is_first = key not in self._asked
            self._asked.add(key)
        if is_first:
            try:
                self._thread.submit("names", lambda: self._look_up(key))
            except RuntimeError:  # no thread can be started; the next request tries again
                with self._changed:
                    self._asked.discard(key)
                raise
        with self._changed:
            if is_first or known is None:
                self._changed.wait_for(lambda: self._found.get(key) is not known, wait)
            found = self._found.get(key)
            return () if found is None else found.hosts

    def has(self, host: str, port: int, address: str) -> bool:
        """Whether a name has an address: by its last good look-up, or one within five minutes.

        True as well where nothing is known of the name. Waits for nobody. A port for which the name
        was not looked up is one that a redirect led to.
        """
        found = self._found.get((host, port)) or next(
            (found for (name, _), found in self._found.copy().items() if name == host), None
        )
        if found is None or not found.hosts or address in found.hosts:
            return True
        return found.seen.get(address, float("-inf")) + _KEPT > self._clock()

    def stop(self) -> None:
        """Ends the thread; harmless when repeated."""
        self._thread.close()

    def _look_up(self, key: tuple[str, int]) -> None:
        hosts: Sequence[str] | None = None
        try:
            hosts = self._resolver(*key)
        except OSError:
            pass  # connecting will fail with a better message
        finally:
            now = self._clock()
            with self._changed:
                old = self._found.get(key)
                if hosts is not None:
                    before = {} if old is None else old.seen
                    seen = {host: when for host, when in before.items() if when + _KEPT > now}
                    seen.update(dict.fromkeys(hosts, now))
                    self._found[key] = _Found(tuple(hosts), now, now, seen)
                elif old is not None and old.was_good + _KEPT > now:
                    self._found[key] = old._replace(looked_up=now)
                else:
                    self._found[key] = _Found((), now, now, {})
                self._asked.discard(key)
                self._changed.notify_all()


class Balancer:
    """Orders backends by their sessions of this replica, fewest first, ties in turn. Thread-safe.

    A host name is resolved by `Names`, and each of its addresses is a backend; the name itself is
    one only while no address is known, or where `proxy_of` names an outbound proxy for it: then it
    is not looked up. `ttl` is the sessions', in seconds. Those that `reachability` leaves out come
    last.

    `address_of(backend, name)` is the address that a session's record names, with the endpoint of
    the target that it belongs to. A path in the record finds one of several targets on a host, or
    stands for itself.
    """

    def __init__(
        self,
        targets: Sequence[Target],
        ttl: float,
        resolver: Resolver = resolve,
        clock: Callable[[], float] = time.monotonic,
        reachability: Reachability | None = None,
        proxy_of: Callable[[Address], str | None] = lambda address: None,
    ) -> None:
        self._reachability = reachability
        self._proxy_of = proxy_of
        self._targets = targets
        self.address_of = lru_cache(maxsize=256)(self._address_of)
        self._ttl = ttl
        self._names = Names(resolver, clock)
        self._clock = clock
        self._lock = threading.Lock()  # guards the fields below
        self._turn = 0
        # By session id, the most recently used at the end.
        self._sessions: OrderedDict[str, tuple[Address, float]] = OrderedDict()
        self._load: Counter[Address] = Counter()
        self._known: dict[Origin, float] = {}
        # The port for TLS of http targets that redirect to https, and until when that counts.
        self._tls_ports: dict[Origin, tuple[int, float]] = {}

    def __repr__(self) -> str:
        return f"<Balancer {dict(self._load)}>"

    def candidates(self, wait: float = NAME_WAIT) -> list[Address]:
        """Every backend, in the order in which they are to be tried.

        Waits `wait` seconds for names that were not looked up yet.
        """
        addresses = self.backends(wait)
        with self._lock:
            self._remove_expired()
            self._turn += 1
            first = self._turn % len(addresses)
            turned = addresses[first:] + addresses[:first]
            return sorted(turned, key=lambda a: (self._is_left_out(a), self._load[a]))

    def backends(self, wait: float = NAME_WAIT) -> list[Address]:
        """Every backend, in the order of the targets; waits as `candidates` does."""
        return [a for target in self._targets for a in self._addresses(target, wait)]

    def has_several(self) -> bool:
        """Whether there is more than one backend to choose from."""
        if len(self._targets) > 1:
            return True
        return len(self._addresses(self._targets[0], NAME_WAIT)) > 1

    def first_reached(
        self, act: Callable[[Address], T], but: Callable[[Address], bool] | None = None
    ) -> T:
        """The result of `act` for the first backend that can be reached, `but` some excepted.

        Meanwhile the attempt counts as a session there, so that simultaneous ones are spread.
        Raises the errors of `act`, but BackendUnreached only where no backend can be reached.
        """
        addresses = [each for each in self.candidates() if but is None or not but(each)]
        failure: BackendUnreached | None = None
        for address in self._in_turn(addresses):
            with self._lock:
                self._count(address, 1)
            try:
                result = act(address)
            except BackendUnreached as error:
                failure = error
                self.note_failure(address, error)
            else:
                if self._reachability is not None:
                    self._reachability.reached(address)
                return result
            finally:
                with self._lock:
                    self._count(address, -1)
        raise failure or self.failure(addresses)

    def failure(self, addresses: Sequence[Address]) -> BackendUnreached:
        """What a client is told when none of these was tried, since all are left out."""
        if self._reachability is None:
            return BackendUnreached()
        return self._reachability.failure(addresses)

    def one_by_one(self) -> Iterator[Address]:
        """Every backend that can be tried, in order; those left out only if they are back."""
        return self._in_turn(self.candidates())

    def instead_of(self, address: Address) -> Iterator[Address]:
        """The backends for a session's request that cannot go to `address`, one by one.

        First come those of its name, then the other targets, and at last those that were left out
        and can be reached again, `address` among them.
        """
        others = [_as_secure(found, address) for found in self.candidates()]
        others = [found for found in others if _identity(found) != _identity(address)]
        others.sort(key=lambda found: _named(found) != _named(address))
        yield from self._in_turn([*others, *([address] if self._is_left_out(address) else [])])

    def _in_turn(self, addresses: Iterable[Address]) -> Iterator[Address]:
        """Those that are not left out, then those of the others that can be reached again.

        That is found out by another thread, so that no request waits for a host that is silent.
        """
        left_out: list[Address] = []
        for address in addresses:
            if self._is_left_out(address):
                left_out.append(address)
            else:
                yield address
        if self._reachability is not None and left_out:
            yield from self._reachability.back(left_out)

    def note_failure(self, address: Address, error: BackendUnreached) -> None:
        """Has a backend left out that could not be reached."""
        with self._lock:
            self._tls_ports = {
                origin: known
                for origin, known in self._tls_ports.items()
                if (origin[1], known[0]) != (address.name or address.host, address.port)
            }
        if self._reachability is not None:
            error.detail = error.detail or f"{address.shown}: {error}"
            self._reachability.failed(address, error)

    def _is_left_out(self, address: Address) -> bool:
        return self._reachability is not None and self._reachability.is_left_out(address)

    def add(self, session_id: str, address: Address) -> None:
        """Counts a new session at `address`."""
        with self._lock:
            self._remove(session_id)
            self._sessions[session_id] = (address, self._clock() + self._ttl)
            self._count(address, 1)

    def touch(self, session_id: str, address: Address) -> bool:
        """Restarts the time to live of a session, if it is counted here.

        False where `address`, its backend, is not usable.
        """
        with self._lock:
            entry = self._sessions.get(session_id)
            if entry is not None:
                self._sessions[session_id] = (entry[0], self._clock() + self._ttl)
                self._sessions.move_to_end(session_id)
        return self.is_usable(address)

    def is_usable(self, address: Address) -> bool:
        """Whether a backend is not left out, and its name still has it."""
        if address.name and not self._names.has(address.name, address.port, address.host):
            return False
        return not self._is_left_out(address)

    def remove(self, session_id: str) -> None:
        """Removes a session, which has ended."""
        with self._lock:
            self._remove(session_id)

    def knows(self, target: Target) -> bool:
        """Whether a backend is a target or an address of one, now or within the last `ttl`.

        For an http target that is its host with https as well: it may have redirected there.
        """
        if self._is_known(target.origin):
            return True
        for each in self._targets:
            self._addresses(each, NAME_WAIT)
        if self._is_known(target.origin):
            return True
        return target.scheme == "https" and self._was_redirected(target)

    def _was_redirected(self, backend: Target) -> bool:
        for target in self._targets:
            origin = ("http", backend.host, target.port)
            if target.scheme == "http" and self._is_known(origin):
                self._remember(backend, ())
                return True
        return False

    def note_tls(self, address: Address, port: int) -> None:
        """Has a target that redirects to https asked there at once from now on.

        That ends after `ttl`, or when it cannot be reached there: the target may think otherwise.
        """
        with self._lock:
            self._tls_ports[_named(address)] = (port, self._clock() + self._ttl)

    def _address_of(self, backend: Target, name: str | None) -> Address:
        address = Address(*backend.origin, name, backend.own_path, backend.query)
        if address.query:
            return address
        scheme, host, port = _named(address)
        for target in self._targets:
            own = self._own_endpoint(target)
            is_led = (target.scheme, scheme) == ("http", "https")  # by a redirect, to any port
            is_there = target.host == host and (is_led or target.origin == (scheme, host, port))
            if is_there and address.path in ("", own[0], target.own_path):
                return Address(*address[:4], *own)
        return address

    def has_name(self, name: str | None) -> bool:
        """Whether a target has this name."""
        return any(target.host == name for target in self._targets)

    def _is_known(self, origin: Origin) -> bool:
        with self._lock:
            return self._known.get(origin, 0.0) > self._clock()

    def stop(self) -> None:
        """Ends the thread that looks names up; harmless when repeated."""
        self._names.stop()

    def _addresses(self, target: Target, wait: float) -> list[Address]:
        found = target
        port, until = self._tls_ports.get(target.origin, (0, 0.0))
        if until > self._clock():
            found = target._replace(scheme="https", port=port)
        hosts: Sequence[str] = ()
        if self._proxy_of(found.address) is None:
            hosts = self._names.addresses(target.host, target.port, wait)
        self._remember(target, hosts)
        if found is not target:
            self._remember(found, hosts)
        own = self._own_endpoint(target)
        if not hosts or list(hosts) == [target.host]:
            return [Address(*found.origin, None, *own)]
        return [Address(found.scheme, host, found.port, found.host, *own) for host in hosts]

    def _own_endpoint(self, target: Target) -> tuple[str, str]:
        """Path and query as an address of a target has them: none for those of the first one."""
        static = self._targets[0]
        if (target.own_path, target.query) == (static.own_path, static.query):
            return "", ""
        return target.own_path or "/mcp", target.query

    def _remember(self, target: Target, hosts: Sequence[str]) -> None:
        now = self._clock()
        with self._lock:
            for host in (target.host, *hosts):
                self._known[(target.scheme, host, target.port)] = now + self._ttl
            self._known = {origin: t for origin, t in self._known.items() if t > now}

    # --- with the lock held ----------------------------------------------------------------------

    def _remove_expired(self) -> None:
        now = self._clock()
        while self._sessions and next(iter(self._sessions.values()))[1] <= now:
            self._remove(next(iter(self._sessions)))

    def _remove(self, session_id: str) -> None:
        entry = self._sessions.pop(session_id, None)
        if entry is not None:
            self._count(entry[0], -1)

    def _count(self, address: Address, change: int) -> None:
        self._load[address] += change
        if not self._load[address]:
            del self._load[address]


def _as_secure(found: Address, before: Address) -> Address:
    """A backend, with TLS where that is how another address of its host was asked."""
    if (before.scheme, found.scheme) != ("https", "http") or _named(found)[1] != _named(before)[1]:
        return found
    return found._replace(scheme="https", port=before.port)


def _named(address: Address) -> Origin:
    return address.scheme, address.name or address.host, address.port


def _identity(address: Address) -> tuple[str, ...]:
    """What identifies a backend, whether its name is known or not."""
    return address.url, address.path, address.query

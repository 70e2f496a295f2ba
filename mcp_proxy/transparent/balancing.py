"""Which of several HTTP backends a new session goes to."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence

from mcp_proxy.wire.urls import Address, Target

#: The addresses of a host name, as strings; raises OSError.
Resolver = Callable[[str, int], Sequence[str]]


def resolve(host: str, port: int) -> list[str]:
    """The addresses that the system knows for a name, in its order, each once."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


class BackendChooser:
    """The fewest live sessions of this replica first, ties in turn. Thread-safe.

    A name is resolved at each choice. Where it has several addresses each is a backend of its own;
    where it has one, the name is used, so that it may move. `ttl` is the sessions'.
    """

    def __init__(
        self,
        targets: Sequence[Target],
        ttl: float,
        resolver: Resolver = resolve,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._targets = targets
        self._ttl = ttl
        self._resolver = resolver
        self._clock = clock
        self._lock = threading.Lock()  # guards what follows
        self._turn = 0
        self._live: OrderedDict[str, tuple[Address, float]] = OrderedDict()  # by session
        self._counts: Counter[Address] = Counter()
        self._opening: Counter[Address] = Counter()
        self._seen: dict[tuple[str, str, int], float] = {}  # scheme, host, port

    def __repr__(self) -> str:
        return f"<BackendChooser {dict(self._counts)}>"

    def candidates(self) -> list[Address]:
        """Every backend, in the order in which they are to be tried."""
        addresses = [address for target in self._targets for address in self._addresses(target)]
        with self._lock:
            self._forget_expired()
            self._turn += 1
            first = self._turn % len(addresses)
            turned = addresses[first:] + addresses[:first]
            return sorted(
                turned, key=lambda address: self._counts[address] + self._opening[address]
            )

    @contextlib.contextmanager
    def opening(self, address: Address) -> Iterator[None]:
        """While a session is about to begin there it counts: many that begin at once are spread."""
        with self._lock:
            self._opening[address] += 1
        try:
            yield
        finally:
            with self._lock:
                self._opening[address] -= 1
                if not self._opening[address]:
                    del self._opening[address]

    def opened(self, session_id: str, address: Address) -> None:
        """A session began there."""
        with self._lock:
            self._drop(session_id)
            self._live[session_id] = (address, self._clock() + self._ttl)
            self._counts[address] += 1

    def used(self, session_id: str) -> None:
        """A session that began here is still used."""
        with self._lock:
            entry = self._live.get(session_id)
            if entry is not None:
                self._live[session_id] = (entry[0], self._clock() + self._ttl)
                self._live.move_to_end(session_id)

    def closed(self, session_id: str) -> None:
        """A session is over."""
        with self._lock:
            self._drop(session_id)

    def knows(self, target: Target) -> bool:
        """Whether a backend is one of the targets or of the addresses they have, or had lately."""
        place = (target.scheme, target.host, target.port)
        if self._was_seen(place):
            return True
        for known in self._targets:
            self._addresses(known)
        return self._was_seen(place)

    def _was_seen(self, place: tuple[str, str, int]) -> bool:
        with self._lock:
            return self._seen.get(place, 0.0) > self._clock()

    def _addresses(self, target: Target) -> list[Address]:
        try:
            hosts = self._resolver(target.host, target.port)
        except OSError:
            hosts = ()  # connecting will say the same in better words
        self._remember(target, hosts)
        if len(hosts) < 2:
            return [target.address]
        return [Address(target.scheme, host, target.port, target.host) for host in hosts]

    def _remember(self, target: Target, hosts: Sequence[str]) -> None:
        until = self._clock() + self._ttl
        with self._lock:
            for host in (target.host, *hosts):
                self._seen[(target.scheme, host, target.port)] = until
            self._seen = {place: t for place, t in self._seen.items() if t > self._clock()}

    def _forget_expired(self) -> None:
        now = self._clock()
        while self._live and next(iter(self._live.values()))[1] <= now:
            self._drop(next(iter(self._live)))

    def _drop(self, session_id: str) -> None:
        entry = self._live.pop(session_id, None)
        if entry is not None:
            self._counts[entry[0]] -= 1
            if not self._counts[entry[0]]:
                del self._counts[entry[0]]

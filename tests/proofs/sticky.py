"""Sessions stay with the backend that holds them, whichever proxy gets the request."""

from __future__ import annotations

import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from statistics import median
from typing import NamedTuple

from tests.clients.programs import python_with_mcp1
from tests.proofs.crowd import Call, Crowd, StickyServer
from tests.support.proxy_process import ProxyProcess
from tests.support.redis_server import RedisServer

CLIENTS = 50
CALLS = 20

_PATIENCE = 90.0
_LOOK = 0.05

Place = tuple[str, int]


class Scene(NamedTuple):
    """Two proxies over one Redis."""

    redis: RedisServer
    proxies: list[ProxyProcess]

    @property
    def ports(self) -> list[int]:
        """Where the clients may go."""
        return [proxy.port for proxy in self.proxies]

    def records(self) -> int:
        """How many sessions Redis knows."""
        with self.redis.client() as client:
            return len(list(client.scan_iter("mcp-proxy:*session:*")))


@contextmanager
def two_proxies(targets: Sequence[str], *options: str) -> Iterator[Scene]:
    """Two gunicorn processes of two workers each."""
    with ExitStack() as stack:
        redis = stack.enter_context(RedisServer())
        given = ["--workers", "2", "--redis-url", redis.url, "--log-level", "warning", *options]
        for target in targets:
            given += ["--target-url", target]
        proxies = [stack.enter_context(ProxyProcess(options=given)) for _ in range(2)]
        try:
            yield Scene(redis, proxies)
        except BaseException as error:
            for proxy in proxies:
                error.add_note(f"{proxy!r} wrote:\n{proxy.log()[-4000:]}")
            raise


def wait_until(crowd: Crowd, condition: Callable[[list[Call]], bool], what: str) -> None:
    """Waits for something that shows in the calls made so far."""
    deadline = time.monotonic() + _PATIENCE
    while not condition(crowd.calls()):
        crowd.require_running()
        assert time.monotonic() < deadline, f"{what}: {len(crowd.calls())} calls"
        time.sleep(_LOOK)


def everybody_called(clients: int, since: float, count: int) -> Callable[[list[Call]], bool]:
    """Whether each client has had `count` answers to calls that it made after `since`."""

    def is_so(calls: list[Call]) -> bool:
        answered = Counter(c.client for c in calls if c.place is not None and c.started > since)
        return len(answered) == clients and min(answered.values()) >= count

    return is_so


def by_client(calls: list[Call]) -> dict[int, list[Call]]:
    """The calls of each client, of those that were answered."""
    found: dict[int, list[Call]] = defaultdict(list)
    for call in calls:
        if call.place is not None:
            found[call.client].append(call)
    return found


def places_of(calls: list[Call]) -> set[Place]:
    """The servers' processes that answered."""
    return {call.place for call in calls if call.place is not None}


def report(crowd: Crowd, scene: Scene, seconds: float) -> None:
    """Prints the figures that every run has."""
    calls, ends = crowd.calls(), crowd.ends()
    spread: Counter[str] = Counter()
    for end in ends:
        spread.update(end["requests"])
    times = sorted(call.ended - call.started for call in calls)
    shares = ", ".join(str(spread[str(port)]) for port in scene.ports)
    print(
        f"{len(ends)} clients, {len(calls)} calls in {seconds:.1f} s, "
        f"{sum(call.place is None for call in calls)} of them failed\n"
        f"  requests at the two proxies: {shares}\n"
        f"  seconds per call: median {median(times):.3f}, "
        f"99 % {times[len(times) * 99 // 100]:.3f}, longest {times[-1]:.3f}\n"
        f"  standing streams that carried a message at the end: "
        f"{sum(end['was_announced'] for end in ends)}",
        flush=True,
    )


def require_memory(calls: list[Call]) -> None:
    """Each process knew its sessions from their first call on, and missed none of their calls."""
    failed = Counter(call.client for call in calls if call.place is None)
    for client, answered in by_client(calls).items():
        assert {call.marker for call in answered} == {f"client {client}"}
        missed = 0
        for place in places_of(answered):
            counters = sorted(call.counter for call in answered if call.place == place)
            assert len(set(counters)) == len(counters), (client, place, counters)
            missed += counters[-1] - len(counters)
        assert missed <= failed[client], f"client {client}: {missed} calls counted, not answered"


def routing() -> None:
    """Fifty clients over two proxies and three servers: no failed call, one backend a session."""
    with ExitStack() as stack:
        servers = [stack.enter_context(StickyServer(name)) for name in "ABC"]
        scene = stack.enter_context(two_proxies([server.url for server in servers]))
        started = time.monotonic()
        interpreters = [sys.executable, python_with_mcp1()]
        options = ["--calls", str(CALLS)]
        crowd = stack.enter_context(Crowd(interpreters, scene.ports, CLIENTS, options))
        crowd.finish(_PATIENCE)
        report(crowd, scene, time.monotonic() - started)
        calls, found = crowd.calls(), by_client(crowd.calls())
        backends = Counter(len(places_of(answered)) for answered in found.values())
        on_each = Counter(name for answered in found.values() for name, _ in places_of(answered))
        print(f"  backends per session: {dict(backends)}")
        print(f"  sessions per backend: {dict(sorted(on_each.items()))}")
        print(f"  initialized: {[server.began() for server in servers]}")
        print(f"  records left in Redis after every DELETE: {scene.records()}", flush=True)
        assert [call.error for call in calls if call.error] == []
        assert len(calls) >= CLIENTS * CALLS
        assert backends == {1: CLIENTS}
        assert sum(server.began() for server in servers) == CLIENTS
        assert all(len(end["sessions"]) == 1 for end in crowd.ends())
        assert all(end["was_announced"] for end in crowd.ends())
        require_memory(calls)
        assert scene.records() == 0


class Loss(NamedTuple):
    """A server that was killed: when, and the clients whose sessions it held."""

    server: str
    before: float
    after: float
    holders: frozenset[int]

    def interrupted(self, call: Call) -> bool:
        """Whether a call was in flight on it."""
        return (
            call.client in self.holders and call.started <= self.after and call.ended >= self.before
        )


def kill(server: StickyServer, crowd: Crowd) -> Loss:
    """Kills a server under its clients."""
    before, after = server.kill()
    settled = [c for c in crowd.calls() if c.place is not None and c.ended < before]
    last = {call.client: call.place for call in settled}
    holders = frozenset(c for c, place in last.items() if place and place[0] == server.name)
    return Loss(server.name, before, after, holders)


def require_moves(crowd: Crowd, losses: Sequence[Loss]) -> None:
    """Every session moved once for each time it was lost, and its client kept the id."""
    lost = Counter(client for loss in losses for client in loss.holders)
    for client, answered in by_client(crowd.calls()).items():
        places = len(places_of(answered))
        assert places == 1 + lost[client], (client, places, lost[client])
    assert all(len(end["sessions"]) == 1 for end in crowd.ends())


def require_streams(crowd: Crowd, losses: Sequence[Loss]) -> None:
    """Whoever lost a standing stream once has a new one; after two losses the SDK gives up."""
    lost = Counter(client for loss in losses for client in loss.holders)
    without = {end["end"]: lost[end["end"]] for end in crowd.ends() if not end["was_announced"]}
    twice = sum(count > 1 for count in lost.values())
    print(f"  without a stream: {len(without)} clients; {twice} had lost theirs twice", flush=True)
    assert all(count > 1 for count in without.values()), without


def routing_kills() -> None:
    """A server is killed and comes back, another moves: only calls in flight there fail.

    The move: of four targets that are configured from the start the last one, at another loopback
    address, is not there yet; it starts, and the third is killed and never comes back.
    """
    with ExitStack() as stack:
        servers = [stack.enter_context(StickyServer(name)) for name in "ABC"]
        moved = StickyServer("C moved", host="127.0.0.2", port=servers[2].port)
        targets = [server.url for server in (*servers, moved)]
        scene = stack.enter_context(two_proxies(targets))
        options = ["--calls", str(CALLS), "--at-once", "2", "--pause", "0.5", "--slow", "0.3"]
        interpreters = [sys.executable] * 2
        started = time.monotonic()
        crowd = stack.enter_context(Crowd(interpreters, scene.ports, CLIENTS, options))
        wait_until(crowd, everybody_called(CLIENTS, started, 4), "clients have not begun")
        first = kill(servers[0], crowd)
        # Half of those who lost their session are served elsewhere before it is back.
        half = len(first.holders) // 2
        wait_until(crowd, lambda calls: _answered(calls, first) >= half, "nobody moved away")
        servers[0].start()
        back = time.monotonic()
        wait_until(crowd, everybody_called(CLIENTS, back, 4), "not all go on after the restart")
        stack.enter_context(moved)
        second = kill(servers[2], crowd)
        wait_until(crowd, everybody_called(CLIENTS, second.after, 6), "not all go on at last")
        crowd.finish(_PATIENCE)
        report(crowd, scene, time.monotonic() - started)
        judge_kills(crowd, [*servers, moved], [first, second])


def _answered(calls: list[Call], loss: Loss) -> int:
    """How many of the clients that lost their session have had an answer since."""
    return len(
        {
            call.client
            for call in calls
            if call.client in loss.holders and call.place and call.started > loss.after
        }
    )


def judge_kills(crowd: Crowd, servers: Sequence[StickyServer], losses: Sequence[Loss]) -> None:
    """Prints what the kills have done, and fails if it was more than they may do."""
    calls = crowd.calls()
    failed = [call for call in calls if call.place is None]
    in_flight = [call for call in failed if any(loss.interrupted(call) for loss in losses)]
    others = [call for call in failed if call not in in_flight]
    lost = sum(len(loss.holders) for loss in losses)
    began = {server.name: server.began() for server in servers}
    for loss in losses:
        interrupted = [call for call in in_flight if loss.interrupted(call)]
        print(
            f"  {loss.server} killed with {len(loss.holders)} sessions: "
            f"{len(interrupted)} calls in flight failed, {_answered(calls, loss)} of these clients "
            "went on under the same id"
        )
    print(f"  errors: {dict(Counter(call.error for call in in_flight))}")
    for call in others:
        after = [f"{call.started - loss.after:+.3f} s {loss.server}" for loss in losses]
        print(f"  failed and was not in flight: {call} begun {after}")
    print(f"  initialized: {began}: {sum(began.values())} = {CLIENTS} + {lost} lost")
    print(f"  standing streams opened: {sum(end['streams'] for end in crowd.ends())}", flush=True)
    require_streams(crowd, losses)
    assert others == []
    assert sum(began.values()) == CLIENTS + lost
    require_moves(crowd, losses)
    require_memory(calls)

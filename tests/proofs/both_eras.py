"""Legacy sessions and modern calls on one endpoint while workers are killed: nothing crosses."""

from __future__ import annotations

import re
import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from tests.proofs.questions import answer_to, scene_of
from tests.proofs.replicas import Hit, Scene, kill
from tests.proofs.wires import Failed, Heard, Json, Legacy, Modern
from tests.support.waiting import eventually

SESSIONS = 6
MODERN = 8
LISTENERS = 3
ABANDONED = 1000

#: Seconds in which all of them are abandoned, even where much else is done.
ENOUGH = 300.0

STEPS = 3

#: Seconds for which anybody may wait for an answer while no worker is killed.
LONGEST = 20.0

# What can be answered by a server that asks nobody: listeners and what they change have one child.
_ASKED_NOTHING: Json = {}


@dataclass
class Call:
    """One call of a client, with its retries. `owners` are the workers whose servers answered."""

    client: str
    kind: str
    started: float
    ended: float = 0.0
    error: str = ""
    wrong: str = ""
    ports: list[int] = field(default_factory=list)
    owner: int | None = None  # who had the session, or the home, before

    def overlaps(self, hit: Hit) -> bool:
        """Whether it was in flight, or parked, when a worker was killed."""
        return self.started <= hit.end and self.ended >= hit.begin

    def was_held_by(self, hit: Hit) -> bool:
        """Whether it was over a connection to that worker, or at a server of it."""
        held = self.owner == hit.worker or not hit.ports.isdisjoint(self.ports)
        return self.overlaps(hit) and held


class Wrong(Exception):
    """What came was another caller's."""


class Book:
    """Every call, and who holds what. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.calls: list[Call] = []
        self._owners: dict[str, int] = {}

    def owner_of(self, key: str) -> int | None:
        """The worker that was seen to hold a session or a home at last."""
        with self._lock:
            return self._owners.get(key)

    def note(self, key: str, call: Call, owner: int | None) -> None:
        """A call is over."""
        with self._lock:
            self.calls.append(call)
            if owner is not None:
                self._owners[key] = owner


class Client(threading.Thread):
    """A thread that calls until it is told to finish; `key` names its session or its home."""

    def __init__(self, book: Book, name: str, key: str, finish: threading.Event) -> None:
        super().__init__(name=name, daemon=True)
        self.book = book
        self.key = key
        self.finish = finish
        self.failure: BaseException | None = None

    def run(self) -> None:
        try:
            self.live()
        except BaseException as error:
            self.failure = error

    def live(self) -> None:
        """Calls, over and over."""
        number = 0
        while not self.finish.is_set():
            self.step(number)
            number += 1

    def step(self, number: int) -> None:
        """One call."""
        raise NotImplementedError

    def noted(self, kind: str, wire: Modern | Legacy, make: Callable[[str], int | None]) -> Call:
        """Makes a call and notes how it went; `make` returns the worker of the server."""
        call = Call(self.name, kind, time.monotonic(), owner=self.book.owner_of(self.key))
        first, owner = len(wire.ports), None
        try:
            owner = make(secrets.token_hex(8))
        except Wrong as error:
            call.wrong = str(error)
        except Failed as error:
            call.error = str(error)
        call.ended = time.monotonic()
        call.ports = wire.ports[first:]
        self.book.note(self.key, call, owner)
        return call


def require_own(heard: Heard, nonce: str, *, has_progress: bool = False) -> int:
    """The worker whose server answered; raises Wrong where anything was another call's."""
    structured = heard.structured
    if structured.get("nonce") != nonce:
        raise Wrong(f"{structured} came for {nonce}")
    said = [told["params"]["message"] for told in heard.told if "progress" in told["params"]]
    own = [f"{nonce} {number}" for number in range(1, STEPS + 1)] if has_progress else []
    if [each for each in said if each not in own]:
        raise Wrong(f"progress {said} came for {nonce}")
    if said != own:
        raise Failed(f"progress is missing: {said}")
    worker: int = structured["worker"]
    return worker


def require_own_question(asked: Json, nonce: str) -> Json:
    """The answer to our question; raises Wrong where it is another call's."""
    if asked["params"]["message"].split()[0] != nonce:
        raise Wrong(f"{asked} was asked of {nonce}")
    return answer_to(asked, f"yes {nonce}")


def require_own_answers(heard: Heard, nonce: str) -> None:
    """Raises Wrong where the server has heard another client's answer."""
    wanted = {"form": answer_to({"method": "elicitation/create"}, f"yes {nonce}")}
    if (got := heard.structured.get("answers")) != wanted:
        raise Wrong(f"the server of {nonce} heard {got}")


class Session(Client):
    """A legacy client that keeps its session."""

    def __init__(self, book: Book, port: int, number: int, finish: threading.Event) -> None:
        super().__init__(book, f"session-{number}", f"session-{number}", finish)
        self.wire = Legacy(port)

    def live(self) -> None:
        self.open()
        super().live()
        self.wire.close()

    def step(self, number: int) -> None:
        kind = ("plain", "progress", "question")[number % 3]
        made = {"plain": self.plain, "progress": self.progress, "question": self.question}[kind]
        call = self.noted(f"legacy {kind}", self.wire, made)
        if call.error.startswith("404"):
            self.open()

    def open(self) -> None:
        """Gets a session, once more where the worker was killed that was about to give one."""
        is_open = False
        while not (is_open or self.finish.is_set()):
            with suppress(Failed):
                self.wire.open()
                is_open = True

    def plain(self, nonce: str) -> int:
        """A small call."""
        return require_own(self.wire.call("plain", {"nonce": nonce}), nonce)

    def progress(self, nonce: str) -> int:
        """A call that tells how far it is."""
        given = {"nonce": nonce, "seconds": 0.1}
        return require_own(self.wire.call("progress", given, token=nonce), nonce, has_progress=True)

    def question(self, nonce: str) -> int:
        """A call in which the server asks."""
        heard = self.wire.call(
            "question", {"nonce": nonce}, answer=lambda asked: require_own_question(asked, nonce)
        )
        worker = require_own(heard, nonce)
        require_own_answers(heard, nonce)
        return worker


class Caller(Client):
    """A modern client; those without an Authorization share a home."""

    def __init__(self, book: Book, port: int, number: int, finish: threading.Event) -> None:
        authorization = f"Bearer {number}" if number % 2 else None
        super().__init__(book, f"modern-{number}", f"home of {authorization}", finish)
        self.wire = Modern(port, authorization)

    def step(self, number: int) -> None:
        kind = ("plain", "progress", "question")[number % 3]
        made = {"plain": self.plain, "progress": self.progress, "question": self.question}[kind]
        self.noted(f"modern {kind}", self.wire, made)

    def plain(self, nonce: str) -> int:
        """A small call."""
        return require_own(self.wire.call("plain", {"nonce": nonce}), nonce)

    def progress(self, nonce: str) -> int:
        """A call that tells how far it is."""
        given = {"nonce": nonce, "seconds": 0.1}
        return require_own(self.wire.call("progress", given, token=nonce), nonce, has_progress=True)

    def question(self, nonce: str) -> int:
        """A call whose answer is a question, and its retry."""
        given = {"nonce": nonce}
        asking = self.wire.call("question", given)
        if not asking.is_question:
            raise Failed(f"{asking.status} {asking.answer}")
        (key,) = asking.result["inputRequests"]
        answer = require_own_question(asking.result["inputRequests"][key], nonce)
        time.sleep(0.05)
        state = asking.result["requestState"]
        heard = self.wire.call("question", given, state=state, responses={key: answer})
        worker = require_own(heard, nonce)
        require_own_answers(heard, nonce)
        return worker


class Listener(Client):
    """A modern client that listens to a resource of its own, and changes it."""

    def __init__(self, book: Book, port: int, number: int, finish: threading.Event) -> None:
        super().__init__(book, f"listener-{number}", "home of listeners", finish)
        self.wire = Modern(port, "Bearer listener", _ASKED_NOTHING)
        self.other = Modern(port, "Bearer listener", _ASKED_NOTHING)
        self.other.ports = self.wire.ports

    def step(self, number: int) -> None:
        self.noted("modern listen", self.wire, self.listen)

    def listen(self, nonce: str) -> int | None:
        """A stream, until it has told what we have changed."""
        uri = f"demo://{nonce}"
        owners: list[int] = []

        def hear(told: Json) -> bool:
            if told["method"] == "notifications/subscriptions/acknowledged":
                answer = self.other.call("plain", {"nonce": nonce})
                owners.append(require_own(answer, nonce))
                _ = self.other.call("notify", {"kinds": ["updated"], "uri": uri}).result
                return True
            if told["params"].get("uri") != uri:
                raise Wrong(f"{told} came for {uri}")
            return False

        heard = self.wire.listen({"resourceSubscriptions": [uri]}, hear, patience=30.0)
        if heard.answer:
            raise Failed(f"the stream has ended: {heard.answer}")
        time.sleep(0.1)
        return owners[0]


class Abandoner(Client):
    """A modern client that never answers what it is asked."""

    def __init__(self, book: Book, port: int, finish: threading.Event, questions: int) -> None:
        super().__init__(book, "abandoner", "home of abandoner", finish)
        self.wire = Modern(port, "Bearer abandoner")
        self.questions = questions
        self.abandoned = 0

    def step(self, number: int) -> None:
        if self.abandoned >= self.questions:
            self.finish.wait()
            return
        call = self.noted("abandoned", self.wire, self.ask)
        self.abandoned += not call.error

    def ask(self, nonce: str) -> int | None:
        """A call whose answer is a question, and no more."""
        heard = self.wire.call("question", {"nonce": nonce})
        if not heard.is_question:
            raise Failed(f"{heard.status} {heard.answer}")
        (asked,) = heard.result["inputRequests"].values()
        require_own_question(asked, nonce)
        return int(asked["params"]["message"].split()[1])


# --- the run -------------------------------------------------------------------------------------


def both_eras(seconds: float = ENOUGH, questions: int = ABANDONED) -> None:
    """The mixed load; a worker is killed each minute, or each third of a shorter time."""
    with scene_of("proving") as scene:
        book, finish = Book(), threading.Event()
        port = scene.proxy.port
        abandoner = Abandoner(book, port, finish, questions)
        clients: list[Client] = [
            *(Session(book, port, number, finish) for number in range(SESSIONS)),
            *(Caller(book, port, number, finish) for number in range(MODERN)),
            *(Listener(book, port, number, finish) for number in range(LISTENERS)),
            abandoner,
        ]
        begun = time.monotonic()
        for client in clients:
            client.start()
        hits = kill_now_and_then(scene, seconds, begun, clients)
        children = len(scene.proxy.server_pids())
        finish.set()
        for client in clients:
            client.join(90.0)
            assert not client.is_alive(), f"{client.name} does not end"
            assert client.failure is None, (client.name, client.failure)
        report(book, hits, abandoner.abandoned, children, time.monotonic() - begun)
        judge(book, hits)
        assert abandoner.abandoned == questions or seconds < ENOUGH, abandoner.abandoned


def kill_now_and_then(
    scene: Scene, seconds: float, begun: float, clients: Sequence[Client]
) -> list[Hit]:
    """Kills the busiest worker each time; returns when the time is over."""
    pause = min(60.0, seconds / 3)
    hits: list[Hit] = []
    while (left := begun + seconds - time.monotonic()) > 0:
        time.sleep(min(left, pause))
        assert all(client.failure is None for client in clients), [c.failure for c in clients]
        if begun + seconds - time.monotonic() > pause / 2:
            hits.append(kill(scene, scene.busiest()))
            eventually(lambda: len(scene.proxy.worker_pids()) == 4, 30, "no worker in its place")
    return hits


def report(book: Book, hits: Sequence[Hit], abandoned: int, children: int, seconds: float) -> None:
    """The figures."""
    kinds = Counter(call.kind for call in book.calls)
    failed = [call for call in book.calls if call.error]
    print(
        f"{len(book.calls)} calls in {seconds:.0f} s, {len(hits)} workers killed, {abandoned} "
        f"questions abandoned, {children} servers at the end\n"
        f"  {sum(bool(call.wrong) for call in book.calls)} crossed, {len(failed)} failed, of these "
        f"{sum(is_excused(call, hits) for call in failed)} in flight or parked on a killed worker"
    )
    for kind, count in sorted(kinds.items()):
        calls = [call for call in book.calls if call.kind == kind and not call.error]
        quiet = [call for call in calls if not any(call.overlaps(hit) for hit in hits)]
        times = sorted(call.ended - call.started for call in quiet) or [0.0]
        longest = max((call.ended - call.started for call in calls), default=0.0)
        print(
            f"  {kind:<16} {count:6}: p50 {1000 * times[len(times) // 2]:.0f} ms, p99 "
            f"{1000 * times[len(times) * 99 // 100]:.0f} ms, longest {times[-1]:.1f} s "
            f"({longest:.1f} s where a worker was killed meanwhile)"
        )
    errors = Counter(re.sub(r"'id': \d+, ", "", call.error)[:200] for call in failed)
    for error, count in errors.most_common(8):
        print(f"    {count} x {error}", flush=True)


def is_excused(call: Call, hits: Sequence[Hit]) -> bool:
    """Whether a call failed because a worker was killed that held it."""
    return any(call.was_held_by(hit) for hit in hits)


def judge(book: Book, hits: Sequence[Hit]) -> None:
    """Nothing crossed, nothing failed that a killed worker did not hold, nobody was locked out."""
    assert [call for call in book.calls if call.wrong] == []
    lost = [call for call in book.calls if call.error and not is_excused(call, hits)]
    for call in lost[:10]:
        since = [f"{call.started - hit.end:+.3f} s" for hit in hits]
        print(f"  not excused, begun {since} after the kills of {[h.worker for h in hits]}: {call}")
    assert lost == [], f"{len(lost)} calls have failed that no killed worker held"
    late = [
        call
        for call in book.calls
        if call.ended - call.started > LONGEST and not any(call.overlaps(hit) for hit in hits)
    ]
    assert late == [], late[:10]

"""Questions of several modern clients, open at once on one legacy server: nobody gets another's.

Every request comes over a connection of its own, to any of four workers. The clients have no
Authorization and declare the same, so that one home has the calls of all of them.
"""

from __future__ import annotations

import json
import os
import secrets
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.clients.programs import ROOT
from tests.proofs.replicas import LABELLED, Scene
from tests.proofs.wires import Failed, Heard, Json, Modern
from tests.support.proxy_process import ProxyProcess
from tests.support.redis_server import RedisServer

ROUNDS = 20
WORKERS = 4

#: The seconds for which a question is open in the run of expired ones.
SHORT = 2

# What is counted of calls whose requests did not all go the same way: one worker has answered, and
# another, or one has accepted a request and another was passed to it.
_SEVERAL = "of these by several workers, or passed to one"

# What each client calls in a round, by turns: a tool, and its arguments but for the message.
_KINDS: tuple[tuple[str, Json], ...] = (
    ("ask", {"kind": "form"}),
    ("ask", {"kind": "both"}),
    ("chain", {"kind": "form", "rounds": 2}),
    ("ask", {"kind": "sampling"}),
)


def questions(rounds: int = ROUNDS) -> None:
    """Two clients, then eight, then two whose questions expire."""
    for clients in (2, 8):
        with proxied("legacy") as port:
            run(port, clients, rounds)
    with proxied("legacy", input_timeout=str(SHORT)) as port:
        expire(port, 2, max(2, rounds // 5))


@contextmanager
def proxied(server: str, *options: str, workers: int = WORKERS, **settings: str) -> Iterator[int]:
    """The port of a proxy in front of a server of tests/servers, over a Redis of its own."""
    with scene_of(server, *options, workers=workers, **settings) as scene:
        yield scene.proxy.port


@contextmanager
def scene_of(
    server: str, *options: str, workers: int = WORKERS, **settings: str
) -> Iterator[Scene]:
    """The same, with its processes."""
    script = ROOT / "tests" / "servers" / f"{server}.py"
    with RedisServer() as redis:
        environment = {
            "MCP_PROXY_WORKERS": str(workers),
            "MCP_PROXY_REDIS_URL": redis.url,
            "MCP_PROXY_LOG_LEVEL": "warning",
            **{f"MCP_PROXY_{name.upper()}": value for name, value in settings.items()},
        }
        command = [sys.executable, str(script), *options]
        with ProxyProcess(command, environment=environment, way=LABELLED) as proxy:
            try:
                yield Scene(redis, proxy, Path(os.devnull))
            except BaseException as error:
                error.add_note(f"the proxy wrote:\n{proxy.log()[-4000:]}")
                raise
        assert "Traceback" not in proxy.log(), proxy.log()[-6000:]


class Tally:
    """What is counted over all rounds. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []

    def add(self, what: str) -> None:
        """One more of something."""
        with self._lock:
            self.counts[what] += 1

    def require(self, is_right: bool, what: str) -> None:
        """Notes what went wrong."""
        if not is_right:
            with self._lock:
                self.wrong.append(what)

    def require_own(self, is_own: bool, what: str) -> None:
        """Notes what was another client's."""
        if not is_own:
            self.add("crossed")
        self.require(is_own, what)

    def report(self, title: str, seconds: float) -> None:
        """Prints the counts; fails where anything was wrong."""
        shown = ", ".join(f"{count} {what}" for what, count in sorted(self.counts.items()))
        crossed = "" if "crossed" in self.counts else ", 0 crossed"
        print(f"{title} in {seconds:.1f} s: {shown}{crossed}", flush=True)
        for one in self.wrong[:10]:
            print(f"  wrong: {one}")
        assert self.wrong == [], f"{len(self.wrong)} wrong"


# --- one client ----------------------------------------------------------------------------------


class Asked:
    """A call of one client whose question is open. `foreign` has another Authorization."""

    def __init__(self, port: int, tally: Tally, tool: str, arguments: Json) -> None:
        self.wire = Modern(port)
        self.foreign = Modern(port, f"Bearer {secrets.token_hex(8)}")
        self.tally = tally
        self.tool = tool
        self.arguments = arguments
        self.nonce = secrets.token_hex(8)
        self.given: list[Json] = []
        self.used: list[tuple[str, Json]] = []
        self.heard = self.wire.call(tool, arguments)
        # who has answered, and whether another worker had accepted it
        self.ways = {(self.heard.worker, self.heard.was_passed)}

    @property
    def state(self) -> str:
        """The state of the question that is open."""
        state: str = self.heard.result["requestState"]
        return state

    def require_question(self, round_number: int) -> None:
        """The question is that of our call."""
        if not self.heard.is_question:
            self.tally.require(False, f"no question: {self.heard.status} {self.heard.answer}")
            raise Failed("no question")
        wanted = self.arguments.get("message", f"round {round_number}")
        for asked in self.heard.result["inputRequests"].values():
            params = asked["params"]
            said = params.get("message") or params["messages"][0]["content"]["text"]
            self.tally.require_own(said == wanted, f"{said!r} asked in place of {wanted!r}")

    def answers(self) -> Json:
        """Our answers, each with our nonce."""
        return {
            key: answer_to(asked, f"{self.nonce} {len(self.given)}")
            for key, asked in self.heard.result["inputRequests"].items()
        }

    def answer(self) -> None:
        """Calls again with the answers."""
        responses = self.answers()
        self.used.append((self.state, responses))
        self.given.append(responses)
        self.heard = self.retried(self.state, responses)
        self.ways.add((self.heard.worker, self.heard.was_passed))

    def retried(self, state: str, responses: Json, wire: Modern | None = None) -> Heard:
        """The answer to a retry."""
        wire = wire or self.wire
        return wire.call(self.tool, self.arguments, state=state, responses=responses)

    def try_wrong(self, what: str, state: str, wire: Modern | None = None) -> None:
        """A state that is to be refused."""
        intruding = {key: self.intruding(asked) for key, asked in self.open_questions().items()}
        heard = self.retried(state, intruding, wire)
        self.tally.require(
            heard.is_refused_state, f"{what}: {heard.status} {json.dumps(heard.answer)[:400]}"
        )
        if heard.is_refused_state:
            self.tally.add(f"refused ({what})")

    def open_questions(self) -> Json:
        """What is asked now, or was."""
        asked: Json = self.heard.answer.get("result", {}).get("inputRequests", {})
        return asked

    def intruding(self, asked: Json) -> Json:
        """An answer that must never arrive."""
        return answer_to(asked, "intruder")

    def require_own_result(self) -> None:
        """What the tool returns are our answers and nobody else's."""
        text = json.dumps(self.heard.structured)
        nonces = [f"{self.nonce} {number}" for number in range(len(self.given))]
        is_own = bool(self.given) and all(nonce in text for nonce in nonces)
        self.tally.require_own(is_own, f"{self.heard.answer} came for {self.given}")
        self.tally.require("intruder" not in text, f"an intruder was heard: {text}")
        self.tally.add("answered")
        self.tally.add(_SEVERAL if len(self.ways) > 1 else "of these by one way")


def answer_to(asked: Json, text: str) -> Json:
    """A result for a question."""
    if asked["method"] == "sampling/createMessage":
        content = {"type": "text", "text": text}
        return {"role": "assistant", "content": content, "model": "none"}
    return {"action": "accept", "content": {"answer": text}}


def tampered(state: str) -> str:
    """Another state, at one place."""
    at = secrets.randbelow(20) + 1
    return state[:-at] + ("A" if state[-at] != "A" else "B") + state[len(state) - at + 1 :]


# --- rounds --------------------------------------------------------------------------------------


def run(port: int, clients: int, rounds: int) -> None:
    """All clients have a question open at once, in each round; then wrong states, then answers."""
    tally, begun = Tally(), time.monotonic()
    with ThreadPoolExecutor(clients) as pool:
        for number in range(rounds):
            tool, more = _KINDS[number % len(_KINDS)]
            # in every other round the calls are the same, so that only their states differ
            words = [f"round {number} of {n if number % 2 else 'all'}" for n in range(clients)]
            given = [more if tool == "chain" else {**more, "message": it} for it in words]
            asked = together(pool, [opener(port, tally, tool, one) for one in given])
            together(pool, [checker(one, asked) for one in asked])
            together(pool, [answerer(one) for one in asked])
    tally.report(f"{clients} clients, {rounds} rounds", time.monotonic() - begun)
    assert tally.counts["answered"] == clients * rounds, tally.counts
    assert tally.counts[_SEVERAL] > 0, tally.counts


def together(pool: ThreadPoolExecutor, works: list[Callable[[], Any]]) -> list[Any]:
    """Does all at once."""
    return [future.result() for future in [pool.submit(work) for work in works]]


def opener(port: int, tally: Tally, tool: str, given: Json) -> Callable[[], Asked]:
    """Makes a call that is asked about."""

    def work() -> Asked:
        asked = Asked(port, tally, tool, given)
        asked.require_question(1)
        return asked

    return work


def checker(one: Asked, everybody: list[Asked]) -> Callable[[], None]:
    """Tries states that are not the client's own, while its question is open."""
    others = [each for each in everybody if each.arguments != one.arguments]

    def work() -> None:
        one.try_wrong("tampered", tampered(one.state))
        one.try_wrong("foreign", one.state, one.foreign)
        if others:
            one.try_wrong("of another call", secrets.choice(others).state)

    return work


def answerer(one: Asked) -> Callable[[], None]:
    """Answers until there is a result; then once more, which is too late."""

    def work() -> None:
        number = 1
        while one.heard.is_question:
            one.require_question(number)
            one.answer()
            number += 1
            one.tally.require(number < 5, "asked over and over")
            if one.heard.is_question:
                one.try_wrong("used", one.used[-1][0])
        one.require_own_result()
        for state, responses in one.used:
            heard = one.retried(state, responses)
            one.tally.require(heard.is_refused_state, f"used: {heard.answer}")
            one.tally.add("refused (used)")

    return work


def expire(port: int, clients: int, rounds: int) -> None:
    """Questions that are answered too late; what is asked anew is answered."""
    tally, begun = Tally(), time.monotonic()
    with ThreadPoolExecutor(clients) as pool:
        for number in range(rounds):
            given = [{"kind": "form", "message": f"{number} of {n}"} for n in range(clients)]
            late = together(pool, [opener(port, tally, "ask", one) for one in given])
            time.sleep(SHORT + 0.2)
            fresh = together(pool, [opener(port, tally, "ask", one) for one in given])
            for one in late:
                one.try_wrong("expired", one.state)
            together(pool, [answerer(one) for one in fresh])
    tally.report(f"{clients} clients, {rounds} rounds of late answers", time.monotonic() - begun)
    assert tally.counts["refused (expired)"] == clients * rounds, tally.counts
    assert tally.counts["answered"] == clients * rounds, tally.counts

"""A server of the revisions with `initialize` and of no other, on stdio or HTTP.

Standard library only.

    python tests/servers/legacy.py [--ignore-discover | --exit-on-discover] [--roots-first]
                                   [--slow-start SECONDS] [--log-level LEVEL] [--version REVISION]
                                   [--trace FILE] [--page-size N] [--http PORT]

It has the tools of modern.py, and those that only a server with requests of its own can have.
"""

from __future__ import annotations

import os
import queue
import sys
import threading
import time
from itertools import count as numbers
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))  # also where python is started with -I

import over_http
from two_eras import (
    CHANGES,
    INVALID_PARAMS,
    Asking,
    Call,
    Cancelled,
    EraServer,
    Json,
    Refused,
    Send,
    command_line,
    lacking,
    questions,
    told,
)

REVISIONS = ("2024-11-05", "2025-03-26", "2025-06-18", "2025-11-25")
URL_REQUIRED = -32042
NO_RESOURCE = -32002
PATIENCE = 300.0

CAPABILITIES = {
    "tools": {"listChanged": True},
    "prompts": {"listChanged": True},
    "resources": {"listChanged": True, "subscribe": True},
    "logging": {},
    "completions": {},
}


class LegacyServer(EraServer):
    """One client, which initializes, and which is asked by requests."""

    name = "legacy"
    unknown_resource = NO_RESOURCE

    def __init__(self, options: Any) -> None:
        super().__init__(options)
        self.client: Json = {}
        self.level: str | None = options.log_level
        self.watched: set[str] = set()
        self.open: dict[Any, queue.SimpleQueue[Json]] = {}
        self.numbers = numbers(1)
        self.roots: Json | None = None
        self.refused: dict[str, int] = {}
        self.methods |= {
            "initialize": self.initialize,
            "ping": lambda call: {},
            "logging/setLevel": self.set_level,
            "resources/subscribe": self.subscribe,
            "resources/unsubscribe": self.unsubscribe,
        }
        tools = (
            self.ask_late,
            self.ask_later,
            self.exit_while_asking,
            self.url_required,
            self.client_of,
            self.roots_of,
        )
        self.tools |= {tool.__name__: tool for tool in tools}

    # --- requests ---

    def receive(self, message: Json) -> None:
        if message.get("method") == "server/discover":
            self.trace("discover")
            if self.options.exit_on_discover:
                print("unknown method server/discover", file=sys.stderr, flush=True)
                os._exit(4)
            if self.options.ignore_discover:
                return
        super().receive(message)

    def prepare(self, call: Call) -> None:
        needs_client = call.method in self.methods and call.method not in ("initialize", "ping")
        if needs_client and not self.client:
            raise Refused(INVALID_PARAMS, "Received request before initialization was complete")

    def initialize(self, call: Call) -> Json:
        """The handshake."""
        self.client = call.params
        wanted = call.params["protocolVersion"]
        return {
            "protocolVersion": self.options.version
            or (wanted if wanted in REVISIONS else REVISIONS[-1]),
            "capabilities": CAPABILITIES,
            "serverInfo": {"name": self.name, "version": "1"},
            "instructions": "Ask me anything.",
        }

    def receive_notification(self, message: Json) -> None:
        method = message["method"]
        if method == "notifications/roots/list_changed" or (
            method == "notifications/initialized" and self.options.roots_first
        ):
            threading.Thread(target=self.ask_roots, daemon=True).start()

    def ask_roots(self) -> None:
        """A question outside any call, where the client can be asked it."""
        if not lacking(self.client.get("capabilities", {}), questions("roots", "")):
            self.roots = self.put(questions("roots", "")["roots"]).get(timeout=PATIENCE)
            self.trace("roots came")

    def set_level(self, call: Call) -> Json:
        """logging/setLevel."""
        self.level = call.params["level"]
        self.trace(f"level {self.level}")
        return {}

    def log_level(self, call: Call) -> str | None:
        return self.level

    def subscribe(self, call: Call) -> Json:
        """resources/subscribe."""
        if not call.params["uri"].startswith("demo://"):
            raise Refused(NO_RESOURCE, "Resource not found", {"uri": call.params["uri"]})
        self.watched.add(call.params["uri"])
        self.trace(f"subscribed {call.params['uri']}")
        return {}

    def unsubscribe(self, call: Call) -> Json:
        """resources/unsubscribe."""
        self.watched.discard(call.params["uri"])
        self.trace(f"unsubscribed {call.params['uri']}")
        return {}

    def tell_change(self, kind: str, uri: str) -> None:
        method, _ = CHANGES[kind]
        if kind != "updated":
            self.send({"method": method})
        elif uri in self.watched:
            self.send({"method": method, "params": {"uri": uri}})

    # --- questions ---

    def answer_questions(self, call: Call, asking: Asking) -> Json:
        """Sends the questions of a round at once and waits for all answers."""
        try:
            asked = next(asking)
            while True:
                asked = asking.send(self.ask(call, asked))
        except StopIteration as ended:
            result: Json = ended.value
            return result

    def ask(self, call: Call, asked: Json) -> Json:
        """What the client answers: results, and errors under `error`."""
        lacks = lacking(self.client.get("capabilities", {}), asked)
        if lacks and not call.given.get("force"):
            raise Refused(INVALID_PARAMS, "The client cannot be asked this", {"lacks": lacks})
        waiting = {key: self.put(question, send=call.send) for key, question in asked.items()}
        return {key: answer_of(wait_for(call, came)) for key, came in waiting.items()}

    def put(
        self, question: Json, key: str | None = None, send: Send | None = None
    ) -> queue.SimpleQueue[Json]:
        """Sends a question; its answer comes in the queue."""
        key = key or self.next_key()
        params = dict(question["params"])
        if params.get("mode") == "url":
            params["elicitationId"] = f"elicitation-{key}"
        came = self.open[key] = queue.SimpleQueue()
        (send or self.send)({"id": key, "method": question["method"], "params": params})
        return came

    def next_key(self) -> str:
        """The id of our next request."""
        return f"question-{next(self.numbers)}"

    def receive_response(self, message: Json) -> None:
        if (came := self.open.pop(message.get("id"), None)) is None:
            super().receive_response(message)
        else:
            came.put(message)

    # --- tools of its own ---

    def ask_late(self, call: Call) -> Json:
        """Asks, and withdraws the question after `seconds` if there is no answer."""
        key = self.next_key()
        (question,) = questions(call.given.get("kind", "form"), "Too late?").values()
        came = self.put(question, key, call.send)
        try:
            answer = came.get(timeout=call.given.get("seconds", 0.5))
        except queue.Empty:
            self.open.pop(key, None)
            params = {"requestId": key, "reason": "too late"}
            call.send({"method": "notifications/cancelled", "params": params})
            return told("withdrawn")
        return told("answered", answer=answer_of(answer))

    def ask_later(self, call: Call) -> Json:
        """Returns, and asks after `seconds`, when no call is running; `kind` may be ping, too."""

        def speak() -> None:
            time.sleep(call.given.get("seconds", 0.2))
            kind = call.given.get("kind", "form")
            if kind == "ping":
                asked = {"ping": {"method": "ping", "params": {}}}
            else:
                asked = questions(kind, "Is anybody there?")
            for key, question in asked.items():
                answer = self.put(question).get(timeout=PATIENCE)
                self.trace(f"answer {key} {answer_of(answer)}")

        threading.Thread(target=speak, daemon=True).start()
        return told("later")

    def exit_while_asking(self, call: Call) -> Json:
        """Asks, and ends with `code` after `seconds`, whether there is an answer or not."""
        self.put(questions("form", "Shall I go?")["form"], send=call.send)
        call.wait(call.given.get("seconds", 0.3))
        print("going while I ask", file=sys.stderr, flush=True)
        os._exit(call.given.get("code", 5))

    def url_required(self, call: Call) -> Json:
        """Refuses the first `times` calls with this `key` until a page is visited (-32042)."""
        key = call.given.get("key", "")
        with self.lock:
            self.refused[key] = number = self.refused.get(key, 0) + 1
        if number > call.given.get("times", 1):
            self.refused.pop(key)
            return told("authorized", calls=number)
        elicitation = {
            "mode": "url",
            "elicitationId": f"required-{key}-{number}",
            "url": "https://example.com/authorize",
            "message": "Please authorize",
        }
        data = {"elicitations": [elicitation]}
        raise Refused(URL_REQUIRED, "This needs a visit to a page", data)

    def client_of(self, call: Call) -> Json:
        """What the client said in `initialize`."""
        return told("the client", **self.client)

    def roots_of(self, call: Call) -> Json:
        """The roots that came of the question after `initialized`, waited for `seconds`."""
        until = time.monotonic() + call.given.get("seconds", 0)
        while self.roots is None and time.monotonic() < until:
            call.wait(0.02)
        return told("roots", answer=answer_of(self.roots) if self.roots else None)


def wait_for(call: Call, came: queue.SimpleQueue[Json]) -> Json:
    """The answer, unless the call is cancelled."""
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        if call.cancelled.is_set():
            raise Cancelled
        try:
            return came.get(timeout=0.02)
        except queue.Empty:
            continue
    raise Refused(-32603, "No answer came")


def answer_of(message: Json) -> Json:
    """The result, or the error under its name."""
    result: Json = message["result"] if "result" in message else {"error": message["error"]}
    return result


def main() -> None:
    """Runs the server that the options describe."""
    parser = command_line(__doc__)
    parser.add_argument("--ignore-discover", action="store_true")
    parser.add_argument("--exit-on-discover", action="store_true")
    parser.add_argument("--roots-first", action="store_true")
    parser.add_argument("--log-level", help="before the first logging/setLevel; by default none")
    parser.add_argument("--version", help="the revision, whatever the client wants")
    options = parser.parse_args()
    if options.http is None:
        LegacyServer(options).run()
    else:
        over_http.serve(over_http.LegacyEndpoint(lambda: LegacyServer(options)), options)


if __name__ == "__main__":
    main()

"""Many clients of the official Python SDK, 1.x or 2.x, whichever the interpreter has.

    python replica_client.py --ports 8001 --clients 0-50

Each client opens a legacy session with a server of `tests/servers/tally.py` behind the proxy and
calls; every HTTP request has a fresh connection, so that any worker gets it. They go on until
standard input ends. Every call is one line of JSON on standard output, with what has shown that an
answer was not its own and with the HTTP requests it took; and so is each client's end.

The SDK's transport does not survive a connection that breaks. Here such a request is answered by an
error of ours, as a client that is meant to live does, and an answer to the server's question is
sent again, which can do no harm.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from typing import Any

import anyio
from sdk_session import (
    LABEL,
    WAY,
    Json,
    TallyClient,
    call_at_once,
    command_line,
    httpx,
    noted,
    run_crowd,
    say,
    session_at,
)

_PROGRESS_TIME = 2.0
_KINDS = {"plain": 0.6, "progress": 0.2, "sample": 0.2}
_BROKEN = -32098

#: What the server says that got no answer to its question.
UNHEARD = "no answer"


class Noted(httpx.AsyncHTTPTransport):  # type: ignore[misc]
    """Notes for each call which connections its requests took, and who answered.

    A note is a list: the HTTP method, the port on our side, the worker's process id, the status or
    the error, and whether another worker had got the request and passed it.
    """

    def __init__(self) -> None:
        super().__init__(limits=httpx.Limits(max_connections=None, max_keepalive_connections=0))
        self.notes: dict[int, list[list[Any]]] = {}
        self.sessions: set[str] = set()
        self.streams = 0
        self.sent_again = 0

    async def handle_async_request(self, request: Any) -> Any:
        """One request; a broken connection becomes an answer."""
        message = _message_in(request)
        try:
            return await self.noted(request, message)
        except httpx.TransportError as error:
            if "method" in message or not message:
                return _broken(request, message, error)
            self.sent_again += 1
        try:
            return await self.noted(request, message)
        except httpx.TransportError as error:
            return _broken(request, message, error)

    async def noted(self, request: Any, message: Json) -> Any:
        """One request, noted."""
        note: list[Any] = [request.method, None, None, None, False]
        self.notes.setdefault(_number_of(message), []).append(note)

        async def trace(event: str, info: Json) -> None:
            if event == "connection.connect_tcp.complete":
                note[1] = info["return_value"].get_extra_info("client_addr")[1]

        request.extensions = {**request.extensions, "trace": trace}
        if session := request.headers.get("mcp-session-id"):
            self.sessions.add(session)
        try:
            response = await super().handle_async_request(request)
            is_passed = response.headers.get(WAY) == "passed"
            note[2:] = [int(response.headers.get(LABEL, 0)), response.status_code, is_passed]
            if not response.headers.get("content-type", "").startswith("text/event-stream"):
                await response.aread()
        except httpx.TransportError as error:
            note[3] = type(error).__name__
            raise
        if request.method == "GET" and response.status_code == 200:
            self.streams += 1
        return response


def _message_in(request: Any) -> Json:
    message = json.loads(request.content) if request.method == "POST" else {}
    return message if isinstance(message, dict) else {}


def _number_of(message: Json) -> int:
    """The number of the call that a message is about, 0 where it is about none."""
    if message.get("method") == "tools/call":
        return int(message["params"]["arguments"]["number"])
    if "result" in message and "content" in message["result"]:
        return int(message["result"]["content"]["text"].split()[-1])
    return 0


def _broken(request: Any, message: Json, error: Exception) -> Any:
    """What the SDK is given in place of a connection's failure."""
    text = f"the connection to the proxy broke ({type(error).__name__})"
    body = {"jsonrpc": "2.0", "error": {"code": _BROKEN, "message": text}}
    return httpx.Response(502, json={**body, "id": message.get("id")}, request=request)


class Client(TallyClient):
    """One client."""

    def __init__(self, number: int, given: argparse.Namespace) -> None:
        super().__init__("session", number, given)
        self.http = Noted()

    async def live(self, finish: anyio.Event) -> None:
        """The client's whole life; its last line says how it was."""
        async with session_at(
            self.given.ports[0], self.http, sampling_callback=self.answer, client_info=self.about
        ) as session:
            while not finish.is_set():
                await call_at_once(self.given, lambda: self.call(session))
        say(
            end=self.number,
            sessions=sorted(self.http.sessions),
            streams=self.http.streams,
            sent_again=self.http.sent_again,
            strange=self.strange,
        )

    async def call(self, session: Any) -> None:
        """One call and its line."""
        number = self.next_number()
        kind = random.choices(list(_KINDS), list(_KINDS.values()))[0]
        line: Json = {"client": self.number, "call": number, "kind": kind, "token": self.token}
        async with noted(line, self.given.call_time):
            line |= await self.answered(session, kind, number)
        say(**line, requests=self.http.notes.pop(number, []))

    async def answered(self, session: Any, kind: str, number: int) -> Json:
        """Makes the call; raises Wrong if anything that came was another one's."""
        heard: list[str] = []
        complete = anyio.Event()

        async def hear(progress: float, total: float | None, message: str | None) -> None:
            heard.append(str(message))
            if len(heard) >= self.steps:
                complete.set()

        slow = random.random() < self.given.slow
        seconds = random.uniform(0.2, 1.0) if slow else 0.0
        arguments = {"token": self.token, "number": number, "seconds": seconds}
        more = {"progress_callback": hear} if kind == "progress" else {}
        result = await session.call_tool(kind, arguments, **more)
        ended = time.monotonic()
        answer = json.loads(result.content[0].text)
        if answer.get("said") == UNHEARD:
            raise RuntimeError("the answer to the server's question did not reach it")
        self.require_own_answer(kind, number, answer)
        if kind == "progress":
            with anyio.move_on_after(_PROGRESS_TIME):
                await complete.wait()
        self.require_own_progress(kind, number, heard)
        return {
            "pid": answer["pid"],
            "owner": answer["worker"],
            "ended": ended,
            "seconds": seconds,
        }


if __name__ == "__main__":
    given = command_line("Many MCP clients at once", at_once=1, pause=0.5, slow=0.0, call_time=60.0)
    run_crowd(lambda number, given, finish: Client(number, given).live(finish), given)

"""An HTTP MCP server that misbehaves in every way that bytes allow, where it is asked to.

The header `X-Hell` of a request names one of `HELLS`; without it the server is a decent one.
`python -m tests.proofs.hell` serves until standard input ends.
"""

from __future__ import annotations

import gzip
import itertools
import json
import random
import sys
import time

from tests.servers.http_backend import Act, HttpBackend, Leave, Turn, raw, reply, stream, turn_wait

_DRIP = 0.2  # seconds between two bytes
_WAVE = 0.001  # seconds between two pieces of what has no end

_JSON = "Content-Type: application/json"
_OK = b"HTTP/1.1 200 OK\r\n"
_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
_EVENTS = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
_LOST = b'{"jsonrpc":"2.0","id":1,"error":{"code":-32001,"message":"Session not found"}}'

# --- the ways ------------------------------------------------------------------------------------


def drip(before: bytes, drops: bytes) -> Act:
    """`before`, then a byte of `drops` now and then, for ever."""

    def act(turn: Turn) -> None:
        turn.send(before)
        for drop in itertools.cycle(drops):
            time.sleep(_DRIP)
            turn.send(bytes([drop]))

    return act


def flood(before: bytes, wave: bytes) -> Act:
    """`before`, then `wave` for ever."""

    def act(turn: Turn) -> None:
        turn.send(before)
        while not turn.backend.is_stopping:
            turn.send(wave)
            time.sleep(_WAVE)

    return act


def then_silent(data: bytes) -> Act:
    """Some bytes, and not one more."""

    def act(turn: Turn) -> None:
        turn.send(data)
        turn.wait_until_gone()

    return act


def then_reset(data: bytes) -> Act:
    """Some bytes, and RST."""

    def act(turn: Turn) -> None:
        turn.send(data)
        time.sleep(0.05)
        turn.reset()

    return act


def answered(*lines: bytes) -> Act:
    """The right answer to whatever was asked, with these lines in its head."""

    def act(turn: Turn) -> None:
        message = turn.seen.json or {}
        version = message.get("params", {}).get("protocolVersion", "2025-06-18")
        result = {"protocolVersion": version, "capabilities": {}, "serverInfo": {}}
        body = json.dumps({"jsonrpc": "2.0", "id": message.get("id"), "result": result}).encode()
        head = b"\r\n".join([_HEAD[:-2], *lines, b"Content-Length: %d" % len(body)])
        turn.send(head + b"\r\n\r\n" + body)

    return act


def bomb(status: int, content_type: str) -> Act:
    """A small body that would be a gigabyte if somebody unpacked it."""
    body = gzip.compress(bytes(2**20)) * 1024
    return reply(status, body, f"Content-Type: {content_type}", "Content-Encoding: gzip")


def by_turns(*places: str) -> Act:
    """Redirects from one place to the next."""

    def act(turn: Turn) -> None:
        at = places.index(turn.seen.target) if turn.seen.target in places else -1
        turn.reply(307, b"", f"Location: {places[(at + 1) % len(places)]}")

    return act


def _reset_at_once(turn: Turn) -> None:
    turn.reset()


def _close_at_once(turn: Turn) -> None:
    raise Leave


def _surplus(turn: Turn) -> None:
    """An answer that is longer than it says, by what looks like the next answer."""
    forged = b'{"jsonrpc":"2.0","id":1,"result":{"forged":true}}'
    head = _HEAD + b"Mcp-Session-Id: forged\r\nContent-Length: %d\r\n\r\n"
    turn.send(head % 2 + b"{}" + head % len(forged) + forged)


_CHUNKED = _HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
_CHUNKED_EVENTS = _EVENTS + b"Transfer-Encoding: chunked\r\n\r\n"

SILENT: dict[str, Act] = {
    "silent": turn_wait,  # type: ignore[dict-item]
    "silent in the head": then_silent(_OK + b"Content-"),
    "silent behind the head": then_silent(_HEAD + b"Content-Length: 100\r\n\r\n"),
    "silent in a chunk": then_silent(_CHUNKED + b'20\r\n{"jsonrpc"'),
    "silent in an event": then_silent(_CHUNKED_EVENTS + b"5\r\ndata:\r\n"),
    "closes at once": _close_at_once,
    "resets at once": _reset_at_once,
    "resets in the head": then_reset(_OK + b"Content-"),
    "resets in the body": then_reset(_HEAD + b'Content-Length: 100\r\n\r\n{"js'),
    "resets in a chunk": then_reset(_CHUNKED + b'20\r\n{"jsonrpc"'),
    "resets in an event": then_reset(_CHUNKED_EVENTS + b"5\r\ndata:\r\n"),
    "resets behind an id": then_reset(_CHUNKED_EVENTS + b"e\r\nid: 1\ndata: \n\n\r\n"),
}

DRIPPING: dict[str, Act] = {
    "drips the status line": drip(b"HTTP/1.1 2", b"0"),
    "drips the head": drip(_OK + b"X-Drops: ", b"x"),
    "drips header lines": drip(_OK, b"X: y\r\n"),
    "drips a body": drip(_HEAD + b"Content-Length: 100000\r\n\r\n", b" "),
    "drips chunks": drip(_CHUNKED, b"1\r\n \r\n"),
    "drips an event": drip(_EVENTS + b"Connection: close\r\n\r\ndata: ", b"x"),
    "drips comments": drip(_EVENTS + b"Connection: close\r\n\r\n", b": x\n\n"),
    "drips a lost session": drip(
        b"HTTP/1.1 404 Not Found\r\nContent-Type: application/json\r\nContent-Length: 9999\r\n\r\n",
        b" ",
    ),
    "drips 1xx": drip(b"", b"HTTP/1.1 103 Early\r\nLink: x\r\n\r\n"),
}

LYING: dict[str, Act] = {
    "says too much": raw(_HEAD + b"Content-Length: 1000\r\n\r\n{}"),
    "says too much, stays": then_silent(_HEAD + b"Content-Length: 1000\r\n\r\n{}"),
    "says too little": _surplus,
    "length below zero": raw(_HEAD + b"Content-Length: -1\r\n\r\n{}"),
    "length in words": raw(_HEAD + b"Content-Length: two\r\n\r\n{}"),
    "length beyond measure": raw(_HEAD + b"Content-Length: " + b"9" * 400 + b"\r\n\r\n{}"),
    "two lengths": raw(_HEAD + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}"),
    "length and chunks": raw(_CHUNKED[:-2] + b"Content-Length: 2\r\n\r\n2\r\n{}\r\n0\r\n\r\n"),
    "chunk size in words": raw(_CHUNKED + b"two\r\n{}\r\n0\r\n\r\n"),
    "chunk below zero": raw(_CHUNKED + b"-2\r\n{}\r\n0\r\n\r\n"),
    "chunk beyond measure": raw(_CHUNKED + b"f" * 16 + b"\r\n{}\r\n0\r\n\r\n"),
    "chunk without its end": raw(_CHUNKED + b"2\r\n{}0\r\n\r\n"),
    "chunks without an end": raw(_CHUNKED + b"2\r\n{}\r\n"),
    "unknown coding": raw(_HEAD + b"Transfer-Encoding: rot13\r\n\r\n{}"),
    "a body with 204": raw(b"HTTP/1.1 204 No Content\r\nContent-Length: 2\r\n\r\n{}"),
    "a body with 304": raw(b"HTTP/1.1 304 Not Modified\r\nContent-Length: 2\r\n\r\n{}"),
}

HEADS: dict[str, Act] = {
    "control character": answered(b"X-Bad: a\x01b"),
    "NUL": answered(b"X-Bad: a\x00b"),
    "folded": answered(b"X-Bad: a", b" b"),
    "no colon": answered(b"X-Bad a"),
    "blank in a name": answered(b"X-Powered By: PHP"),
    "blank before the colon": answered(b"X-Bad : a"),
    "no name": answered(b": a"),
    "bare CR": answered(b"X-Bad: a\rb"),
    "bare LF": answered(b"X-Bad: a\nX-More: b"),
    "not ASCII": answered(b"X-Bad: \xff\xfe", b"X-\xc3\xa4: b"),
    "session id not ASCII": answered(b"Mcp-Session-Id: \xff"),
    "session id empty": answered(b"Mcp-Session-Id:"),
    "session id of 60 KB": answered(b"Mcp-Session-Id: " + b"x" * 60_000),
    "two session ids": answered(b"Mcp-Session-Id: a", b"Mcp-Session-Id: b"),
    "hop by hop": answered(b"Connection: x-a, close", b"X-A: b", b"Upgrade: h2c", b"TE: trailers"),
    "garbage": raw(random.Random(1).randbytes(5000)),
    "lines of garbage": raw(b"hello\r\n" * 100),
    "HTTP/0.9": raw(b'{"jsonrpc":"2.0","id":1,"result":{}}'),
    "HTTP/9.9": raw(b"HTTP/9.9 200 OK\r\nContent-Length: 0\r\n\r\n"),
    "no status": raw(b"HTTP/1.1\r\nContent-Length: 0\r\n\r\n"),
    "status in words": raw(b"HTTP/1.1 OK 200\r\nContent-Length: 0\r\n\r\n"),
    "status 99": raw(b"HTTP/1.1 99 Low\r\nContent-Length: 0\r\n\r\n"),
    "status 600": raw(b"HTTP/1.1 600 High\r\nContent-Length: 0\r\n\r\n"),
    "status 999": raw(b"HTTP/1.1 999 Higher\r\nContent-Length: 0\r\n\r\n"),
    "status of four digits": raw(b"HTTP/1.1 2000 OK\r\nContent-Length: 0\r\n\r\n"),
    "switches protocols": then_silent(
        b"HTTP/1.1 101 Go\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n"
    ),
    "a reason that lies": raw(b"HTTP/1.1 200 \x00\xff\x7f\r\nContent-Length: 0\r\n\r\n"),
}

ENDLESS: dict[str, Act] = {
    "endless status line": flood(b"HTTP/1.1 200 ", b"x" * 4096),
    "endless header": flood(_OK + b"X-Long: ", b"x" * 4096),
    "endless headers": flood(_OK, b"X-More: x\r\n" * 100),
    "endless 1xx": flood(b"", b"HTTP/1.1 102 Processing\r\n\r\n"),
    "endless 1xx with headers": flood(b"HTTP/1.1 103 Early\r\n", b"Link: </x>\r\n" * 50),
    "endless chunk size": flood(_CHUNKED, b"0" * 4096),
    "endless chunk extension": flood(_CHUNKED + b"2;", b"x" * 4096),
    "endless trailers": flood(_CHUNKED + b"2\r\n{}\r\n0\r\n", b"X-More: x\r\n" * 100),
    "endless body": flood(_HEAD + b"Connection: close\r\n\r\n[", b"1," * 8192),
    "endless lost session": flood(
        b"HTTP/1.1 404 Not Found\r\nContent-Type: application/json\r\nConnection: close\r\n\r\n",
        b" " * 8192,
    ),
    "endless event": flood(_EVENTS + b"Connection: close\r\n\r\ndata: ", b"x" * 8192),
    "endless event of lines": flood(_EVENTS + b"Connection: close\r\n\r\n", b"data: x\n" * 1024),
    "endless comments": flood(_EVENTS + b"Connection: close\r\n\r\n", b": x\n\n" * 1024),
    "deep JSON": reply(200, b"[" * 10**6 + b"]" * 10**6, _JSON),
    "deep lost session": reply(404, b"[" * 10**6 + b"]" * 10**6, _JSON),
}

REST: dict[str, Act] = {
    "redirects to itself": by_turns("/mcp"),
    "redirects in a circle": by_turns("/mcp", "/mcp/", "/other"),
    "redirects elsewhere": reply(308, b"", "Location: http://127.0.0.2:1/mcp"),
    "redirects nowhere": reply(307, b"", "Location:"),
    "redirects to nonsense": reply(307, b"", "Location: http://[::1/\x7f@:99999/"),
    "redirects to a file": reply(307, b"", "Location: file:///etc/passwd"),
    "redirects without a place": reply(307),
    "gzip bomb": bomb(200, "application/json"),
    "gzip bomb of events": bomb(200, "text/event-stream"),
    "gzip bomb of a lost session": bomb(404, "application/json"),
    "always a lost session": reply(404, _LOST, _JSON),
    "never a valid session": reply(400, b"No valid session ID", "Content-Type: text/plain"),
    "breaks off an event stream": stream(b"data: {}\n\n", framing="close"),
    "events of another call": stream(b'data: {"jsonrpc":"2.0","id":77,"result":{}}\n\n'),
    "not JSON": reply(200, b"\xff\xfe{", _JSON),
    "a page": reply(200, b"<html>", "Content-Type: text/html"),
    "500": reply(500, b"oops"),
}

HELLS = {**SILENT, **DRIPPING, **LYING, **HEADS, **ENDLESS, **REST}

#: Event streams in which something comes again and again: who wants may listen for ever.
ALIVE = {"drips comments", "drips an event", "endless comments"}

#: A body of JSON that breaks off in these ways has no proper end for the client either.
BROKEN = {"resets in the body", "resets in a chunk", "says too much", "chunks without an end"}


class Hell(HttpBackend):
    """A decent server, but for requests that name a way."""

    def _answer(self, turn: Turn) -> None:
        way = turn.seen.header("X-Hell")
        if way is None:
            super()._answer(turn)
        else:
            HELLS[way](turn)


if __name__ == "__main__":
    with Hell() as hell:
        print(f"{hell.url}/mcp", flush=True)
        sys.stdin.read()

"""A server of a group that means no good harms only itself: two others are called all the while.

It lies about names, resources, ids, tokens and itself, lists without end, floods, refuses with a
challenge. What the client sees of the two good ones is what it sees without it, as fast.
"""

from __future__ import annotations

import http.client
import itertools
import json
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

from tests.proofs.hostile import SLOWER, Repeated, during, quantile
from tests.proofs.worker import footprint
from tests.support.front import Answer, HttpFront, McpClient
from tests.support.proxy_process import ProxyProcess
from tests.support.startable import ServerThread
from tests.support.waiting import eventually

Json = dict[str, Any]

_SERVERS = Path(__file__).resolve().parents[1] / "servers"
_MEMBER, _HOSTILE = _SERVERS / "member.py", _SERVERS / "hostile_member.py"

#: What the good servers have; `note://hidden` is linked to and listed by nobody.
SAME, OWN = "note://same", "two-own://x"
GOOD = ("one", "two")

#: MB that the worker may have more among hostile servers than before, and afterwards.
MORE_AMONG, MORE_AFTER = 96.0, 32.0

#: Seconds in which the first list of a group with them is there (20 are waited, at the most).
FIRST_LIST = 22.0

# How often they list everything once more, so that what is kept of it would add up.
_AGAIN = 4

_CALLERS = 4
_FLOOD = 100  # list_changed of three kinds a second, in each session

# Those that are hostile to the worker as soon as they are asked for their lists, and why.
_LISTING = {
    "many": ("--tools", "100000"),
    "endless": ("--endless",),
    "large": ("--resources", "4900"),
}

_NAMES = ("one", "one__who", "who", "two__who", "one__", "__who", "_", "two", "ä.b:c", "x" * 90)
_URIS = (SAME, OWN, f"one+{SAME}", f"two+{SAME}", "note://hidden", "ui://one/page")


class _Challenging(BaseHTTPRequestHandler):
    """An HTTP server that wants everybody to log in elsewhere."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(401)
        self.send_header("WWW-Authenticate", 'Bearer resource_metadata="http://127.0.0.1/evil"')
        self.send_header("Set-Cookie", "session=evil")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_DELETE = do_POST

    def log_message(self, *_: object) -> None:
        """Says nothing."""


def _entry(script: Path, *options: str) -> Json:
    return {"command": sys.executable, "args": ["-I", "-S", str(script), *options]}


def _lies() -> list[str]:
    names = [part for name in _NAMES for part in ("--name", name)]
    return [*names, *(part for uri in _URIS for part in ("--uri", uri))]


@contextmanager
def scene() -> Iterator[ProxyProcess]:
    """One worker in front of two good servers, alone and among others."""
    with tempfile.TemporaryDirectory(prefix="proof-") as folder, ServerThread(_Challenging) as shut:
        servers: Json = {
            "one": _entry(_MEMBER, "--name", "A", "--resource", SAME, "--tool", "ask-later"),
            "two": _entry(_MEMBER, "--name", "B", "--resource", SAME, "--resource", OWN),
            "false": _entry(_HOSTILE, *_lies()),
            "shut": {"url": f"http://127.0.0.1:{shut.port}/mcp"},
        }
        for name, options in _LISTING.items():
            servers[name] = _entry(_HOSTILE, *_lies(), *options)
        bare = {"server": "false", "prefix": ""}
        groups: Json = {
            "quiet": {"members": GOOD},
            "every": {"members": [*GOOD, "false", "shut", *_LISTING]},
            "calls": {"members": [*GOOD, "false", "shut", "large"]},
            "bare": {"members": [*GOOD, bare]},
            "first": {"members": ["false", *GOOD]},
        }
        file = Path(folder, "servers.json")
        file.write_text(json.dumps({"mcpServers": servers, "groups": groups}))
        options = ["--config", str(file), "--threads", "32", "--log-level", "error"]
        with ProxyProcess(options=options) as process:
            try:
                yield process
            except BaseException as error:
                error.add_note(f"the proxy wrote:\n{process.log()[-4000:]}")
                raise


class Client(McpClient):
    """A session of a group, whose client answers questions."""

    def __init__(self, process: ProxyProcess, group: str) -> None:
        super().__init__(HttpFront(process.base), f"/groups/{group}/mcp")
        params = {
            "protocolVersion": "2025-11-25",
            "capabilities": {"elicitation": {}},
            "clientInfo": {"name": "proof", "version": "1"},
        }
        message = {"jsonrpc": "2.0", "id": 0, "method": "initialize", "params": params}
        answer = self.post(message)
        self.session = answer.headers.get("Mcp-Session-Id")
        self.instructions = answer.message()["result"].get("instructions", "")
        self.notify("notifications/initialized").body()

    def tool(self, name: str, arguments: Json | None = None, **more: Any) -> Answer:
        """A call, as its answer comes."""
        params = {"name": name, "arguments": arguments or {}, **more}
        return self.call("tools/call", params)

    def text(self, name: str, arguments: Json | None = None) -> str:
        """The first text that a tool says."""
        said: str = self.tool(name, arguments).message()["result"]["content"][0]["text"]
        return said

    def names(self, method: str = "tools/list") -> list[str]:
        """The names, or URIs, that a list has."""
        (entries,) = (v for k, v in self.result(method).items() if isinstance(v, list))
        return [each.get("uri") or each.get("uriTemplate") or each["name"] for each in entries]

    def read(self, uri: str) -> str:
        """The text of a resource."""
        (content,) = self.result("resources/read", {"uri": uri})["contents"]
        assert content["uri"] == uri, content
        text: str = content["text"]
        return text


class GoodCaller(Repeated):
    """A session whose client calls the two good servers, and reads what they have."""

    def __init__(self, process: ProxyProcess, group: str) -> None:
        super().__init__(0.02)
        self.client = Client(process, group)
        self._path = self.client.path
        self._connection = http.client.HTTPConnection("127.0.0.1", process.port, timeout=60)
        self._numbers = itertools.count()
        self._calls = dict.fromkeys(GOOD, 0)
        self._pids: dict[str, int] = {}

    def act(self) -> str:
        number = next(self._numbers)
        if number % 4 == 3:
            return self._read(*((SAME, "A"), (f"two+{SAME}", "B"), (OWN, "B"))[number // 4 % 3])
        name = GOOD[number % 2]
        params = {"name": f"{name}__who", "arguments": {}}
        answer = self._ask("tools/call", {**params, "_meta": {"progressToken": "token"}})
        self._calls[name] += 1
        told = json.loads(answer["result"]["content"][0]["text"])
        pid = self._pids.setdefault(name, told["pid"])
        expected = {"name": "AB"[GOOD.index(name)], "calls": self._calls[name], "pid": pid}
        wrong = {key: told[key] for key in expected if told[key] != expected[key]}
        return f"{name}: {wrong}, expected {expected}" if wrong else ""

    def _read(self, uri: str, owner: str) -> str:
        answer = self._ask("resources/read", {"uri": uri})
        text = answer["result"]["contents"][0]["text"]
        expected = f"{owner} has {SAME if SAME in uri else uri}"
        return "" if text == expected else f"{uri}: {text!r}, expected {expected!r}"

    def _ask(self, method: str, params: Json) -> Json:
        message = {"jsonrpc": "2.0", "id": 1, "method": method, "params": params}
        headers = {
            "Mcp-Session-Id": self.client.session or "",
            "Accept": "application/json, text/event-stream",
            "Content-Type": "application/json",
        }
        self._connection.request("POST", self._path, json.dumps(message), headers)
        response = self._connection.getresponse()
        body = response.read()
        if not body.startswith(b"{"):
            events = [line[5:] for line in body.splitlines() if line.startswith(b"data:")]
            told = [json.loads(each) for each in events if each.strip()]
            strange = [each for each in told if "method" in each]
            if strange:
                return {"result": {"contents": [{"text": strange}]}} if "uri" in params else {}
            body = events[-1]
        answer: Json = json.loads(body)
        return answer

    def close(self) -> None:
        super().close()
        self._connection.close()
        self.client.delete().body()


# --- what is shown -------------------------------------------------------------------------------


def groups_hostile(seconds: float = 30.0) -> None:
    """What the client sees of the good ones is the same, calls are as fast, memory is bounded."""
    with scene() as process:
        (worker,) = process.worker_pids()
        quiet = Client(process, "quiet")
        expected = {method: quiet.names(method) for method in ("tools/list", "resources/list")}
        lists(process, expected)
        before = footprint(worker)
        names_and_uris(process, expected)
        first_in_the_order(process)
        questions(process)
        progress_and_updates(process)
        challenges(process)
        calls(process, worker, seconds)
        for _ in range(_AGAIN):
            lists(process, expected)
        quiet.delete().body()
        after = footprint(worker)
        print(f"  before {before}\n  after  {after}", flush=True)
        assert after.memory - before.memory < MORE_AFTER, "the worker has kept too much"


def lists(process: ProxyProcess, expected: dict[str, list[str]]) -> None:
    """The first list has all of the good ones, and says who is missing."""
    for name in ("every", "calls"):
        begun = time.monotonic()
        client = Client(process, name)
        listed = client.result("tools/list")
        took = time.monotonic() - begun
        tools = [each["name"] for each in listed["tools"]]
        missing = listed.get("_meta", {}).get("mcp-wsgi-proxy/missing", {})
        print(f"  {name}: {len(tools)} tools after {took:.1f} s; missing: {missing}", flush=True)
        good = [each for each in tools if each.startswith(("one__", "two__"))]
        assert good == expected["tools/list"], good
        assert took < FIRST_LIST, took
        assert set(missing) <= {"shut", *_LISTING}, missing
        assert "shut" in missing
        if name == "every":
            assert "many" in missing, "a hundred thousand tools are in no list"
        again = time.monotonic()
        client.names()
        print(f"  {name}: once more {1000 * (time.monotonic() - again):.0f} ms", flush=True)
        client.delete().body()


def names_and_uris(process: ProxyProcess, expected: dict[str, list[str]]) -> None:
    """Every name and URI of the good ones leads to them, and none of the hostile one's does."""
    for group in ("calls", "bare"):
        client = Client(process, group)
        tools, uris = client.names(), client.names("resources/list")
        assert [one for one in tools if one.startswith(("one__", "two__"))] == expected[
            "tools/list"
        ]
        assert uris[: len(expected["resources/list"])] == expected["resources/list"], uris[:6]
        owners = {uri: client.read(uri) for uri in uris[:10]}
        good = {uri: owner[:1] for uri, owner in owners.items() if owner != "hostile"}
        print(f"  {group}: {len(tools)} tools; of the good ones {good}", flush=True)
        assert good == {SAME: "A", f"two+{SAME}": "B", OWN: "B"}
        links = client.tool("false__link" if group == "calls" else "link").message()
        shown = [part["uri"] for part in links["result"]["content"][1:]]
        assert len(shown) == len(_URIS)
        for uri in shown:
            assert client.read(uri) == "hostile", f"a link of the hostile one leads to {uri}"
        link = client.tool("two__link").message()["result"]["content"][0]["uri"]
        assert client.read(link).startswith("B has"), link
        headings = [
            line for line in client.instructions.splitlines() if line.startswith(("# one", "# two"))
        ]
        assert headings == ["# one", "# two"], headings
        client.delete().body()


def first_in_the_order(process: ProxyProcess) -> None:
    """One that is trusted most takes URIs, as it says; what the good ones show still is theirs."""
    client = Client(process, "first")
    for name, owner in (("one", "A"), ("two", "B")):
        assert json.loads(client.text(f"{name}__who"))["name"] == owner
        link = client.tool(f"{name}__link").message()["result"]["content"][0]["uri"]
        assert client.read(link) == f"{owner} has {SAME}", link
    owners = {uri: client.read(uri) for uri in client.names("resources/list")[-3:]}
    assert [text[:1] for text in owners.values()] == ["A", "B", "B"], owners
    client.delete().body()


def questions(process: ProxyProcess) -> None:
    """A question says whose it is, and an answer goes to who has asked."""
    client = Client(process, "calls")
    good = client.tool("one__ask").stream()
    asked_by_one = next(good)
    bad = client.tool("false__ask").stream()
    asked_by_false = next(each for each in bad if each.get("method") == "elicitation/create")
    said = asked_by_one["params"]["message"], asked_by_false["params"]["message"]
    print(f"  questions: {said}, ids {asked_by_one['id']} and {asked_by_false['id']}", flush=True)
    assert said == ("one: Is it A?", "false: one: the password?")
    assert asked_by_one["id"] != asked_by_false["id"]
    client.text("large__link")  # cancels, answers and reports on everything, once more
    for asked, content in ((asked_by_false, {"from": "false"}), (asked_by_one, {"from": "one"})):
        result = {"action": "accept", "content": content}
        client.post({"jsonrpc": "2.0", "id": asked["id"], "result": result}).body()
    told = list(_until_answer(good))
    assert len(told) == 1, f"somebody spoke on a call of another: {told}"
    answer = json.loads(told[0]["result"]["content"][0]["text"])
    assert answer["content"] == {"from": "one"}, answer
    last = list(_until_answer(bad))[-1]
    assert last["result"]["content"][0]["text"] == "answered"
    client.delete().body()


def progress_and_updates(process: ProxyProcess) -> None:
    """Who has a stream hears nothing in the name of a good one."""
    client = Client(process, "calls")
    told: list[Json] = []
    stream = client.listen()
    call = client.tool("one__ask", _meta={"progressToken": "token"})
    for answer in (stream, call):
        threading.Thread(target=_collect, args=(answer, told), daemon=True).start()
    asked = eventually(lambda: _first(told, "elicitation/create"), 30, "nobody has asked")
    heard = [*client.tool("false__link", _meta={"progressToken": 19}).messages()]
    client.text("two__grow")  # is told of on the stream, after all that
    eventually(lambda: _first(told, "notifications/tools/list_changed"), 10, "nothing has changed")
    result = {"action": "decline"}
    client.post({"jsonrpc": "2.0", "id": asked["id"], "result": result}).body()
    eventually(lambda: [each for each in told if "result" in each], 30, "the call has no answer")
    stream.close()
    heard += told
    progress = {each["params"]["progressToken"] for each in heard if "progress" in _method(each)}
    updated = {each["params"]["uri"] for each in heard if "updated" in _method(each)}
    loggers = {each["params"]["logger"] for each in heard if "message" in _method(each)}
    cancelled = [each["params"]["requestId"] for each in heard if "cancelled" in _method(each)]
    print(f"  heard progress of {progress}, updates of {sorted(updated)}", flush=True)
    assert progress <= {19}, f"progress of calls of others: {progress}"
    good = {SAME, OWN, f"two+{SAME}"}
    assert updated, "nothing was heard"
    assert not updated & good, f"resources of others have changed: {updated & good}"
    assert all(each == "false" or each.startswith("false/") for each in loggers), loggers
    assert asked["id"] not in cancelled
    client.delete().body()


def _first(told: Sequence[Json], method: str) -> Json:
    return next((each for each in list(told) if each.get("method") == method), {})


def _method(message: Json) -> str:
    method: str = message.get("method", "")
    return method


def _collect(stream: Answer, told: list[Json]) -> None:
    try:
        for message in stream.stream():
            told.append(message)
    except Exception:  # the stream was closed
        return


def _until_answer(messages: Iterator[Json]) -> Iterator[Json]:
    for message in messages:
        yield message
        if "method" not in message:
            return


def challenges(process: ProxyProcess) -> None:
    """A challenge is an error of the call, and nobody is sent elsewhere to log in."""
    client = Client(process, "calls")
    answer = client.tool("shut__anything")
    message = answer.message()
    told = {name.lower() for name in answer.headers}
    print(f"  the one that refuses: {answer.status} {message['error']}", flush=True)
    assert answer.status == 200, answer
    assert message["error"]["code"] == -32000
    assert message["error"]["message"].startswith("shut: ")
    assert not told & {"www-authenticate", "set-cookie"}, told
    assert "evil" not in json.dumps(message)
    client.delete().body()


def calls(process: ProxyProcess, worker: int, seconds: float) -> None:
    """The good ones are as fast as in a quiet run, while the others do what they can."""
    with ExitStack() as stack:
        quiet = [stack.enter_context(GoodCaller(process, "quiet")) for _ in range(_CALLERS)]
        times = {"quiet": _measured(quiet, seconds / 2)}
        stack.close()
        before = footprint(worker)
        among = [stack.enter_context(GoodCaller(process, "calls")) for _ in range(_CALLERS)]
        for each in among:
            for name in ("false", "large"):
                each.client.text(f"{name}__flood", {"a_second": _FLOOD, "seconds": seconds + 5})
        hostile = stack.enter_context(HostileCaller(process))
        times["hostile"] = _measured(among, seconds)
        most = footprint(worker)
        stack.close()
        quiet = [stack.enter_context(GoodCaller(process, "quiet")) for _ in range(_CALLERS)]
        times["quiet again"] = _measured(quiet, seconds / 2)
    p99 = {name: quantile(found, 0.99) for name, found in times.items()}
    for name, found in times.items():
        print(
            f"  {name:<12} {len(found):6} calls: p50 {1000 * quantile(found, 0.5):.1f} ms, "
            f"p99 {1000 * p99[name]:.1f} ms, longest {1000 * max(found):.0f} ms"
        )
    usual = max(p99["quiet"], p99["quiet again"])
    print(f"  {len(hostile.done)} rounds of the hostile; p99 {p99['hostile'] / usual:.2f} times")
    print(f"  before {before}\n  among  {most}", flush=True)
    assert most.memory - before.memory < MORE_AMONG, "the worker has grown too much"
    assert p99["hostile"] <= SLOWER * usual, "who calls beside a hostile server waits too long"
    # Who waits long calls seldom, which a quantile does not show.
    fewest = min(len(times["quiet"]), len(times["quiet again"]))
    assert len(times["hostile"]) >= fewest, "who calls beside a hostile server calls too seldom"


class HostileCaller(Repeated):
    """Sessions, one after the other, that only use the hostile servers."""

    def __init__(self, process: ProxyProcess) -> None:
        super().__init__(0.5)
        self._process = process

    def act(self) -> str:
        client = Client(self._process, "calls")
        for _ in range(3):
            client.tool("false__link").messages()
            client.tool("shut__x").messages()
        client.names()
        client.delete().body()
        return ""


def _measured(callers: Sequence[GoodCaller], seconds: float) -> list[float]:
    found = [timed for done in during(list(callers), seconds) for timed in done]
    wrong = [timed.wrong for timed in found if timed.wrong]
    assert not wrong, f"{len(wrong)} answers were wrong: {wrong[:3]}"
    return [timed.seconds for timed in found]

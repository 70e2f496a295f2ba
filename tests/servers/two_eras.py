"""What modern.py and legacy.py have in common: their tools, resources, prompts, and their reading.

Whatever does not depend on the revision is written here once, so that both servers give the same
answers to the same calls. Standard library only. Every request has a thread of its own.

A tool is a function of its call. One that asks is a generator: it yields questions (key to
{"method", "params"}) and gets the answers (key to result). The legacy server sends each question
as a request and waits; the modern one answers `input_required` and runs the tool anew with the
answers that the retry brings.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Generator
from typing import Any

Json = dict[str, Any]
Asking = Generator[Json, Json, Json]
Send = Callable[[Json], object]

NOT_FOUND = -32601
INVALID_PARAMS = -32602
LEVELS = ("debug", "info", "notice", "warning", "error", "critical", "alert", "emergency")

#: What `notify` can tell, and the key of each in the filter of `subscriptions/listen`.
CHANGES = {
    "tools": ("notifications/tools/list_changed", "toolsListChanged"),
    "prompts": ("notifications/prompts/list_changed", "promptsListChanged"),
    "resources": ("notifications/resources/list_changed", "resourcesListChanged"),
    "updated": ("notifications/resources/updated", "resourceSubscriptions"),
}


class Refused(Exception):
    """Becomes a JSON-RPC error."""

    def __init__(self, code: int, message: str, data: Any = None) -> None:
        super().__init__(message)
        self.error: Json = {"code": code, "message": message}
        if data is not None:
            self.error["data"] = data


class Cancelled(Exception):
    """The client has given the call up: it gets no answer."""


# --- calls ---------------------------------------------------------------------------------------


class Call:
    """One request under way."""

    def __init__(self, server: EraServer, message: Json, send: Send | None = None) -> None:
        self.server = server
        #: Where its answer goes, and what is said meanwhile.
        self.send: Send = send or server.send
        self.id = message["id"]
        self.method: str = message["method"]
        self.params: Json = message.get("params") or {}
        self.meta: Json = self.params.get("_meta") or {}
        self.given: Json = self.params.get("arguments") or {}
        self.cancelled = threading.Event()

    def tell_progress(self, done: float, total: float | None, message: str) -> None:
        """Progress, where the request asks for it."""
        if "progressToken" not in self.meta:
            return
        told = {"progressToken": self.meta["progressToken"], "progress": done, "message": message}
        if total is not None:
            told["total"] = total
        self.send({"method": "notifications/progress", "params": told})

    def log(self, level: str, data: Any) -> None:
        """A log message, where the client wants that level."""
        wanted = self.server.log_level(self)
        if wanted in LEVELS and LEVELS.index(level) >= LEVELS.index(wanted):
            told = {"level": level, "logger": "two-eras", "data": data}
            self.send({"method": "notifications/message", "params": told})

    def wait(self, seconds: float) -> None:
        """Waits, unless the client gives the call up."""
        if self.cancelled.wait(seconds):
            raise Cancelled


def told(text: str, /, **structured: Any) -> Json:
    """A result of a tool: a text, and the same as structured content where there is some."""
    result: Json = {"content": [{"type": "text", "text": text}]}
    return {**result, "structuredContent": structured} if structured else result


# --- questions -----------------------------------------------------------------------------------


def form(message: str) -> Json:
    """A question with a form of one field."""
    schema = {
        "type": "object",
        "properties": {"answer": {"type": "string"}},
        "required": ["answer"],
    }
    params = {"mode": "form", "message": message, "requestedSchema": schema}
    return {"method": "elicitation/create", "params": params}


def visit(message: str) -> Json:
    """A question that sends the person to a page; the legacy server adds an elicitationId."""
    params = {"mode": "url", "message": message, "url": "https://example.com/authorize"}
    return {"method": "elicitation/create", "params": params}


def sampling(message: str) -> Json:
    """A question to the client's model."""
    said = {"role": "user", "content": {"type": "text", "text": message}}
    return {
        "method": "sampling/createMessage",
        "params": {"messages": [said], "maxTokens": 100},
    }


def roots(message: str) -> Json:
    """A question for the client's roots."""
    return {"method": "roots/list", "params": {}}


def questions(kind: str, message: str) -> Json:
    """The questions of a kind: one under the kind's name, or `both`, a form and sampling."""
    if kind == "both":
        return {"form": form(message), "sampling": sampling(message)}
    makers = {"form": form, "url": visit, "sampling": sampling, "roots": roots}
    if kind not in makers:
        raise Refused(INVALID_PARAMS, f"Unknown kind of question: {kind}")
    return {kind: makers[kind](message)}


def lacking(capabilities: Json, asked: Json) -> Json:
    """The capabilities that a client has to declare to be asked this, and did not."""
    lacks: Json = {}
    for question in asked.values():
        match question["method"], question["params"].get("mode", "form"):
            case "elicitation/create", "url":
                if "url" not in capabilities.get("elicitation", {}):
                    lacks.setdefault("elicitation", {})["url"] = {}
            case "elicitation/create", _:
                declared = capabilities.get("elicitation")
                if declared is None or ("url" in declared and "form" not in declared):
                    lacks.setdefault("elicitation", {})["form"] = {}
            case "sampling/createMessage", _:
                if "sampling" not in capabilities:
                    lacks["sampling"] = {}
            case "roots/list", _:
                if "roots" not in capabilities:
                    lacks["roots"] = {}
    return lacks


# --- tools ---------------------------------------------------------------------------------------


def echo(call: Call) -> Json:
    """Its text, plain and structured."""
    text = call.given["text"]
    return told(text, text=text)


def count(call: Call) -> Json:
    """Progress from 1 to `to`, `pause` seconds apart."""
    end = call.given.get("to", 3)
    for number in range(1, end + 1):
        call.tell_progress(number, end, f"{number} of {end}")
        call.wait(call.given.get("pause", 0))
    return told(f"counted to {end}", counted=end)


def ask(call: Call) -> Asking:
    """Asks one question of a `kind`, or both at once, and returns the answers."""
    kind = call.given.get("kind", "form")
    answers = yield questions(kind, call.given.get("message", "How much?"))
    return told(json.dumps(answers, sort_keys=True), answers=answers)


def chain(call: Call) -> Asking:
    """Asks `rounds` questions, each after the answer to the one before."""
    got = []
    for number in range(1, call.given.get("rounds", 3) + 1):
        answers = yield questions(call.given.get("kind", "form"), f"round {number}")
        got.append(answers)
        call.tell_progress(number, None, f"answer {number}")
    return told(json.dumps(got, sort_keys=True), answers=got)


def log(call: Call) -> Json:
    """A log message of each of the `levels`, by default of four."""
    for level in call.given.get("levels", ["debug", "info", "warning", "error"]):
        call.log(level, f"{call.given.get('label', 'a')} {level}")
    return told("logged")


def slow(call: Call) -> Json:
    """Waits for `seconds`; traces that it began, and whether it ended or was cancelled."""
    label = call.given.get("label", "")
    call.server.trace(f"started {call.id} {label}")
    call.tell_progress(1, None, "started")
    call.wait(call.given.get("seconds", 60))
    call.server.trace(f"done {call.id} {label}")
    return told("slept", label=label)


def counter(call: Call) -> Json:
    """How often this process was asked to count."""
    with call.server.lock:
        call.server.counted += 1
        number = call.server.counted
    call.wait(call.given.get("seconds", 0))
    return told(str(number), count=number, pid=os.getpid())


def pid(call: Call) -> Json:
    """The process."""
    return told(str(os.getpid()), pid=os.getpid())


def crash(call: Call) -> Json:
    """The end, with an exit code."""
    print("crashing as I was told to", file=sys.stderr, flush=True)
    os._exit(call.given.get("code", 3))


def notify(call: Call) -> Json:
    """Tells of each of `kinds` (tools, prompts, resources, updated: of `uri`), `times` times."""
    uri = call.given.get("uri", "demo://watched")
    for _ in range(call.given.get("times", 1)):
        for kind in call.given.get("kinds", list(CHANGES)):
            with call.server.lock:
                call.server.updates += kind == "updated"
            call.server.tell_change(kind, uri)
    return told("notified")


def header(call: Call) -> Json:
    """Its arguments; the first of them is also to come as a header over HTTP."""
    return told(json.dumps(call.given, sort_keys=True), **call.given)


def fail(call: Call) -> Json:
    """A result that says isError, or the JSON-RPC error in `error`."""
    if "error" in call.given:
        given = call.given["error"]
        raise Refused(given["code"], given.get("message", "told to"), given.get("data"))
    return {**told("failed as I was told to"), "isError": True}


def seen(call: Call) -> Json:
    """Every message that has reached this process."""
    messages = list(call.server.seen)
    return told(json.dumps(messages), messages=messages)


Tool = Callable[[Call], Any]

TOOLS: dict[str, Tool] = {
    tool.__name__: tool
    for tool in (
        echo,
        count,
        ask,
        chain,
        log,
        slow,
        counter,
        pid,
        crash,
        notify,
        header,
        fail,
        seen,
    )
}

_TEXT = {"type": "string"}
_NUMBER = {"type": "number"}
_INTEGER = {"type": "integer"}
_TEXTS = {"type": "array", "items": _TEXT}

#: The arguments of the tools that have some.
ARGUMENTS: dict[str, Json] = {
    "echo": {"text": _TEXT},
    "count": {"to": _INTEGER, "pause": _NUMBER},
    "ask": {"kind": _TEXT, "message": _TEXT, "force": {"type": "boolean"}},
    "chain": {"rounds": _INTEGER, "kind": _TEXT},
    "log": {"levels": _TEXTS, "label": _TEXT},
    "slow": {"seconds": _NUMBER, "label": _TEXT},
    "counter": {"seconds": _NUMBER},
    "crash": {"code": _INTEGER},
    "notify": {"kinds": _TEXTS, "uri": _TEXT, "times": _INTEGER},
    "header": {"region": {**_TEXT, "x-mcp-header": "Region"}, "query": _TEXT},
    "fail": {"error": {"type": "object"}},
}


def shown(name: str, tool: Tool) -> Json:
    """A tool as tools/list shows it."""
    schema: Json = {"type": "object", "properties": ARGUMENTS.get(name, {})}
    described: Json = {"name": name, "description": tool.__doc__, "inputSchema": schema}
    if name == "echo":
        schema["required"] = ["text"]
        output = {"type": "object", "properties": {"text": _TEXT}, "required": ["text"]}
        described["outputSchema"] = output
    return described


# --- resources and prompts -----------------------------------------------------------------------

RESOURCES = ("demo://static", "demo://watched", "demo://asking")
PROMPTS = {"greet": ["name"], "asking": []}
WORDS = ("paris", "park", "party")


def read_resource(call: Call) -> Json | Asking:
    """The text of a resource; `demo://asking` asks for it."""
    uri = call.params.get("uri", "")
    if uri == "demo://asking":
        return asking_resource()
    if uri == "demo://static":
        text = "static text"
    elif uri == "demo://watched":
        text = f"updated {call.server.updates} times"
    elif uri.startswith("demo://item/"):
        text = f"item {uri.removeprefix('demo://item/')}"
    else:
        raise Refused(call.server.unknown_resource, "Resource not found", {"uri": uri})
    return contents(uri, text)


def asking_resource() -> Asking:
    """The text is what the client answers."""
    answers = yield questions("form", "What is in it?")
    return contents("demo://asking", json.dumps(answers, sort_keys=True))


def contents(uri: str, text: str) -> Json:
    """The result of resources/read."""
    return {"contents": [{"uri": uri, "mimeType": "text/plain", "text": text}]}


def get_prompt(call: Call) -> Json | Asking:
    """One of the prompts; `asking` asks for its text."""
    match call.params.get("name"):
        case "greet" if "name" in call.given:
            return user_says(f"Greet {call.given['name']}")
        case "asking":
            return asking_prompt()
        case name:
            raise Refused(INVALID_PARAMS, f"Unknown prompt or missing argument: {name}")


def asking_prompt() -> Asking:
    """The text is what the client answers."""
    answers = yield questions("form", "What shall I say?")
    return user_says(json.dumps(answers, sort_keys=True))


def user_says(text: str) -> Json:
    """The result of prompts/get."""
    return {"messages": [{"role": "user", "content": {"type": "text", "text": text}}]}


def list_resources(call: Call) -> Json:
    """All resources but those of the template."""
    return {"resources": [{"uri": it, "name": it.removeprefix("demo://")} for it in RESOURCES]}


def list_templates(call: Call) -> Json:
    """The one template."""
    return {"resourceTemplates": [{"uriTemplate": "demo://item/{id}", "name": "item"}]}


def list_prompts(call: Call) -> Json:
    """All prompts."""
    prompts = [
        {"name": name, "arguments": [{"name": it, "required": True} for it in arguments]}
        for name, arguments in PROMPTS.items()
    ]
    return {"prompts": prompts}


def complete(call: Call) -> Json:
    """The words that begin with what was typed."""
    words = [it for it in WORDS if it.startswith(call.params["argument"]["value"])]
    return {"completion": {"values": words, "total": len(words), "hasMore": False}}


def list_tools(call: Call) -> Json:
    """The tools, `--page-size` at a time."""
    everything = [shown(name, tool) for name, tool in call.server.tools.items()]
    size = call.server.options.page_size or len(everything)
    start = int(call.params.get("cursor") or 0)
    page: Json = {"tools": everything[start : start + size]}
    return {**page, "nextCursor": str(start + size)} if start + size < len(everything) else page


def call_tool(call: Call) -> Json | Asking:
    """What the tool makes of the call."""
    name: str = call.params.get("name", "")
    tool = call.server.tools.get(name)
    if tool is None:
        raise Refused(INVALID_PARAMS, f"Unknown tool: {name}")
    try:
        result: Json | Asking = tool(call)
    except KeyError as error:
        raise Refused(INVALID_PARAMS, f"Missing argument: {error}") from None
    return result


METHODS: dict[str, Tool] = {
    "tools/list": list_tools,
    "tools/call": call_tool,
    "resources/list": list_resources,
    "resources/templates/list": list_templates,
    "resources/read": read_resource,
    "prompts/list": list_prompts,
    "prompts/get": get_prompt,
    "completion/complete": complete,
}


# --- the server ----------------------------------------------------------------------------------


class EraServer:
    """Reads messages, runs each request in a thread, writes a line a message."""

    name = "two-eras"
    unknown_resource = INVALID_PARAMS

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.tools = dict(TOOLS)
        self.methods = dict(METHODS)
        self.lock = threading.Lock()
        self.output = threading.Lock()
        self.running: dict[Any, Call] = {}
        self.seen: list[Json] = []
        self.counted = 0
        self.updates = 0

    # --- what differs ---

    def prepare(self, call: Call) -> None:
        """Refuses a request that the revision does not allow."""

    def finish(self, call: Call, result: Json) -> Json:
        """What the revision adds to a result."""
        return result

    def answer_questions(self, call: Call, asking: Asking) -> Json:
        """Runs a tool that asks to its end, or to where the client is to be asked."""
        raise NotImplementedError

    def log_level(self, call: Call) -> str | None:
        """The least level that the client wants to hear."""
        raise NotImplementedError

    def tell_change(self, kind: str, uri: str) -> None:
        """Tells whoever is to hear of it that something changed."""
        raise NotImplementedError

    def receive_notification(self, message: Json) -> None:
        """A notification other than cancelled."""

    def receive_response(self, message: Json) -> None:
        """An answer to a question of ours."""
        self.trace(f"stray response {message.get('id')}")

    def end(self) -> None:
        """What is to be done once standard input has ended."""

    # --- reading ---

    def run(self) -> None:
        """Reads until the input ends."""
        self.trace(f"pid {os.getpid()}")
        time.sleep(self.options.slow_start)
        for line in sys.stdin.buffer:
            self.receive(json.loads(line))
        self.end()
        self.trace("end")
        sys.stdout.flush()
        os._exit(0)

    def receive(self, message: Json) -> None:
        """One message of the client."""
        self.seen.append(message)
        if "method" not in message:
            self.receive_response(message)
        elif "id" in message:
            self.begin(Call(self, message))
        elif message["method"] == "notifications/cancelled":
            self.cancel(message["params"].get("requestId"))
        else:
            self.receive_notification(message)

    def begin(self, call: Call) -> None:
        """Answers a request, in a thread of its own."""
        self.running[call.id] = call
        threading.Thread(target=self.answer, args=(call,), daemon=True).start()

    def cancel(self, request_id: Any) -> None:
        """Stops a call."""
        call = self.running.get(request_id)
        if call:
            self.stop(call)
        else:
            self.trace(f"cancelled {request_id} (not running)")

    def stop(self, call: Call) -> None:
        """The client has given a call up."""
        self.trace(f"cancelled {call.id} {call.given.get('label', '')}")
        call.cancelled.set()

    def answer(self, call: Call) -> None:
        """Does what the request says and writes what came of it."""
        try:
            self.prepare(call)
            method = self.methods.get(call.method)
            if method is None:
                raise Refused(NOT_FOUND, f"Method not found: {call.method}")
            result = method(call)
            if isinstance(result, Generator):
                result = self.answer_questions(call, result)
            if result is not None and not call.cancelled.is_set():
                call.send({"id": call.id, "result": self.finish(call, result)})
        except Refused as refused:
            call.send({"id": call.id, "error": refused.error})
        except Cancelled:
            pass
        except Exception as error:
            call.send({"id": call.id, "error": {"code": -32603, "message": repr(error)}})
        finally:
            if self.running.get(call.id) is call:
                del self.running[call.id]

    # --- writing ---

    def send(self, message: Json) -> None:
        """Writes one message as one line."""
        line = json.dumps({"jsonrpc": "2.0", **message}, ensure_ascii=False).encode() + b"\n"
        with self.output:
            sys.stdout.buffer.write(line)
            sys.stdout.buffer.flush()

    def trace(self, line: str) -> None:
        """Says on standard error, and in the file of `--trace`, what happens in here."""
        with self.lock:
            print(line, file=sys.stderr, flush=True)
            if self.options.trace:
                with open(self.options.trace, "a", encoding="utf-8") as file:
                    file.write(line + "\n")


def command_line(description: str | None) -> argparse.ArgumentParser:
    """A parser with the options that both servers have."""
    parser = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    parser.add_argument("--trace", metavar="FILE", help="what happens in here is appended to it")
    parser.add_argument("--slow-start", type=float, default=0, metavar="SECONDS")
    parser.add_argument("--page-size", type=int, default=0, help="tools in a page of tools/list")
    parser.add_argument("--http", type=int, metavar="PORT", help="instead of stdio; 0: any port")
    parser.add_argument("--deny", type=int, metavar="STATUS", help="over HTTP without our token")
    return parser

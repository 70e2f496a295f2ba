"""A stdio server that does what its requests say; standard library only, so that it starts fast.

Each JSON-RPC method below is a behaviour. Requests run in threads of their own, so that several can
be under way. `seen` returns what has reached the server: how tests look at the other side.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import queue
import select
import signal
import subprocess
import sys
import threading
import time
from typing import Any

Json = dict[str, Any]

#: Started by `grandchild`: ignores everything but KILL and the end of the world.
STUBBORN = (
    "import signal,time\n"
    "for s in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP): signal.signal(s, signal.SIG_IGN)\n"
    "time.sleep(600)"
)

#: Seconds without a message after which a server is as `--unasked` says.
UNASKED = 0.2

output = threading.Lock()
answers: dict[Any, queue.SimpleQueue[Json]] = {}
seen: list[Json] = []
counter = {"calls": 0}
reading = threading.Event()
released: dict[str, threading.Event] = {}


def write(data: bytes) -> None:
    """Writes one line to the proxy."""
    with output:
        sys.stdout.buffer.write(data + b"\n")
        sys.stdout.buffer.flush()


def send(message: Json) -> None:
    """Writes one message to the proxy."""
    write(json.dumps({"jsonrpc": "2.0", **message}).encode())


def echo(message: Json, params: Json) -> Any:
    """The params, as they came."""
    return params


def count(message: Json, params: Json) -> Any:
    """How often this process was asked to count: a new process starts at one."""
    counter["calls"] += 1
    return {"calls": counter["calls"], "pid": os.getpid()}


def show_seen(message: Json, params: Json) -> Any:
    """Every message that has reached this process."""
    return {"messages": list(seen)}


def sleep(message: Json, params: Json) -> Any:
    """An answer after a while."""
    time.sleep(params["seconds"])
    return {"slept": params["seconds"], "token": params.get("token")}


def die(message: Json, params: Json) -> Any:
    """The end, by exit code or by signal."""
    if "signal" in params:
        os.kill(os.getpid(), params["signal"])
    os._exit(params.get("code", 1))


def notify(message: Json, params: Json) -> Any:
    """Notifications before the answer; `after` more of them behind it."""
    method = params.get("method", "notifications/message")
    for number in range(params.get("count", 1)):
        send({"method": method, "params": {**params.get("params", {}), "number": number}})
        time.sleep(params.get("pause", 0))
    return {}


def progress(message: Json, params: Json) -> Any:
    """Progress under the token of the request, then the answer after `seconds`."""
    token = params["_meta"]["progressToken"]
    send({"method": "notifications/progress", "params": {"progressToken": token, "progress": 1}})
    time.sleep(params.get("seconds", 0))
    return {"for": params.get("for")}


def hold(message: Json, params: Json) -> Any:
    """Progress, then nothing until `release` names it, then more progress and the answer."""

    def report(first: int, count: int) -> None:
        for number in range(first, first + count):
            told = {"progressToken": params["_meta"]["progressToken"], "progress": number}
            send({"method": "notifications/progress", "params": told})

    before, after = params.get("before", 1), params.get("after", 0)
    report(0, before)
    released.setdefault(params["name"], threading.Event()).wait(60)
    report(before, after)
    return {"held": params["name"], "text": "x" * params.get("size", 0)}


def release(message: Json, params: Json) -> Any:
    """Lets `hold` go on, also one that comes later."""
    released.setdefault(params["name"], threading.Event()).set()
    return {}


def later(message: Json, params: Json) -> Any:
    """The answer, and after it a message of the server."""

    def speak() -> None:
        time.sleep(params.get("seconds", 0.05))
        send(params["message"])

    threading.Thread(target=speak, daemon=True).start()
    return {}


def ask(message: Json, params: Json) -> Any:
    """What the client answers to a request of ours."""
    key = params.get("id", f"ask-{message['id']}")
    answers[key] = queue.SimpleQueue()
    send({"id": key, "method": params["method"], "params": params.get("params", {})})
    return answers[key].get(timeout=30)


def raw(message: Json, params: Json) -> Any:
    """Any bytes on standard output, base64 in the request, before the answer.

    `$id` in them is the id of this request.
    """
    given = base64.b64decode(params["bytes"]).replace(b"$id", b"%d" % message["id"])
    with output:
        sys.stdout.buffer.write(given)
        sys.stdout.buffer.flush()
    return {}


def raw_answer(message: Json, params: Json) -> Any:
    """Any bytes as the result of this request."""
    result = base64.b64decode(params["bytes"])
    write(b'{"jsonrpc":"2.0","id":%d,"result":%s}' % (message["id"], result))


def big(message: Json, params: Json) -> Any:
    """A result of many bytes."""
    return {"text": "x" * params["size"]}


def flood(message: Json, params: Json) -> Any:
    """Lines without an end, on stdout (noise or messages) or stderr."""
    note = {"jsonrpc": "2.0", "method": "notifications/message", "params": {"data": "!" * 80}}
    line = json.dumps(note).encode() if params["with"] == "messages" else b"!" * 80
    piece = (line + b"\n") * 100
    file = sys.stderr.buffer if params["with"] == "stderr" else sys.stdout.buffer

    def write_on() -> None:
        while True:
            with output:
                file.write(piece)
                file.flush()

    threading.Thread(target=write_on, daemon=True).start()
    return {}


def complain(message: Json, params: Json) -> Any:
    """Many lines on standard error."""
    line = b"!" * params.get("length", 80) + b"\n"
    for _ in range(params["lines"]):
        sys.stderr.buffer.write(line)
    sys.stderr.buffer.flush()
    return {}


def fail(message: Json, params: Json) -> Any:
    """A JSON-RPC error of the server's own."""
    send({"id": message["id"], "error": params})


def silence(message: Json, params: Json) -> Any:
    """No answer at all."""


def stop_reading(message: Json, params: Json) -> Any:
    """From now on nothing is read; what is running goes on."""
    reading.clear()
    return {}


def close_output(message: Json, params: Json) -> Any:
    """Standard output is closed, the process lives on."""
    with output:
        os.close(1)


def grandchild(message: Json, params: Json) -> Any:
    """A process of ours that ignores signals; in its own session if `escape` is set."""
    command = [sys.executable, "-I", "-S", "-c", STUBBORN]
    keep = None if params.get("holds_output") else subprocess.DEVNULL
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=keep,
        start_new_session=params.get("escape", False),
    )
    return {"pid": process.pid}


def environment(message: Json, params: Json) -> Any:
    """What this process was started with."""
    cpus = sorted(os.sched_getaffinity(0))
    return {"environ": dict(os.environ), "cwd": os.getcwd(), "cpus": cpus, "pid": os.getpid()}


def nothing(message: Json, params: Json) -> Any:
    """An empty result: setLevel, unsubscribe and the like."""
    return {}


def subscribe(message: Json, params: Json) -> Any:
    """An empty result, but for resources that are not there."""
    if params["uri"].startswith("gone:"):
        send({"id": message["id"], "error": {"code": -32002, "message": "Resource not found"}})
        return None
    return {}


BEHAVIOURS = {
    "echo": echo,
    "tools/call": echo,
    "count": count,
    "seen": show_seen,
    "sleep": sleep,
    "die": die,
    "notify": notify,
    "progress": progress,
    "hold": hold,
    "release": release,
    "later": later,
    "ask": ask,
    "raw": raw,
    "raw_answer": raw_answer,
    "big": big,
    "complain": complain,
    "flood": flood,
    "fail": fail,
    "silence": silence,
    "stop_reading": stop_reading,
    "close_output": close_output,
    "grandchild": grandchild,
    "environment": environment,
    "logging/setLevel": nothing,
    "resources/subscribe": subscribe,
    "resources/unsubscribe": nothing,
    "ping": nothing,
}


class Server:
    """One run of the script."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options

    def run(self) -> None:
        """Reads until the input ends."""
        if self.options.greet:
            send({"method": "notifications/message", "params": {"level": "info", "data": "hello"}})
            print("greeted", file=sys.stderr, flush=True)
        if self.options.unasked and not select.select([0], [], [], UNASKED)[0]:
            self.tire()
        reading.set()
        for line in sys.stdin.buffer:
            self.receive(json.loads(line))
            while not reading.is_set():
                time.sleep(0.05)
        if self.options.ignore_eof:
            while True:
                time.sleep(60)

    def tire(self) -> None:
        """What a server does that nobody has asked for long, as the options want it."""
        if self.options.unasked == "exits":
            os._exit(4)
        elif self.options.unasked == "is deaf":
            os.close(0)
        elif self.options.unasked == "is mute":
            os.close(1)
        else:
            self.options.die_on_initialize = True
        print("nobody asks me", file=sys.stderr, flush=True)
        if self.options.unasked == "is deaf":
            time.sleep(60)

    def receive(self, message: Json) -> None:
        """One message of the client."""
        seen.append(message)
        if "method" not in message:
            if message["id"] in answers:
                answers[message["id"]].put(message)
        elif "id" in message:
            threading.Thread(target=self.answer, args=(message,), daemon=True).start()

    def answer(self, message: Json) -> None:
        """Does what the request says."""
        if message["method"] == "initialize":
            self.initialize(message)
            return
        behaviour = BEHAVIOURS.get(message["method"])
        if behaviour is None:
            error = {"code": -32601, "message": f"Method not found: {message['method']}"}
            send({"id": message["id"], "error": error})
            return
        result = behaviour(message, message.get("params") or {})
        if result is not None:
            send({"id": message["id"], "result": result})

    def initialize(self, message: Json) -> None:
        """The handshake, as the options want it."""
        options = self.options
        for _ in range(options.log_first):
            send({"method": "notifications/message", "params": {"level": "info", "data": "hello"}})
        if options.die_on_initialize:
            print("cannot find my database", file=sys.stderr, flush=True)
            os._exit(3)
        if options.refuse:
            send({"id": message["id"], "error": {"code": -32602, "message": "not today"}})
            return
        time.sleep(options.slow_start)
        wanted = message["params"]["protocolVersion"]
        info = {"name": "scripted", "version": "1"}
        result = {
            "protocolVersion": options.version or wanted,
            "capabilities": {},
            "serverInfo": info,
        }
        send({"id": message["id"], "result": result})


def main() -> None:
    """Runs the server that the options describe."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--die-on-initialize", action="store_true")
    parser.add_argument("--refuse", action="store_true")
    parser.add_argument("--ignore-eof", action="store_true")
    parser.add_argument("--ignore-term", action="store_true")
    parser.add_argument("--log-first", type=int, default=0)
    parser.add_argument("--slow-start", type=float, default=0)
    parser.add_argument("--greet", action="store_true")
    parser.add_argument("--unasked", choices=["exits", "is deaf", "is mute", "dies when asked"])
    parser.add_argument("--version")
    options = parser.parse_args()
    if options.ignore_term:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    Server(options).run()


if __name__ == "__main__":
    main()

"""A server of revision 2026-07-28 and of no other, on stdio or HTTP; standard library only.

    python tests/servers/modern.py [--refuse-code CODE] [--silent-initialize] [--slow-start SECONDS]
                                   [--honour KIND,...] [--trace FILE] [--page-size N]
                                   [--http PORT]

Its `requestState` is sealed with a key of the process, so that another process refuses it, which is
what servers of the Python SDK 2.3 do by default.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
import os
import secrets
import sys
import threading
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))  # also where python is started with -I

import over_http
from two_eras import (
    CHANGES,
    INVALID_PARAMS,
    NOT_FOUND,
    Asking,
    Call,
    EraServer,
    Json,
    Refused,
    command_line,
    lacking,
)

REVISION = "2026-07-28"
PREFIX = "io.modelcontextprotocol/"
UNSUPPORTED = -32022
LACKS_CAPABILITY = -32021

CACHEABLE = (
    "server/discover",
    "tools/list",
    "resources/list",
    "resources/templates/list",
    "resources/read",
    "prompts/list",
)

CAPABILITIES = {
    "tools": {"listChanged": True},
    "prompts": {"listChanged": True},
    "resources": {"listChanged": True, "subscribe": True},
    "logging": {},
    "completions": {},
}


class ModernServer(EraServer):
    """Stateless but for its tools, its subscriptions and the key of its seals."""

    name = "modern"

    def __init__(self, options: Any) -> None:
        super().__init__(options)
        self.key = secrets.token_bytes(32)
        self.listening: dict[Call, Json] = {}
        self.telling = threading.Lock()
        self.methods["server/discover"] = self.discover
        self.methods["subscriptions/listen"] = self.listen

    # --- requests and results ---

    def prepare(self, call: Call) -> None:
        if call.method == "initialize" and f"{PREFIX}protocolVersion" not in call.meta:
            self.refuse_initialize(call)
        version = call.meta.get(f"{PREFIX}protocolVersion")
        if not isinstance(version, str):
            raise Refused(INVALID_PARAMS, "_meta lacks the protocol version")
        if not isinstance(call.meta.get(f"{PREFIX}clientCapabilities"), dict):
            raise Refused(INVALID_PARAMS, "_meta lacks the client's capabilities")
        if version != REVISION:
            raise unsupported(version)

    def refuse_initialize(self, call: Call) -> None:
        """As the options want it."""
        if self.options.silent_initialize:
            call.cancelled.wait()
        if self.options.refuse_code == UNSUPPORTED:
            raise unsupported(call.params.get("protocolVersion", ""))
        raise Refused(self.options.refuse_code, f"This server speaks {REVISION} only")

    def finish(self, call: Call, result: Json) -> Json:
        if result.get("resultType", "complete") == "complete":
            result = {"resultType": "complete", **result}
            if call.method in CACHEABLE:
                result = {**result, "ttlMs": 0, "cacheScope": "private"}
        info = {"name": self.name, "version": "1"}
        meta = {**result.get("_meta", {}), f"{PREFIX}serverInfo": info}
        return {**result, "_meta": meta}

    def discover(self, call: Call) -> Json:
        """server/discover."""
        return {
            "supportedVersions": [REVISION],
            "capabilities": CAPABILITIES,
            "instructions": "Ask me anything.",
        }

    def log_level(self, call: Call) -> str | None:
        level: str | None = call.meta.get(f"{PREFIX}logLevel")
        return level

    # --- questions ---

    def answer_questions(self, call: Call, asking: Asking) -> Json:
        """Runs the tool anew with the answers of all rounds; asks where there are no more."""
        rounds = self.answers_so_far(call)
        try:
            asked = next(asking)
            for number in range(len(rounds) + 1):
                answers = rounds[number] if number < len(rounds) else {}
                missing = {key: asked[key] for key in asked if key not in answers}
                if missing:
                    return self.ask(call, missing, [*rounds[:number], answers])
                asked = asking.send(answers)
        except StopIteration as ended:
            result: Json = ended.value
            return result
        raise AssertionError("a round more than there were answers")

    def answers_so_far(self, call: Call) -> list[Json]:
        """The answers of each round; those that came without a state belong to no question."""
        state = call.params.get("requestState")
        if state is None:
            return []
        opened = self.unseal(state)
        if opened["digest"] != digest(call):
            raise Refused(INVALID_PARAMS, "This requestState belongs to another call")
        rounds: list[Json] = opened["rounds"]
        given = call.params.get("inputResponses") or {}
        if not isinstance(given, dict) or not all(isinstance(it, dict) for it in given.values()):
            raise Refused(INVALID_PARAMS, "inputResponses are to be objects by key")
        if not rounds:
            return [given]
        rounds[-1] |= {key: given[key] for key in given if key not in rounds[-1]}
        return rounds

    def ask(self, call: Call, questions: Json, rounds: list[Json]) -> Json:
        """The result that asks the client; the last of the rounds is not complete."""
        lacks = lacking(call.meta[f"{PREFIX}clientCapabilities"], questions)
        if lacks and not call.given.get("force"):
            data = {"requiredCapabilities": lacks}
            raise Refused(LACKS_CAPABILITY, "The client cannot be asked this", data)
        state = {"pid": os.getpid(), "rounds": rounds, "digest": digest(call)}
        return {
            "resultType": "input_required",
            "inputRequests": questions,
            "requestState": self.seal(state),
        }

    def seal(self, state: Json) -> str:
        """A state that only this process opens."""
        text = json.dumps(state).encode()
        mark = hmac.new(self.key, text, hashlib.sha256).digest()
        return ".".join(base64.urlsafe_b64encode(it).decode() for it in (text, mark))

    def unseal(self, sealed: Any) -> Json:
        """The state that this process sealed."""
        try:
            text, mark = (base64.urlsafe_b64decode(it) for it in sealed.split("."))
        except (AttributeError, ValueError, binascii.Error):
            raise Refused(INVALID_PARAMS, "Invalid requestState") from None
        if not hmac.compare_digest(mark, hmac.new(self.key, text, hashlib.sha256).digest()):
            data = {"reason": "invalid_request_state"}
            raise Refused(INVALID_PARAMS, "Invalid or expired requestState", data)
        state: Json = json.loads(text)
        return state

    # --- subscriptions ---

    def listen(self, call: Call) -> Json:
        """subscriptions/listen: the acknowledgement first; the result at the end."""
        wanted = call.params.get("notifications")
        if not isinstance(wanted, dict):
            raise Refused(INVALID_PARAMS, "notifications is missing")
        if self.options.honour == "refuse":
            raise Refused(-32603, "There are no subscriptions")
        kinds = [CHANGES[kind][1] for kind in self.options.honour.split(",") if kind]
        honoured = {key: wanted[key] for key in kinds if wanted.get(key)}
        with self.telling:  # who has read the acknowledgement misses nothing
            self.send_on(call, "notifications/subscriptions/acknowledged", notifications=honoured)
            self.listening[call] = honoured
        self.trace(f"listening {call.id} {json.dumps(honoured)}")
        if honoured:
            call.cancelled.wait()
        self.listening.pop(call, None)
        return {"_meta": {f"{PREFIX}subscriptionId": call.id}}

    def tell_change(self, kind: str, uri: str) -> None:
        method, key = CHANGES[kind]
        with self.telling:
            listening = list(self.listening.items())
        for call, honoured in listening:
            if kind != "updated" and honoured.get(key):
                self.send_on(call, method)
            elif kind == "updated" and uri in honoured.get(key, ()):
                self.send_on(call, method, uri=uri)

    def send_on(self, call: Call, method: str, **params: Any) -> None:
        """A notification on one subscription."""
        meta = {f"{PREFIX}subscriptionId": call.id}
        call.send({"method": method, "params": {**params, "_meta": meta}})

    def end(self) -> None:
        for call in list(self.listening):
            result = {"_meta": {f"{PREFIX}subscriptionId": call.id}}
            call.send({"id": call.id, "result": self.finish(call, result)})


def digest(call: Call) -> str:
    """What a retry has to have in common with the call that was asked about."""
    kept = {key: call.params.get(key) for key in ("name", "uri", "arguments")}
    text = json.dumps([call.method, kept], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def unsupported(requested: str) -> Refused:
    """The refusal that tells a modern server from all others."""
    data = {"supported": [REVISION], "requested": requested}
    return Refused(UNSUPPORTED, "Unsupported protocol version", data)


def main() -> None:
    """Runs the server that the options describe."""
    parser = command_line(__doc__)
    parser.add_argument("--refuse-code", type=int, default=UNSUPPORTED, choices=CODES)
    parser.add_argument("--silent-initialize", action="store_true")
    parser.add_argument("--honour", default=",".join(CHANGES), help="of subscriptions/listen")
    options = parser.parse_args()
    if options.http is None:
        ModernServer(options).run()
    else:
        over_http.serve(over_http.ModernEndpoint(ModernServer(options)), options)


#: What servers have been seen to refuse `initialize` with.
CODES = (UNSUPPORTED, NOT_FOUND, INVALID_PARAMS, -32600, -32603, -32020, -32000)


if __name__ == "__main__":
    main()

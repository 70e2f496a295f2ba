"""What the steps of the corner clients give, in each language: the same in every corner.

A corner is the era of a client and the era of a server. The servers are tests/servers/modern.py and
legacy.py, which have the same tools. What cannot be the same stands below with its reason.
"""

from __future__ import annotations

from typing import Any

Json = dict[str, Any]

LEGACY = "legacy"
MODERN = "modern"
REVISIONS = {LEGACY: "2025-11-25", MODERN: "2026-07-28"}

#: How each client connects: its program's language and SDK, and its mode.
CLIENTS = {
    "python-1": ("python", "1", LEGACY),
    "python-2-legacy": ("python", "2", LEGACY),
    "python-2-auto": ("python", "2", "auto"),
    "python-2-modern": ("python", "2", MODERN),
    "typescript-1": ("typescript", "1", LEGACY),
    "typescript-2-legacy": ("typescript", "2", LEGACY),
    "typescript-2-auto": ("typescript", "2", "auto"),
    "typescript-2-modern": ("typescript", "2", MODERN),
    "go-legacy": ("go", "1", LEGACY),
    "go-auto": ("go", "1", "auto"),
}

#: The tools that both servers have; the legacy one has more.
TOOLS = [
    *("echo", "count", "ask", "chain", "log", "slow", "counter"),
    *("pid", "crash", "notify", "header", "fail", "seen"),
]

_TEXT = "Grüße, 世界 \N{WAVING HAND SIGN}"
_ECHOED = [_TEXT, {"text": _TEXT}]
_THOUGHT = {
    "role": "assistant",
    "content": {"type": "text", "text": "thought on How much?"},
    "model": "none",
}


def _accepted(message: str) -> Json:
    return {"action": "accept", "content": {"answer": f"answer to {message}"}}


def _form(message: str) -> Json:
    """What a prompt or a resource that asks gives."""
    return {"asked": [["elicitation form", message]], "answer": {"form": _accepted(message)}}


def _asked(*asked: list[str], **answers: Json) -> Json:
    return {"asked": [*asked], "answer": {"answers": answers}}


_ROUNDS = ["round 1", "round 2", "round 3"]

#: What each step gives, in every corner.
ANSWERS: Json = {
    "tools": TOOLS,
    "echo": _ECHOED,
    "count": [[[1, 3, "1 of 3"], [2, 3, "2 of 3"], [3, 3, "3 of 3"]], {"counted": 3}],
    "header": {"region": "Zürich 1", "query": "all"},
    "unknown_tool": {"error": -32602, "message": "Unknown tool: no such tool"},
    "failing": [True, "failed as I was told to"],
    "refused": {"error": -31999, "message": "no"},
    "ask_form": _asked(["elicitation form", "How much?"], form=_accepted("How much?")),
    "ask_url": _asked(["elicitation url", "How much?"], url={"action": "accept"}),
    "ask_sampling": _asked(["sampling", "How much?"], sampling=_THOUGHT),
    "ask_roots": _asked(
        ["roots", ""], roots={"roots": [{"uri": "file:///corner", "name": "corner"}]}
    ),
    "ask_both": _asked(
        ["elicitation form", "How much?"],
        ["sampling", "How much?"],
        form=_accepted("How much?"),
        sampling=_THOUGHT,
    ),
    "chain": {
        "asked": [["elicitation form", it] for it in _ROUNDS],
        "answer": {"answers": [{"form": _accepted(it)} for it in _ROUNDS]},
    },
    "ask_in_prompt": _form("What shall I say?"),
    "ask_in_resource": _form("What is in it?"),
    "resources": [["demo://static", "demo://watched", "demo://asking"], "item 7"],
    "templates": ["demo://item/{id}"],
    "prompts": [["greet", "asking"], "Greet Eve"],
    "completion": ["paris", "park", "party"],
    "log_before_a_level": [],
    "log_at_a_level": [
        ["warning", "two-eras", "my warning"],
        ["error", "two-eras", "my error"],
    ],
    "updates": ["demo://watched"],
    "changes": ["prompt", "resource", "tool"],
    "cancelled": [True, _ECHOED],
}


def answers(server: str, client: str, era: str) -> Json:
    """What each step gives in the corner of a server's and a client's era.

    What differs, and why:

    - `revision` is what they agreed on.
    - `unknown_resource` is -32002 between a legacy server and a legacy client and must not be where
      one of them is modern (T88). TypeScript 2 shows -32602 whatever came.
    - `url_required` is a tool that the legacy server alone has: a modern server must not answer
      -32042. A legacy client is told that error; a modern one is asked, and calls anew.
    - `ask_roots` is answered by the Go SDK itself. Of a modern question for them its program hears
      nothing; that it was asked shows in the answer.
    """
    is_shown = (server, era) == (LEGACY, LEGACY) and not client.startswith("typescript-2")
    code = -32002 if is_shown else -32602
    if server == MODERN:
        required: Json = {"error": -32602, "message": "Unknown tool: url_required"}
    elif era == LEGACY:
        required = {"error": -32042, "message": "This needs a visit to a page"}
    else:
        required = {"asked": [["elicitation url", "Please authorize"]], "answer": {"calls": 2}}
    roots: Json = ANSWERS["ask_roots"]
    if client.startswith("go") and era == MODERN:
        roots = {**roots, "asked": []}
    return {
        **ANSWERS,
        "ask_roots": roots,
        "revision": REVISIONS[era],
        "unknown_resource": {"error": code, "message": "Resource not found"},
        "url_required": required,
    }


def in_a_group(expected: Json, prefix: str) -> Json:
    """What the steps give where the server is one of several in a group.

    What differs, and why:

    - The message of an elicitation says whose it is, and so does the logger of a log message.
    - Who asks for the roots is asked no more than once for all servers: `ask_roots` has the answer
      alone.
    """
    found: Json = _asked_by(prefix, expected)
    found["log_at_a_level"] = [
        [level, f"{prefix}/{logger}", text] for level, logger, text in expected["log_at_a_level"]
    ]
    found["ask_roots"] = expected["ask_roots"]["answer"]
    return found


def _asked_by(prefix: str, expected: Any) -> Any:
    """The same where the messages of elicitations begin with a prefix."""
    match expected:
        case ["elicitation form" | "elicitation url" as kind, message]:
            return [kind, f"{prefix}: {message}"]
        case {"action": "accept", "content": {"answer": answer}}:
            return _accepted(f"{prefix}: {answer.removeprefix('answer to ')}")
        case list():
            return [_asked_by(prefix, each) for each in expected]
        case dict():
            return {key: _asked_by(prefix, each) for key, each in expected.items()}
    return expected


#: A server and a mode of a client that do not get on without a proxy, and the reason.
APART = {
    (MODERN, LEGACY): "the server knows no initialize",
    (LEGACY, MODERN): "the server knows no request without one",
}


def differences(record: Json, expected: Json) -> Json:
    """Each step that gave something else: what it gave, and what it should have."""
    seen = dict(record)
    if isinstance(tools := record.get("tools"), list):
        seen["tools"] = tools[: len(TOOLS)]
    return {
        step: {"got": seen.get(step), "wanted": wanted}
        for step, wanted in expected.items()
        if seen.get(step) != wanted
    }

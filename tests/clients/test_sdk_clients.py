"""Every official SDK, old and new, in each of its ways to connect, works with the real command."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

import pytest

from tests.clients.programs import HERE, ROOT, node, node_modules, python_with_mcp1, run_client
from tests.support.proxy_process import GUNICORN, GUNICORN_CHECKOUT, ProxyProcess

_PYTHON = str(HERE / "python_client.py")
_TYPESCRIPT = str(HERE / "typescript_client.mjs")

_QUESTION = "How much?"
_SCHEMA = {"type": "object", "properties": {"answer": {"type": "string"}}, "required": ["answer"]}

Json = dict[str, Any]


def python_1(url: str) -> Json:
    """SDK 1.x in its own environment."""
    return run_client(python_with_mcp1(), _PYTHON, url, "legacy")


def python_2_auto(url: str) -> Json:
    """SDK 2.x as it comes: it asks server/discover first."""
    return run_client(sys.executable, _PYTHON, url, "auto")


def python_2_legacy(url: str) -> Json:
    """SDK 2.x told to initialize at once."""
    return run_client(sys.executable, _PYTHON, url, "legacy")


def typescript_1(url: str) -> Json:
    """@modelcontextprotocol/sdk."""
    node_modules()
    return run_client(node(), _TYPESCRIPT, url, "1")


def typescript_2_default(url: str) -> Json:
    """@modelcontextprotocol/client as it comes: it initializes at once."""
    node_modules()
    return run_client(node(), _TYPESCRIPT, url, "2", "default")


def typescript_2_auto(url: str) -> Json:
    """@modelcontextprotocol/client told to ask server/discover first."""
    node_modules()
    return run_client(node(), _TYPESCRIPT, url, "2", "auto")


#: The version of each client's SDK, and the revision that it settles on.
CLIENTS = {
    python_1: ("1.", "2025-11-25"),
    python_2_auto: ("2.", "2026-07-28"),
    python_2_legacy: ("2.", "2025-11-25"),
    typescript_1: ("1.", "2025-11-25"),
    typescript_2_default: ("2.", "2025-11-25"),
    typescript_2_auto: ("2.", "2026-07-28"),
}


@pytest.mark.parametrize("way", [GUNICORN, GUNICORN_CHECKOUT], ids=["package", "checkout"])
def test_gunicorn_itself_serves_a_client_like_the_command(
    way: Sequence[str], demo: ProxyProcess
) -> None:
    command = [sys.executable, "-I", "-S", str(ROOT / "mcp_proxy" / "demo" / "server.py")]
    with ProxyProcess(command, way=way) as proxy:
        assert python_2_auto(proxy.url) == python_2_auto(demo.url)


@pytest.fixture(scope="module", params=CLIENTS, ids=lambda client: client.__name__)
def seen(request: pytest.FixtureRequest, demo: ProxyProcess) -> Json:
    """What one client saw, and the revision that it should have settled on."""
    version, revision = CLIENTS[request.param]
    document: Json = request.param(demo.url)
    assert document["sdk"].startswith(version)
    return document | {"expected_revision": revision}


def test_client_settles_on_the_last_revision_of_its_era(seen: Json) -> None:
    assert seen["revision"] == seen["expected_revision"]


def test_client_lists_the_tools(seen: Json) -> None:
    assert seen["tools"] == ["echo", "add", "count", "log", "ask"]


def test_client_gets_text_back_as_it_was(seen: Json) -> None:
    assert seen["echo"] == [{"type": "text", "text": "Grüße, 世界 \N{WAVING HAND SIGN}"}]


def test_client_is_told_the_progress_of_a_call_before_its_result(seen: Json) -> None:
    assert seen["progress"] == [[1, 3], [2, 3], [3, 3]]
    assert seen["count"] == [{"type": "text", "text": "counted to 3"}]


def test_client_answers_an_elicitation_during_a_call(seen: Json) -> None:
    (asked,) = seen["elicited"]
    assert (asked["message"], asked["requestedSchema"]) == (_QUESTION, _SCHEMA)
    (answered,) = seen["elicitation"]
    assert json.loads(answered["text"]) == {"action": "accept", "content": {"answer": "forty-two"}}


def test_client_answers_a_sampling_request_during_a_call(seen: Json) -> None:
    (asked,) = seen["sampled"]
    assert asked["messages"][0]["content"] == {"type": "text", "text": _QUESTION}
    (answered,) = seen["sampling"]
    assert json.loads(answered["text"])["content"] == {"type": "text", "text": "forty-two"}

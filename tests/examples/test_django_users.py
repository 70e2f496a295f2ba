"""The users of a Django project as callers of the proxy in it."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from tests.examples.serving import require
from tests.examples.test_django import imported
from tests.support.callers import KeyFile
from tests.support.front import INITIALIZE, SCRIPTED, Answer, HttpFront, Json, McpClient
from tests.support.proxy_process import ProxyProcess

_WAY = ("-m", "gunicorn", "-c", "python:tests.live.plain_gunicorn")

_SERVER = {"command": list(SCRIPTED), "threads": 16}
_LOGINS = "MIDDLEWARE=['django.contrib.auth.middleware.AuthenticationMiddleware']"


class LoggedIn:
    """A way in whose requests carry the cookies of a browser."""

    def __init__(self, base: str, name: str) -> None:
        self._front = HttpFront(base)
        self.browser = requests.Session()
        self.browser.get(f"{base}/login/{name}", timeout=10).raise_for_status()

    def request(self, method: str, path: str, headers: Json, body: bytes | None) -> Answer:
        cookies = "; ".join(f"{name}={value}" for name, value in self.browser.cookies.items())
        return self._front.request(method, path, {**headers, "Cookie": cookies}, body)


@contextlib.contextmanager
def site(tmp_path: Path, **given: Any) -> Iterator[ProxyProcess]:
    """The project under gunicorn."""
    require("django")
    environment = {
        "MCP_PROXY_OF_DJANGO": json.dumps({**_SERVER, **given}),
        "DATABASE_OF_DJANGO": str(tmp_path / "users.sqlite3"),
    }
    way = (*_WAY, "tests.examples.django_users:application")
    with ProxyProcess(way=way, environment=environment) as process:
        yield process


def status_of(process: ProxyProcess, **headers: str) -> int:
    """What an initialize of somebody who is not logged in is answered."""
    shown = {name.replace("_", "-"): value for name, value in headers.items()}
    url = f"{process.base}/mcp"
    answer = requests.post(url, json=INITIALIZE, headers=shown, timeout=10, allow_redirects=False)
    return answer.status_code


def test_a_session_belongs_to_the_user_that_began_it(tmp_path: Path) -> None:
    with site(tmp_path) as process:
        alice, bob = LoggedIn(process.base, "alice"), LoggedIn(process.base, "bob")
        client = McpClient(alice).open()
        assert client.call("ping").status == 200
        assert client.at(bob).call("ping").status == 404
        assert client.at(LoggedIn(process.base, "alice")).call("ping").status == 200
        assert client.at(HttpFront(process.base)).call("ping").status == 401
        alice.browser.get(f"{process.base}/logout", timeout=10)
        assert client.call("ping").status == 401


def test_who_is_not_logged_in_is_answered_as_a_client_and_not_as_a_browser(tmp_path: Path) -> None:
    with site(tmp_path) as process:
        assert status_of(process) == 401


def test_keys_let_others_in_beside_the_users(tmp_path: Path) -> None:
    keys = KeyFile(tmp_path / "keys")
    key = keys.add("alice")
    with site(tmp_path, api_keys=keys.text) as process:
        assert status_of(process, X_API_Key=key) == 200
        assert status_of(process, X_API_Key="other") == 401
        assert McpClient(LoggedIn(process.base, "bob")).initialize().status == 200


def test_a_server_gets_variables_of_its_user(tmp_path: Path) -> None:
    settings = {
        "env_for": "tests.examples.django_users.variables",
        "env_from": ["CLAIMED=claim:username"],
    }
    with site(tmp_path, **settings) as process:
        for name in ("alice", "bob"):
            client = McpClient(LoggedIn(process.base, name)).open()
            environ = client.call("environment").message()["result"]["environ"]
            assert (environ["USER_OF_DJANGO"], environ["CLAIMED"]) == (name, name)


def test_a_function_of_the_project_may_say_who_calls(tmp_path: Path) -> None:
    with site(tmp_path, authenticate="tests.examples.django_users.badge") as process:
        assert status_of(process, X_Badge="carol") == 200
        assert status_of(process) == 401
        assert McpClient(LoggedIn(process.base, "alice")).initialize().status == 401


def test_where_no_login_is_required_everybody_is_served(tmp_path: Path) -> None:
    with site(tmp_path, login_required=False) as process:
        assert status_of(process) == 200


@pytest.mark.parametrize(
    ("given", "is_asked"),
    [
        ("MCP_PROXY={}", False),
        (f"MCP_PROXY={{}}, {_LOGINS}", True),
        (f"MCP_PROXY={{'login_required': False}}, {_LOGINS}", False),
        ("MCP_PROXY={'login_required': True}", True),
    ],
)
def test_users_are_asked_for_where_there_are_some(given: str, is_asked: bool) -> None:
    shown = "mcp_proxy.django.application.edge.authenticator is not None"
    assert imported(given, shown) == str(is_asked)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ("'env_for': 'nowhere.at_all'", "env_for: No module named 'nowhere'"),
        ("'authenticate': 5", "authenticate is a function of a request, or the dotted path of one"),
    ],
)
def test_a_function_that_there_is_not_is_a_sentence(given: str, sentence: str) -> None:
    assert f"ImproperlyConfigured: MCP_PROXY: {sentence}" in imported(f"MCP_PROXY={{{given}}}")

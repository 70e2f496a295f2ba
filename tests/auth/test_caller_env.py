"""Which variables a server gets of its caller: what a request has, and what cannot be one."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcp_proxy import (
    ConfigError,
    Principal,
    ProxyConfig,
    ProxyOptions,
    SSEProxy,
    StreamableProxy,
    create_app,
)
from mcp_proxy.auth.caller_env import CallerEnv, as_text
from mcp_proxy.errors import InvalidRequest
from mcp_proxy.servers import StdioServer, UnservedServer
from mcp_proxy.servers_file import read_servers
from tests.support.front import SCRIPTED, McpClient, WsgiFront
from tests.support.sse_client import SseClient

TEXTS = st.text(st.characters(blacklist_characters="\0\r\n", blacklist_categories=("Cs",)))


def values_of(
    env_from: dict[str, str], environ: dict[str, Any], principal: Principal | None = None
) -> Mapping[str, str]:
    source = CallerEnv.of(StdioServer("s", ("true",), env_from=env_from), None)
    assert source is not None
    return source.values_of(environ, principal)


def of_user(environ: dict[str, Any]) -> dict[str, str]:
    """A hook: the variables as a header has them."""
    found: dict[str, str] = json.loads(environ.get("HTTP_X_VARIABLES", '{"TOKEN": "none"}'))
    return found


# --- from a request ------------------------------------------------------------------------------


def test_headers_and_claims_become_variables() -> None:
    env_from = {"TOKEN": "header:X-Token", "WHO": "claim:sub", "LEVEL": "claim:level"}
    principal = Principal("p", claims={"sub": "ann", "level": 3})
    found = values_of(env_from, {"HTTP_X_TOKEN": "t"}, principal)
    assert found == {"TOKEN": "t", "WHO": "ann", "LEVEL": "3"}


def test_what_is_optional_may_be_missing() -> None:
    assert values_of({"TOKEN": "header:X-Token?", "WHO": "claim:sub?"}, {}) == {}


@pytest.mark.parametrize("source", ["header:X-Token", "claim:sub"])
def test_what_is_missing_is_named(source: str) -> None:
    with pytest.raises(InvalidRequest, match=source.replace(":", " ")):
        values_of({"TOKEN": source}, {}, Principal("p"))


@pytest.mark.parametrize("unfit", ["a\0b", "a\nb", "a\rb"])
def test_nul_and_line_breaks_are_refused_and_not_shown(unfit: str) -> None:
    with pytest.raises(InvalidRequest, match="claim sub has a NUL or a line break") as refused:
        values_of({"WHO": "claim:sub"}, {}, Principal("p", claims={"sub": unfit}))
    assert unfit not in str(refused.value)
    with pytest.raises(InvalidRequest, match="header X-T has a NUL or a line break"):
        values_of({"T": "header:X-T"}, {"HTTP_X_T": unfit})


@pytest.mark.parametrize("claim", [["a"], {"a": "b"}])
def test_a_claim_that_is_no_text_is_refused(claim: object) -> None:
    with pytest.raises(InvalidRequest, match="claim sub is no text"):
        values_of({"WHO": "claim:sub"}, {}, Principal("p", claims={"sub": claim}))


@given(TEXTS.filter(bool))
def test_the_bytes_of_a_header_arrive_as_they_came(text: str) -> None:
    environ = {"HTTP_X_T": text.encode().decode("latin-1")}
    assert values_of({"T": "header:X-T"}, environ) == {"T": text}


@given(st.dictionaries(st.text("ABC_"), TEXTS), st.dictionaries(st.text("ABC_"), TEXTS))
def test_equal_values_alone_have_the_same_text(one: dict[str, str], other: dict[str, str]) -> None:
    assert (as_text(one) == as_text(other)) is (one == other)
    assert as_text(one) == as_text(dict(reversed(one.items())))


def test_a_server_without_sources_and_hook_gets_nothing() -> None:
    assert CallerEnv.of(StdioServer("s", ("true",)), None) is None


# --- as it is configured -------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["header:", "claim:", "header:X Y", "ghp_secret", "cookie:x"])
def test_a_source_of_another_form_is_an_error_that_does_not_show_it(source: str) -> None:
    with pytest.raises(ConfigError, match=r"TOKEN.*header:NAME or claim:NAME") as refused:
        StdioServer("s", ("true",), env_from={"TOKEN": source})
    assert "ghp_secret" not in str(refused.value)


def test_an_entry_of_the_file_names_the_sources(tmp_path: Path) -> None:
    entries = {
        "good": {"command": "true", "env_from": {"T": "header:X-T?"}},
        "remote": {"url": "http://127.0.0.1:1/mcp", "env_from": {"T": "header:X-T"}},
        "wrong": {"command": "true", "env_from": {"T": "X-T"}},
    }
    path = tmp_path / "servers.json"
    path.write_text(json.dumps({"mcpServers": entries}))
    good, remote, wrong = read_servers(path, {})
    assert isinstance(good, StdioServer)
    assert good.env_from == {"T": "header:X-T?"}
    assert isinstance(remote, UnservedServer)
    assert "env_from belongs to a command" in remote.reason
    assert isinstance(wrong, UnservedServer)
    assert "env_from" in wrong.reason


def test_the_server_of_command_has_a_setting() -> None:
    config = ProxyConfig(command=["true"], env_from=["TOKEN=header:X-Token", "WHO=claim:sub?"])
    (server,) = config.servers()
    assert isinstance(server, StdioServer)
    assert server.env_from == {"TOKEN": "header:X-Token", "WHO": "claim:sub?"}
    with pytest.raises(ConfigError, match="env_from"):
        ProxyConfig(command=["true"], env_from=["TOKEN=X-Token"])
    with pytest.raises(ConfigError, match="belong to a command"):
        ProxyConfig(target_url=["http://127.0.0.1:1/mcp"], env_from=["T=header:X-T"])


# --- a hook --------------------------------------------------------------------------------------


@pytest.fixture(params=["streamable", "application"])
def hooked(request: pytest.FixtureRequest) -> Iterator[WsgiFront]:
    """A way in to the scripted server, whose variables `of_user` decides."""
    if request.param == "streamable":
        with StreamableProxy(SCRIPTED, env_for=of_user) as proxy:
            front = WsgiFront(proxy)
            yield front
    else:
        with create_app(ProxyConfig(command=SCRIPTED), env_for=of_user) as app:
            yield WsgiFront(app)


def begun(front: WsgiFront, **variables: str) -> dict[str, str]:
    """The environment of the server of a new session."""
    client = McpClient(front)
    shown = {"X_Variables": json.dumps(variables)}
    assert client.initialize(**shown).has_succeeded
    environ: dict[str, str] = client.call("environment", **shown).message()["result"]["environ"]
    return environ


def test_a_hook_says_what_the_server_gets(hooked: WsgiFront) -> None:
    assert begun(hooked, TOKEN="one", LANG="two").items() >= {"TOKEN": "one", "LANG": "two"}.items()
    assert begun(hooked, TOKEN="three")["TOKEN"] == "three"
    assert os.environ.get("TOKEN") is None


def test_a_hook_with_a_line_break_is_refused(hooked: WsgiFront) -> None:
    answer = McpClient(hooked).initialize(X_Variables='{"TOKEN": "a\\nb"}')
    assert answer.status == 400
    assert "The variable TOKEN" in answer.error()["message"]


def test_a_hook_that_returns_something_else_fails_the_request(hooked: WsgiFront) -> None:
    answer = McpClient(hooked).initialize(X_Variables='["TOKEN"]')
    assert answer.failure is not None


def test_the_sse_transport_has_the_hook() -> None:
    with SSEProxy(SCRIPTED, env_for=of_user) as proxy:
        front = WsgiFront(proxy)
        client = SseClient(front).open()
        try:
            assert client.result("environment")["environ"]["TOKEN"] == "none"
        finally:
            assert client.stream is not None
            client.stream.close()


def test_no_server_is_started_ahead() -> None:
    """Nobody knows then for whom it would be."""
    options = ProxyOptions(spare_children=1)
    named = StdioServer("s", SCRIPTED, env_from={"TOKEN": "header:X-Token"})
    for command, env_for, may_be in [
        (SCRIPTED, None, True),
        (SCRIPTED, of_user, False),
        (named, None, False),
    ]:
        with StreamableProxy(command, options=options, env_for=env_for) as proxy:
            proxy.owner.spares.keep()
            assert proxy.owner.spares.was_started is may_be

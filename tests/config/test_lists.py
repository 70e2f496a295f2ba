"""Lists: the same entries from the environment, from options and in code."""

from __future__ import annotations

import pytest

from mcp_proxy.config import ProxyConfig, settings
from mcp_proxy.errors import ConfigError
from mcp_proxy.server.cli import read_config
from tests.config.samples import NEED_COMMAND

URLS = {
    "http://a/mcp,https://b/mcp": ("http://a/mcp", "https://b/mcp"),
    "http://a/mcp, HTTP://b/mcp ,http://c": ("http://a/mcp", "HTTP://b/mcp", "http://c"),
    " http://a\nhttp://b\t http://c, ": ("http://a", "http://b", "http://c"),
    "https://h/v2/mcp?t=a,b": ("https://h/v2/mcp?t=a,b",),
    "https://h/v2/mcp?t=a,b,http://i?u=,": ("https://h/v2/mcp?t=a,b", "http://i?u="),
}

#: By the name of a setting: texts, and the entries that each of them stands for.
LISTS: dict[str, dict[str, tuple[str, ...]]] = {
    "target_url": URLS,
    "allowed_backends": {**URLS, "http://a,*": ("http://a", "*"), "*": ("*",)},
    "env": {
        "A=1,B=2": ("A=1", "B=2"),
        " A=1 , B_2=x=y,": ("A=1", "B_2=x=y,"),
        "A=a=1,b=2,C=3": ("A=a=1,b=2", "C=3"),
        "A=1,2, 3,4=5": ("A=1,2, 3,4=5",),
        "A=a b\nB=x,C=1\n": ("A=a b", "B=x,C=1"),
        "A=x,C=1\n": ("A=x,C=1",),
    },
    "forward_headers": {
        "X-A: 1,X-B:": ("X-A: 1", "X-B:"),
        "Accept: a/b, c/d;q=1 , X-B: x y": ("Accept: a/b, c/d;q=1", "X-B: x y"),
        "X-Date: Sat, 28 Nov 2026 12:00:00": ("X-Date: Sat, 28 Nov 2026 12:00:00",),
        "X-A: b, c: d\nX-B: 1\n": ("X-A: b, c: d", "X-B: 1"),
    },
    "stdio_transports": {"sse,streamable": ("sse", "streamable"), "sse": ("sse",)},
    **{
        name: {f"{a},{b}": (a, b), f" {a} {b},\n": (a, b), f"{a}\n{b}": (a, b), a: (a,)}
        for name, a, b in [
            ("allowed_origins", "http://a", "https://b:1"),
            ("allowed_hosts", "a.example", "::1"),
            ("trusted_proxies", "10.0.0.1", "fd00::/8"),
            ("sticky_cookies", "route", "MINE*"),
            ("jwt_audience", "mcp", "https://a.example/mcp"),
            ("jwt_scopes", "mcp:use", "b"),
            ("env_from", "A=header:X-A", "B=claim:sub?"),
        ]
    },
}

CASES = [(name, text, entries) for name, texts in LISTS.items() for text, entries in texts.items()]


def test_every_list_is_there() -> None:
    assert {"command", *LISTS} == {setting.name for setting in settings() if setting.is_list}


@pytest.mark.parametrize(("name", "text", "entries"), CASES)
def test_a_text_is_the_same_list_in_the_environment_and_as_an_option(
    name: str, text: str, entries: tuple[str, ...]
) -> None:
    command = {"MCP_PROXY_COMMAND": "server"} if name in NEED_COMMAND else {}
    words = ["--", "server"] if name in NEED_COMMAND else []
    made = [
        ProxyConfig.from_env({f"MCP_PROXY_{name.upper()}": text, **command}),
        read_config([f"--{name}={text}", *words]),
        read_config([*(f"--{name}={entry}\n" for entry in entries), *words]),
        ProxyConfig(**{name: list(entries), "command": tuple(words[1:])}),
    ]
    assert [getattr(config, name) for config in made] == [entries] * 4


def test_an_option_is_repeated_or_separated() -> None:
    made = read_config(["--allowed-hosts", "a,b", "--allowed-hosts", "c d"])
    assert made.allowed_hosts == ("a", "b", "c", "d")


@pytest.mark.parametrize("text", ["a,b", "http://a,b", "http://a:1,b:2/mcp"])
def test_what_a_comma_does_not_separate_is_no_target(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^target_url: only absolute .* are taken, not "):
        ProxyConfig.from_env({"MCP_PROXY_TARGET_URL": text})


@pytest.mark.parametrize("name", LISTS)
def test_an_entry_in_code_is_taken_as_it_is(name: str) -> None:
    with pytest.raises(ConfigError, match=f"^{name}: expected a list of "):
        ProxyConfig(**{name: "http://a"})

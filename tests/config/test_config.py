"""The settings: what the environment and a file may say, and what is refused with a sentence."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcp_proxy import config
from mcp_proxy.config import ProxyConfig
from mcp_proxy.errors import ConfigError
from mcp_proxy.servers import StdioServer, read_servers
from tests.config.samples import NEED_COMMAND, SAMPLES


def from_env(**texts: str) -> ProxyConfig:
    return ProxyConfig.from_env({f"MCP_PROXY_{name.upper()}": text for name, text in texts.items()})


# --- the table -----------------------------------------------------------------------------------


def test_every_setting_says_what_it_is_for() -> None:
    for setting in config.settings():
        assert setting.reason, setting.name
        assert "\n" not in setting.reason
        assert hasattr(ProxyConfig(), setting.name)


def test_the_samples_cover_the_table() -> None:
    assert [setting.name for setting in config.settings()] == ["command", *SAMPLES]


def test_lists_and_secrets_are_marked() -> None:
    lists = {setting.name for setting in config.settings() if setting.is_list}
    assert lists == {
        *("command", "env", "target_url", "allowed_origins", "allowed_hosts"),
        *("allowed_backends", "trusted_proxies", "forward_headers", "stdio_transports"),
    }
    assert "redis_url" in {setting.name for setting in config.settings() if setting.secret}


def test_without_any_setting_the_defaults_hold() -> None:
    assert ProxyConfig.from_env({}) == ProxyConfig()
    assert from_env() == config.from_values({})


def test_the_documented_defaults() -> None:
    default = ProxyConfig()
    assert (default.bind, default.workers, default.threads) == ("127.0.0.1:8080", 1, 64)
    assert (default.session_ttl, default.unknown_session_status) == (7200, 400)
    assert (default.redis_url, default.redis_prefix) == (None, "mcp-proxy:")


# --- the environment -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", SAMPLES)
def test_every_setting_is_an_environment_variable(name: str) -> None:
    sample = SAMPLES[name]
    others = {"command": "server"} if name in NEED_COMMAND else {}
    value = getattr(from_env(**others, **{name: sample.text}), name)
    assert (value, type(value)) == (sample.value, type(sample.value))


def test_a_command_is_split_as_a_shell_would() -> None:
    made = from_env(command='server --name \'two words\' "a\\"b" c\\ d')
    assert made.command == ("server", "--name", "two words", 'a"b', "c d")


def test_the_environment_of_the_process_is_what_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MCP_PROXY_THREADS", "9")
    assert ProxyConfig.from_env().threads == 9
    assert config.environment_values() == {"threads": "9"}


def test_variables_of_other_programs_are_left_alone() -> None:
    environ = {"PATH": "/bin", "MCP_PROXYX": "1", "XMCP_PROXY_THREADS": "1", "THREADS": "1"}
    assert ProxyConfig.from_env(environ) == ProxyConfig()


def test_the_mark_of_a_child_is_no_setting() -> None:
    assert from_env(replica="abc") == ProxyConfig()


@pytest.mark.parametrize("name", ["THREAD", "NO_SUCH", ""])
def test_an_unknown_variable_is_refused_by_its_full_name(name: str) -> None:
    with pytest.raises(ConfigError, match=f"MCP_PROXY_{name}$"):
        ProxyConfig.from_env({f"MCP_PROXY_{name}": "1"})


def test_texts_by_name_are_values_too() -> None:
    assert config.values_of({"env": "A=1,B=2", "threads": "4", "command": "a 'b c'"}) == {
        "env": ["A=1", "B=2"],
        "threads": "4",
        "command": ("a", "b c"),
    }
    with pytest.raises(ConfigError, match=r"Unknown setting thread$"):
        config.values_of({"thread": "4"})


def test_values_may_be_texts_or_what_they_mean() -> None:
    texts = config.from_values({"threads": "8", "session_ttl": "5", "command": ["a"]})
    values = config.from_values({"threads": 8, "session_ttl": 5.0, "command": ("a",)})
    assert texts == values


# --- what is refused -----------------------------------------------------------------------------

TOO_SMALL = {
    **dict.fromkeys(("session_ttl", "request_timeout", "connect_timeout", "sse_after"), "0"),
    "keepalive_interval": "-1",
    **dict.fromkeys(("max_body_bytes", "max_message_bytes", "max_sessions", "max_streams"), "0"),
    "workers": "0",
    "threads": "3",
}


@pytest.mark.parametrize(("name", "text"), TOO_SMALL.items())
def test_what_is_too_small_is_refused(name: str, text: str) -> None:
    with pytest.raises(ConfigError, match=f"^{name}: .*>"):
        from_env(**{name: text})


@pytest.mark.parametrize("text", ["nan", "inf", "-inf", "1e400", "1e300"])
@pytest.mark.parametrize("name", ["session_ttl", "connect_timeout", "request_timeout"])
def test_a_time_without_end_is_refused(name: str, text: str) -> None:
    with pytest.raises(ConfigError, match=f"^{name}: "):
        from_env(**{name: text})


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("session_ttl", "two hours"),
        ("session_ttl", ""),
        ("threads", "4.5"),
        ("threads", "many"),
        ("max_streams", "some"),
        ("unknown_session_status", "403"),
        ("unknown_session_status", "x"),
        ("stdio_mode", "shared"),
        ("log_format", "xml"),
        ("log_level", "loud"),
        ("worker_class", "sync"),
    ],
)
def test_what_a_setting_cannot_be_is_refused_by_its_name(name: str, text: str) -> None:
    with pytest.raises(ConfigError, match=f"^{name}: ") as caught:
        from_env(**{name: text})
    assert "`" not in str(caught.value)


def test_a_complaint_shows_the_value_as_it_was_written() -> None:
    with pytest.raises(ConfigError, match="INFO"):
        from_env(log_level="INFO")


def test_a_value_of_the_wrong_kind_is_refused_by_its_name() -> None:
    with pytest.raises(ConfigError, match=r"^threads: expected int"):
        config.from_values({"threads": []})
    with pytest.raises(ConfigError, match=r"^command"):
        config.from_values({"command": ["a", 1]})


def test_an_unknown_name_among_values_is_refused() -> None:
    with pytest.raises(ConfigError, match="thread"):
        config.from_values({"thread": 4})


def test_a_command_and_a_file_contradict_each_other() -> None:
    with pytest.raises(ConfigError, match="not both"):
        from_env(command="server", config="servers.json")


@pytest.mark.parametrize("setting", [{"env": "A=1"}, {"cwd": "/srv"}])
@pytest.mark.parametrize("other", [{}, {"config": "servers.json"}])
def test_env_and_cwd_need_a_command(setting: dict[str, str], other: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="belong to a command"):
        from_env(**setting, **other)


def test_env_takes_pairs() -> None:
    with pytest.raises(ConfigError, match="NAME=VALUE"):
        from_env(command="server", env="A=1,B")


@pytest.mark.parametrize("text", ["", "on", "0,", ",0", "0;1", "-1", "0-3", "0, 1", "1.5"])
def test_cpu_affinity_is_a_list_or_one_of_two_words(text: str) -> None:
    with pytest.raises(ConfigError, match="cpu_affinity"):
        from_env(cpu_affinity=text)


@pytest.mark.parametrize("text", ["server 'unfinished", 'server "', "server \\"])
def test_a_command_that_no_shell_could_split_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="command"):
        from_env(command=text)
    with pytest.raises(ConfigError, match="command"):
        config.as_command(text)


@given(st.dictionaries(st.sampled_from(["command", *SAMPLES]), st.text(), max_size=3))
def test_any_texts_are_a_configuration_or_a_config_error(texts: dict[str, str]) -> None:
    with contextlib.suppress(ConfigError):
        repr(from_env(**texts))


# --- secrets -------------------------------------------------------------------------------------


def test_a_configuration_shows_what_differs_from_the_defaults() -> None:
    made = from_env(threads="8", command="server --flag")
    assert repr(made) == "ProxyConfig(command=('server', '--flag'), threads=8)"
    assert repr(ProxyConfig()) == "ProxyConfig()"


def test_the_address_of_redis_is_never_shown() -> None:
    made = from_env(redis_url="redis://user:hunter2@127.0.0.1/0")
    assert repr(made) == f"{made}" == "ProxyConfig(redis_url='***')"


def test_the_environment_of_a_server_is_never_shown() -> None:
    made = from_env(command="server", env="TOKEN=hunter2")
    assert "hunter2" not in repr(made)
    (server,) = made.servers()
    assert "hunter2" not in f"{server!r} {server}"


def test_a_complaint_about_the_environment_of_a_server_does_not_show_it() -> None:
    with pytest.raises(ConfigError) as caught:
        from_env(command="server", env="TOKEN=hunt,er2")
    assert "er2" not in str(caught.value)


# --- what follows from settings ------------------------------------------------------------------


@pytest.mark.parametrize(("threads", "limit"), [(4, 2), (8, 6), (16, 12), (64, 48), (200, 150)])
def test_streams_leave_a_quarter_of_the_threads_free(threads: int, limit: int) -> None:
    assert ProxyConfig(threads=threads).stream_limit == limit


def test_the_number_of_streams_can_be_given() -> None:
    assert ProxyConfig(threads=64, max_streams=60).stream_limit == 60


@pytest.mark.parametrize(("text", "cpus"), [("0", (0,)), ("0,2", (0, 2)), ("3,1,11", (3, 1, 11))])
def test_cpus_are_numbers(text: str, cpus: tuple[int, ...]) -> None:
    assert ProxyConfig(cpu_affinity=text).cpus() == cpus


@pytest.mark.parametrize("word", ["auto", "off"])
def test_the_words_of_cpu_affinity_are_no_list(word: str) -> None:
    with pytest.raises(ConfigError):
        ProxyConfig(cpu_affinity=word).cpus()


def test_without_a_server_the_demo_is_served() -> None:
    (server,) = ProxyConfig().servers()
    assert server.name == "demo"
    assert server.argv[0] == sys.executable
    assert Path(server.argv[-1]).is_file()


def test_a_command_is_the_one_server() -> None:
    made = from_env(command="server 'a b'", env="A=1,B=x=y", cwd="/srv")
    (server,) = made.servers()
    assert server == StdioServer("default", ("server", "a b"), {"A": "1", "B": "x=y"}, "/srv")
    assert str(server) == "server 'a b'"


def test_a_command_may_be_a_text_or_words() -> None:
    assert config.as_command("a 'b c'") == config.as_command(["a", "b c"]) == ("a", "b c")


@pytest.mark.parametrize("command", ["", "  ", [], ()])
def test_an_empty_command_is_refused(command: Any) -> None:
    with pytest.raises(ConfigError, match="empty"):
        config.as_command(command)


# --- the file ------------------------------------------------------------------------------------


class File:
    """A configuration file of the test."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, document: object) -> None:
        """Puts a document into the file: bytes as they are, a text, or a value as JSON."""
        if isinstance(document, bytes):
            self.path.write_bytes(document)
        else:
            text = document if isinstance(document, str) else json.dumps(document)
            self.path.write_text(text, encoding="utf-8")

    def servers(self, servers: object, **environ: str) -> list[StdioServer]:
        """What is read from a file with these servers."""
        self.write({"mcpServers": servers})
        return read_servers(self.path, environ)


@pytest.fixture
def file(tmp_path: Path) -> File:
    """A file that does not exist yet."""
    return File(tmp_path / "servers.json")


def test_a_file_names_its_servers_in_their_order(file: File) -> None:
    found = file.servers(
        {
            "time": {"command": "time-server"},
            "a.b_C-1": {"command": "x", "args": ["-v", ""], "env": {"A": "1"}, "cwd": "/srv"},
        }
    )
    assert found == [
        StdioServer("time", ("time-server",)),
        StdioServer("a.b_C-1", ("x", "-v", ""), {"A": "1"}, "/srv"),
    ]


def test_the_servers_of_a_configuration_come_from_its_file(
    file: File, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PROGRAM", "from-the-environment")
    file.write({"mcpServers": {"a": {"command": "${PROGRAM}"}}})
    (server,) = from_env(config=str(file.path)).servers()
    assert server == StdioServer("a", ("from-the-environment",))
    assert read_servers(file.path, os.environ) == [server]


def test_keys_of_other_programs_are_left_alone(file: File) -> None:
    entry = {"command": "x", "type": "stdio", "autoApprove": ["${NO_SUCH}"], "timeout": 5}
    file.write({"mcpServers": {"a": entry}, "inputs": [{"id": "${NO_SUCH}"}], "theme": None})
    assert read_servers(file.path, {}) == [StdioServer("a", ("x",))]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("${V}", "value"),
        ("a-${V}-${V}-b", "a-value-value-b"),
        ("${V:-other}", "value"),
        ("${NO_SUCH:-other}", "other"),
        ("${NO_SUCH:-}", ""),
        ("${NO_SUCH:-a b:-c}", "a b:-c"),
        ("${EMPTY}", ""),
        ("$V", "$V"),
        ("${}", "${}"),
        ("${input:token}", "${input:token}"),
        ("${NESTED}", "${V}"),
    ],
)
def test_variables_are_expanded_wherever_a_server_has_text(
    file: File, text: str, expected: str
) -> None:
    environ = {"V": "value", "EMPTY": "", "NESTED": "${V}"}
    entry = {"command": f"c{text}", "args": [text], "env": {"K": text}, "cwd": f"/{text}"}
    (server,) = file.servers({"a": entry}, **environ)
    expanded = StdioServer("a", (f"c{expected}", expected), {"K": expected}, f"/{expected}")
    assert server == expanded


@pytest.mark.parametrize("where", ["command", "args", "env", "cwd"])
def test_a_variable_that_is_not_set_is_refused_by_name(file: File, where: str) -> None:
    values: dict[str, Any] = {"args": ["${NO_SUCH}"], "env": {"A": "${NO_SUCH}"}}
    entry = {"command": "x", where: values.get(where, "${NO_SUCH}")}
    with pytest.raises(ConfigError, match="NO_SUCH is not set") as caught:
        file.servers({"weather": entry})
    assert str(file.path) in str(caught.value)
    assert "weather" in str(caught.value)


@pytest.mark.parametrize("switch", [{"disabled": True}, {"enabled": False}])
def test_a_server_can_be_switched_off(file: File, switch: dict[str, bool]) -> None:
    off = {"command": "x", **switch}
    assert file.servers({"a": {"command": "y"}, "b": off}) == [StdioServer("a", ("y",))]
    with pytest.raises(ConfigError, match="no server is enabled"):
        file.servers({"b": off})


@pytest.mark.parametrize("switch", [{"disabled": False}, {"enabled": True}])
def test_a_server_that_is_not_switched_off_is_on(file: File, switch: dict[str, bool]) -> None:
    assert file.servers({"a": {"command": "x", **switch}}) == [StdioServer("a", ("x",))]


@pytest.mark.parametrize(
    "entry",
    [{"command": "${NO_SUCH}"}, {"url": "https://127.0.0.1/mcp"}, {"command": ""}],
    ids=["a variable", "a url", "no command"],
)
def test_what_is_wrong_with_a_server_that_is_switched_off_does_not_matter(
    file: File, entry: dict[str, str]
) -> None:
    servers = {"a": {"command": "x"}, "b": {**entry, "disabled": True}}
    assert file.servers(servers) == [StdioServer("a", ("x",))]


@pytest.mark.parametrize("name", ["", "a b", "a/b", "é", "a\n", "a?b", "..", "."])
def test_a_name_that_cannot_be_part_of_a_path_is_refused(file: File, name: str) -> None:
    with pytest.raises(ConfigError, match="part of a path"):
        file.servers({name: {"command": "x"}})


@pytest.mark.parametrize(
    ("entry", "complaint"),
    [
        ({}, "command is missing"),
        ({"command": ""}, "command is missing"),
        ({"command": None}, "command is missing"),
        ({"url": "/mcp"}, "url"),
        ({"command": "x", "url": "https://127.0.0.1/mcp"}, "url"),
        ({"command": ["x"]}, "str"),
        ({"command": "x", "args": "y"}, "array"),
        ({"command": "x", "args": [1]}, "str"),
        ({"command": "x", "env": ["A=1"]}, "object"),
        ({"command": "x", "env": {"A": 1}}, "str"),
        ({"command": "x", "disabled": "no"}, "bool"),
        (None, "object"),
        ("x", "object"),
    ],
)
def test_a_server_that_cannot_be_served_is_refused_by_file_and_name(
    file: File, entry: object, complaint: str
) -> None:
    with pytest.raises(ConfigError, match=complaint) as caught:
        file.servers({"fine": {"command": "x"}, "weather": entry})
    assert str(file.path) in str(caught.value)
    assert "weather" in str(caught.value)


@pytest.mark.parametrize(
    "document",
    [
        *(b"", b"{", b"[]", b"null", b"{}", b'{"mcpServers": []}', b'{"mcpServers": {}}'),
        *(b"\xff\xfe{}", b"// no comments\n{}", b"[" * 100_000),
    ],
    ids=lambda document: repr(document[:20]),
)
def test_a_file_of_another_shape_is_refused_by_its_name(file: File, document: bytes) -> None:
    file.write(document)
    with pytest.raises(ConfigError) as caught:
        read_servers(file.path, {})
    assert str(file.path) in str(caught.value)


def test_a_file_that_is_not_there_is_refused_by_its_name(file: File, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file") as caught:
        from_env(config=str(file.path)).servers()
    assert str(file.path) in str(caught.value)
    with pytest.raises(ConfigError, match="directory"):
        read_servers(tmp_path, {})

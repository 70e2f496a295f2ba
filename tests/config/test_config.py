"""The settings: what the environment may say, and what is refused with a sentence."""

from __future__ import annotations

import contextlib
import sys
import traceback
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcp_proxy import config
from mcp_proxy.config import ProxyConfig, ProxyOptions
from mcp_proxy.edge.guard import Guard
from mcp_proxy.errors import ConfigError, Forbidden
from mcp_proxy.servers import StdioServer
from tests.config.samples import NEED_COMMAND, SAMPLES


def from_env(**texts: str) -> ProxyConfig:
    return ProxyConfig.from_env({f"MCP_PROXY_{name.upper()}": text for name, text in texts.items()})


def refusal(**values: Any) -> str:
    """The sentence with which a configuration of these values is refused."""
    with pytest.raises(ConfigError) as caught:
        ProxyConfig(**values)
    return str(caught.value)


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
        *("command", "env", "env_from", "target_url", "allowed_origins", "allowed_hosts"),
        *("allowed_backends", "trusted_proxies", "forward_headers", "stdio_transports"),
        *("sticky_cookies", "jwt_audience", "jwt_scopes"),
    }
    assert "redis_url" in {setting.name for setting in config.settings() if setting.secret}


def test_without_any_setting_the_defaults_hold() -> None:
    assert ProxyConfig.from_env({}) == ProxyConfig()
    assert from_env() == config.from_values({})


@pytest.mark.parametrize(
    "url",
    [
        *("", "on", "proxy", "proxy:3128", "https://proxy", "socks5://proxy", "http://", "//proxy"),
        *("http://u:secret-word@", "http://u:secret-word@proxy:x", "http://secret-word@p/path"),
        *("http://proxy:0", "http://[", "http://proxy?secret-word"),
    ],
)
def test_an_outbound_proxy_is_a_url_or_off(url: str) -> None:
    sentence = refusal(backend_proxy=url)
    assert "backend_proxy must be off or http://HOST:PORT" in sentence
    assert "secret-word" not in sentence


def test_the_password_of_an_outbound_proxy_is_not_shown() -> None:
    given = ProxyOptions(backend_proxy="http://u:secret-word@proxy:3128/")
    assert "secret-word" not in repr(given)
    assert from_env(backend_proxy="OFF").backend_proxy == "off"


def test_the_documented_defaults() -> None:
    default = ProxyConfig()
    assert (default.bind, default.workers, default.threads) == ("127.0.0.1:8080", 1, 64)
    assert (default.session_ttl, default.unknown_session_status) == (7200, 400)
    assert (default.redis_url, default.redis_prefix) == (None, "mcp-proxy:")


# --- the options of one transport ----------------------------------------------------------------


def test_the_settings_of_a_transport_are_among_those_of_the_program() -> None:
    options = config.settings(ProxyOptions)
    assert [setting.name for setting in options] == [
        *("session_ttl", "unknown_session_status", "failure_status", "request_timeout"),
        "connect_timeout",
        *("keepalive_interval", "sse_after", "max_body_bytes", "max_message_bytes"),
        *("max_sessions", "evict_after", "idle_timeout", "spare_children", "stateless_children"),
        "bridge",
        *("input_timeout", "keep_detached"),
        *("max_streams", "threads", "allowed_origins", "allowed_hosts"),
        *("trusted_proxies", "forward_headers", "preserve_host", "public_url", "api_keys"),
        *("rate_limit", "rate_limit_scope", "backend_proxy", "sticky_cookies"),
        *("jwt_issuer", "jwt_audience", "jwt_jwks_url", "jwt_scopes"),
    ]
    assert [setting for setting in config.settings() if setting in options] == list(options)
    assert isinstance(ProxyConfig(), ProxyOptions)


def test_the_options_of_a_transport_leave_the_program_alone() -> None:
    assert ProxyOptions(threads=8).stream_limit == ProxyConfig(threads=8).stream_limit == 6
    with pytest.raises(TypeError, match="bind"):
        ProxyOptions(bind="127.0.0.1:1")  # type: ignore[call-arg]


@pytest.mark.parametrize(("threads", "most"), [(4, 2), (8, 6), (64, 48)])
def test_streams_leave_a_quarter_of_the_threads_to_calls(threads: int, most: int) -> None:
    assert ProxyConfig(threads=threads, max_streams=most).stream_limit == most
    assert refusal(threads=threads, max_streams=most + 1) == (
        f"max_streams: expected at most {most} with {threads} threads, of which a quarter is "
        f"for calls, got {most + 1}: raise threads, or choose worker_class gevent, whose streams "
        "take none"
    )
    made = ProxyConfig(threads=threads, max_streams=most + 1, worker_class="gevent")
    assert made.stream_limit == most + 1


def test_the_options_of_a_transport_are_shown_by_their_own_name() -> None:
    made = ProxyOptions(threads=8, forward_headers=("Authorization: Bearer hunter2",))
    assert repr(made) == "ProxyOptions(threads=8, forward_headers='***')"
    assert repr(ProxyOptions()) == "ProxyOptions()"


# --- the environment -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", SAMPLES)
def test_every_setting_is_an_environment_variable(name: str) -> None:
    sample = SAMPLES[name]
    others = {"command": "server"} if name in NEED_COMMAND else {}
    value = getattr(from_env(**others, **{name: sample.text}), name)
    assert (value, type(value)) == (sample.value, type(sample.value))


@pytest.mark.parametrize("text", ["", " "])
@pytest.mark.parametrize("name", ["command", *SAMPLES, "no_such"])
def test_an_empty_variable_is_one_that_is_not_set(name: str, text: str) -> None:
    assert from_env(**{name: text}) == ProxyConfig()


@pytest.mark.parametrize(
    ("web_concurrency", "workers", "expected"), [("4", "", 4), ("", "2", 2), ("", "", 1)]
)
def test_the_first_number_of_workers_that_is_not_empty_counts(
    web_concurrency: str, workers: str, expected: int
) -> None:
    environ = {"WEB_CONCURRENCY": web_concurrency, "MCP_PROXY_WORKERS": workers}
    assert ProxyConfig.from_env(environ).workers == expected


@pytest.mark.parametrize(
    ("named", "expected"),
    [
        ({"SSL_CERT_FILE": "c"}, "c"),
        ({"SSL_CERT_FILE": "c", "REQUESTS_CA_BUNDLE": "b"}, "b"),
        ({"REQUESTS_CA_BUNDLE": "b", "MCP_PROXY_CA_FILE": "a"}, "a"),
        ({"REQUESTS_CA_BUNDLE": "", "SSL_CERT_FILE": " "}, None),
    ],
)
def test_the_cas_have_names_of_others_too(named: dict[str, str], expected: str | None) -> None:
    assert ProxyConfig.from_env(named).ca_file == expected


def test_cas_that_cannot_be_used_are_told_where_they_are_needed(tmp_path: Path) -> None:
    (tmp_path / "empty.pem").touch()
    for name, reason in [("no.pem", "No such file"), ("empty.pem", "no certificates")]:
        path = str(tmp_path / name)
        assert reason in refusal(ca_file=path, target_url=("https://h",))
        assert ProxyConfig(ca_file=path, command=("x",)).ca_file == path
    assert ProxyConfig(ca_file=str(tmp_path), target_url=("https://h",)).ca_file == str(tmp_path)


def test_choices_may_be_written_in_capital_letters() -> None:
    made = from_env(log_level="INFO", log_format="Json", stdio_transports="SSE,streamable")
    assert (made.log_level, made.log_format) == ("info", "json")
    assert made.stdio_transports == ("sse", "streamable")


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
    with pytest.raises(ConfigError, match=f"MCP_PROXY_{name}(;|$)"):
        ProxyConfig.from_env({f"MCP_PROXY_{name}": "1"})


def test_texts_by_name_are_values_too() -> None:
    assert config.values_of({"env": "A=1,B=2", "threads": "4", "command": "a 'b c'"}) == {
        "env": ["A=1", "B=2"],
        "threads": "4",
        "command": ("a", "b c"),
    }
    with pytest.raises(ConfigError, match=r"Unknown setting thread; threads is meant, it seems$"):
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
    "spare_children": "-1",
    "workers": "0",
    "threads": "3",
}


@pytest.mark.parametrize(("name", "text"), TOO_SMALL.items())
def test_what_is_too_small_is_refused(name: str, text: str) -> None:
    with pytest.raises(ConfigError, match=f"^{name}: expected a .*number .*, got '{text}'$"):
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
        ("threads", "4.5"),
        ("threads", "many"),
        ("max_streams", "some"),
        ("unknown_session_status", "403"),
        ("unknown_session_status", "x"),
        ("stdio_mode", "shared"),
        ("log_format", "xml"),
        ("log_level", "loud"),
        ("worker_class", "sync"),
        ("passing", "maybe"),
    ],
)
def test_what_a_setting_cannot_be_is_refused_by_its_name(name: str, text: str) -> None:
    with pytest.raises(ConfigError, match=f"^{name}: ") as caught:
        from_env(**{name: text})
    assert repr(text) in str(caught.value)
    assert "`" not in str(caught.value)


def test_a_complaint_shows_the_value_as_it_was_written() -> None:
    assert refusal(log_level="LOUD").startswith("log_level: 'LOUD' is not one of debug, ")


def test_a_value_of_the_wrong_kind_is_refused_by_its_name() -> None:
    with pytest.raises(ConfigError, match=r"^threads: expected a whole number"):
        config.from_values({"threads": []})
    with pytest.raises(ConfigError, match=r"^stdio_transports: 1 is not one of"):
        config.from_values({"stdio_transports": [1]})
    with pytest.raises(ConfigError, match=r"^stdio_transports: expected a list .* got None$"):
        config.from_values({"stdio_transports": None})
    with pytest.raises(ConfigError, match=r"^command"):
        config.from_values({"command": ["a", 1]})


def test_an_unknown_name_among_values_is_refused() -> None:
    with pytest.raises(ConfigError, match="thread"):
        config.from_values({"thread": 4})


def test_a_command_and_a_file_contradict_each_other() -> None:
    with pytest.raises(ConfigError, match="only one of"):
        from_env(command="server", config="servers.json")


@pytest.mark.parametrize("setting", [{"env": "A=1"}, {"env_from": "A=header:B"}, {"cwd": "/srv"}])
@pytest.mark.parametrize("other", [{}, {"config": "servers.json"}])
def test_env_and_cwd_need_a_command(setting: dict[str, str], other: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="belong to a command"):
        from_env(**setting, **other)


def test_env_takes_pairs() -> None:
    with pytest.raises(ConfigError, match="NAME=VALUE"):
        from_env(command="server", env="A")


@pytest.mark.parametrize("text", ["on", "0,", ",0", "0;1", "-1", "0-3", "0, 1", "1.5"])
def test_cpu_affinity_is_a_list_or_one_of_two_words(text: str) -> None:
    with pytest.raises(ConfigError, match="cpu_affinity"):
        from_env(cpu_affinity=text)


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1:0", ":8080", "[::1]:65535", "a.example:80", "tcp://h:1", "fd://3"),
        *("unix:x.sock", "unix:///run/x.sock", "127.0.0.1:1, unix:/run/a b.sock"),
    ],
)
def test_what_gunicorn_listens_on_is_an_address(address: str) -> None:
    assert ProxyConfig(bind=address).bind == address


@pytest.mark.parametrize(
    "address", ["", ":", "h:", "::1", "::1:80", "[::1]", "h:65536", "h:x", "h:1:2", "http://h:1"]
)
def test_what_is_no_address_is_refused(address: str) -> None:
    assert refusal(bind=address).startswith("bind: expected HOST:PORT, ")


def test_the_working_directory_may_be_below_that_of_the_user(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    (server,) = ProxyConfig(command=("x",), cwd="~/y").servers()
    assert server.cwd == "/home/me/y"


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


# --- what is refused where it is made ------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in SAMPLES if name not in NEED_COMMAND])
def test_every_value_is_taken_as_it_is(name: str) -> None:
    value = SAMPLES[name].value
    assert getattr(ProxyConfig(**{name: value}), name) == value


@pytest.mark.parametrize("make", [tuple, list])
def test_lists_become_tuples(make: Any) -> None:
    made = ProxyConfig(command=make(("server", "-v")), allowed_hosts=make(("a.example", "::1")))
    assert (made.command, made.allowed_hosts) == (("server", "-v"), ("a.example", "::1"))
    assert hash(made) == hash(
        ProxyConfig(command=("server", "-v"), allowed_hosts=("a.example", "::1"))
    )


def test_a_whole_number_of_seconds_is_a_number_of_seconds() -> None:
    assert ProxyOptions(session_ttl=5).session_ttl == 5.0


def test_a_change_is_checked_too() -> None:
    options = ProxyOptions(threads=8)
    assert msgspec.structs.replace(options, threads=9).threads == 9
    with pytest.raises(ConfigError, match=r"^threads: "):
        msgspec.structs.replace(options, threads=3)


@pytest.mark.parametrize("kind", [ProxyOptions, ProxyConfig])
def test_a_text_where_a_list_belongs_is_refused(kind: type[ProxyOptions]) -> None:
    with pytest.raises(ConfigError) as caught:
        kind(allowed_hosts="www.example.com")  # type: ignore[arg-type]
    assert str(caught.value) == (
        "allowed_hosts: expected a list of exact names (www.example.com, ::1) or * for all, "
        "got the text 'www.example.com'; write ('www.example.com',)"
    )


@pytest.mark.parametrize(
    ("name", "text", "instead"),
    [
        ("command", "server --flag 'a b'", ("server", "--flag", "a b")),
        ("target_url", "http://a/mcp", ("http://a/mcp",)),
        ("allowed_origins", "http://a, http://b", ("http://a", "http://b")),
        ("trusted_proxies", "*", ("*",)),
        ("stdio_transports", "sse", ("sse",)),
    ],
)
def test_a_text_is_shown_as_the_list_that_it_could_be(
    name: str, text: str, instead: tuple[str, ...]
) -> None:
    assert refusal(**{name: text}).endswith(f", got the text {text!r}; write {instead}")


@given(
    st.sampled_from([setting.name for setting in config.settings() if setting.is_list]), st.text()
)
def test_no_text_is_a_list(name: str, text: str) -> None:
    with pytest.raises(ConfigError):
        ProxyConfig(**{name: text})
    with pytest.raises(ConfigError):
        config.from_values({name: text})


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("threads", "8", "expected a whole number of at least 4, got '8'"),
        ("threads", 3, "expected a whole number of at least 4, got 3"),
        ("threads", 8.5, "expected a whole number of at least 4, got 8.5"),
        ("workers", True, "expected a whole number of at least 1, got True"),
        ("max_streams", 0, "expected a whole number of at least 1, got 0"),
        ("session_ttl", "60", "expected a number above 0 and at most 315360000, got '60'"),
        ("session_ttl", 0, "expected a number above 0 and at most 315360000, got 0"),
        ("sse_after", None, "expected a number above 0 and at most 315360000, got None"),
        ("bind", 8080, "expected a text, got 8080"),
        ("unknown_session_status", 403, "403 is not one of 400, 404, ask"),
        ("unknown_session_status", "404", "'404' is not one of 400, 404, ask"),
        ("stdio_mode", "shared", "'shared' is not one of per-session"),
        ("log_level", "INFO", "'INFO' is not one of debug, error, info, warning"),
        ("stdio_transports", ["sse", "http"], "'http' is not one of sse, streamable"),
        ("stdio_transports", 5, "expected a list of sse, streamable, got 5"),
        ("command", ["a", 1], "only words are taken, not 1"),
    ],
)
def test_a_value_that_does_not_fit_is_refused_by_name_value_and_what_is_allowed(
    name: str, value: object, sentence: str
) -> None:
    assert refusal(**{name: value}) == f"{name}: {sentence}"


ANYTHING = st.one_of(
    *(st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.binary()),
    st.lists(
        st.one_of(st.text(), st.integers(), st.sampled_from(["*", "a=b", "a: b", "http://a"]))
    ),
)


@given(st.sampled_from(["command", *SAMPLES]), ANYTHING)
def test_any_value_is_what_its_annotation_says_or_a_config_error(name: str, value: object) -> None:
    (setting,) = (setting for setting in config.settings() if setting.name == name)
    values: dict[str, Any] = {"command": ("server",), name: value}
    with contextlib.suppress(ConfigError):
        made = getattr(ProxyConfig(**values), name)
        assert msgspec.convert(made, setting.annotation) == made
    with contextlib.suppress(ConfigError):
        config.from_values(values)


# --- names, origins, addresses -------------------------------------------------------------------

HOSTS = ("www.example.com", "localhost", "a_b-1", "10.0.0.1", "::1", "fe80::1", "a.", "*")
HOSTS_WITH_PORT = ("name:8080", "10.0.0.1:80", "[::1]:8080")


@pytest.mark.parametrize("name", [*HOSTS, *HOSTS_WITH_PORT])
def test_what_a_host_header_may_name_is_served(name: str) -> None:
    options = ProxyOptions(allowed_hosts=[name])  # type: ignore[arg-type]
    header = f"[{name}]" if name.count(":") > 1 and "[" not in name else name
    environ = {"SERVER_NAME": "proxy.example", "HTTP_HOST": header}
    Guard(None, options.allowed_hosts).check(environ)
    if name != "*":
        with pytest.raises(Forbidden):
            Guard(None, options.allowed_hosts).check({**environ, "HTTP_HOST": "other.example"})


@pytest.mark.parametrize(
    "name",
    [
        *(
            "*.example.com",
            "www.*",
            "**",
            ".example.com",
            "a..b",
            "",
            " ",
            " a",
            "a ",
            "a\n",
            "a b",
        ),
        *("https://a", "//a", "a/", "a/mcp", "a@b", "[::1]", "::1%", "[a]:1", "a:", "a:b", ":80"),
        *("münchen.example", "a,b", "a?b"),
    ],
)
def test_what_no_host_header_would_equal_is_refused(name: str) -> None:
    sentence = refusal(allowed_hosts=("localhost", name))
    assert sentence.startswith("allowed_hosts: only exact names (")
    assert " or * for all are taken, not " in sentence
    assert ("***" if "@" in name else repr(name)) in sentence


@pytest.mark.parametrize(
    "origin",
    [
        *("http://localhost", "https://a.example:8443", "http://[::1]:80", "http://10.0.0.1"),
        *("chrome-extension://abcdef", "null", "*"),
    ],
)
def test_an_origin_is_taken(origin: str) -> None:
    assert ProxyOptions(allowed_origins=(origin,)).allowed_origins == (origin,)


@pytest.mark.parametrize(
    "origin",
    [
        *("a.example", "a.example:80", "https://*.example.com", "https://*", "*.example.com", ""),
        *(
            "https://a/",
            "https://a/b",
            "https://a?b",
            "https://",
            "://a",
            " https://a",
            "https://a ",
        ),
        *("https://a:", "https://a:b", "https://::1", "https://a b", "NULL"),
    ],
)
def test_what_is_no_origin_is_refused(origin: str) -> None:
    assert refusal(allowed_origins=["null", origin]) == (
        "allowed_origins: only exact origins (https://a.example:8443, null) or * for all "
        f"are taken, not {origin!r}"
    )


NAMES = st.from_regex(r"\A[a-z0-9-]{1,8}(\.[a-z0-9-]{1,8}){0,3}\Z")


@given(NAMES, st.one_of(st.none(), st.integers(1, 65535)), st.sampled_from(["http", "https"]))
def test_any_name_is_a_host_and_the_host_of_an_origin(
    name: str, port: int | None, scheme: str
) -> None:
    place = name if port is None else f"{name}:{port}"
    options = ProxyOptions(allowed_hosts=(place,), allowed_origins=(f"{scheme}://{place}",))
    environ = {
        "SERVER_NAME": "proxy.example",
        "HTTP_HOST": place,
        "HTTP_ORIGIN": f"{scheme}://{place}",
    }
    Guard(options.allowed_origins, options.allowed_hosts).check(environ)


@given(NAMES, st.text(alphabet="*/ \n@#?", min_size=1), st.booleans())
def test_a_name_with_anything_else_in_it_is_refused(name: str, other: str, is_before: bool) -> None:
    entry = other + name if is_before else name + other
    assert refusal(allowed_hosts=(entry,)).startswith("allowed_hosts: only exact names")
    assert refusal(allowed_origins=(f"http://{entry}",)).startswith("allowed_origins: only exact")


@pytest.mark.parametrize("address", ["10.0.0.*", " ::1", "", "localhost", "10.0.0.0/x", "a/8"])
def test_a_proxy_is_trusted_by_its_address_or_network(address: str) -> None:
    given = ("::1", "*", "10.0.0.1", "10.0.0.0/8", "fd00::/8")
    assert ProxyOptions(trusted_proxies=given).trusted_proxies == given
    assert refusal(trusted_proxies=(address,)) == (
        f"trusted_proxies: only addresses and networks (10.0.0.1, 10.0.0.0/8, ::1) or * for all "
        f"are taken, not {address!r}"
    )


@pytest.mark.parametrize("address", ["10.0.0.256", "10.0.0.0/33", "::/129", "1::2::3"])
def test_a_network_that_is_none_is_refused_by_a_sentence(address: str) -> None:
    assert refusal(trusted_proxies=(address,)).startswith(f"trusted_proxies: {address!r} does not")


@pytest.mark.parametrize("url", ["/mcp", "a:80", "ftp://a", "http://", "http://a:99999", "**", ""])
@pytest.mark.parametrize("name", ["target_url", "allowed_backends"])
def test_a_url_that_no_request_could_go_to_is_refused(name: str, url: str) -> None:
    assert refusal(**{name: ("http://a", url)}) == (
        f"{name}: only absolute http:// or https:// URLs without a password are taken, not {url!r}"
    )


def test_any_backend_may_be_allowed_but_is_no_target() -> None:
    assert ProxyConfig(allowed_backends=["*"]).allowed_backends == ("*",)  # type: ignore[arg-type]
    assert refusal(target_url=("*",)).startswith("target_url: only absolute")


@pytest.mark.parametrize(
    "change", ["X-A", ": x", "", "X A: b", "X-A: b\r\nX-B: c", "X-A: \u2603", "X(A): b"]
)
def test_a_change_of_headers_names_a_header(change: str) -> None:
    made = ProxyOptions(forward_headers=("X-A:", " X-B : 1", "X-C: a:b"))
    assert made.forward_headers == ("X-A:", " X-B : 1", "X-C: a:b")
    assert refusal(forward_headers=(change,)).startswith("forward_headers: only changes (Name: ")


def test_a_header_that_frames_messages_can_be_removed_and_not_set() -> None:
    removed = ("Content-Length:", "Transfer-Encoding:")
    assert ProxyOptions(forward_headers=removed).forward_headers == removed
    for change in ("Transfer-Encoding: chunked", "content-length : 5"):
        assert refusal(forward_headers=("X-A: 1", change)) == (
            f"forward_headers: {change.partition(':')[0].strip()} says where a message ends "
            "and cannot be set"
        )


def test_other_headers_of_the_next_connection_can_be_set() -> None:
    """Google's Identity-Aware Proxy takes its token in Proxy-Authorization, for one."""
    changes = ("Proxy-Authorization: Bearer x", "TE: trailers", "Connection: close")
    assert ProxyOptions(forward_headers=changes).forward_headers == changes


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
        from_env(command="server", env="TOKEN:hunter2")
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("redis_url", ["hunter2"]),
        ("env", "A=hunter2"),
        ("env", ["A=1", "hunter2"]),
        ("env_from", "A=hunter2"),
        ("forward_headers", "Authorization: hunter2"),
        ("forward_headers", ["Authorization hunter2"]),
        ("target_url", "http://user:hunter2@host"),
        ("target_url", ["http://user:hunter2@host"]),
        ("allowed_backends", ["http://user:hunter2@host"]),
    ],
)
def test_a_complaint_does_not_show_what_may_be_a_secret(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=rf"^{name}: .* \*\*\*$") as caught:
        ProxyConfig(**{"command": ("x",) if name in ("env", "env_from") else (), name: value})
    shown = "".join(traceback.format_exception(caught.value, limit=0))
    assert "hunter2" not in shown


# --- what follows from settings ------------------------------------------------------------------


@pytest.mark.parametrize(("threads", "limit"), [(4, 2), (8, 6), (16, 12), (64, 48), (200, 150)])
def test_streams_leave_a_quarter_of_the_threads_free(threads: int, limit: int) -> None:
    assert ProxyConfig(threads=threads).stream_limit == limit


def test_the_number_of_streams_can_be_given() -> None:
    assert ProxyConfig(threads=64, max_streams=40).stream_limit == 40


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

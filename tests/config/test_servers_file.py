"""The file of servers: its shapes, its variables, and what is said of each mistake in it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcp_proxy.config import ProxyConfig
from mcp_proxy.entry_values import MAX_FILE, named_files
from mcp_proxy.errors import ConfigError
from mcp_proxy.servers import HttpServer, StdioServer, UnservedServer
from mcp_proxy.servers_file import read_servers
from mcp_proxy.wire.tools import ToolFilter


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

    def servers(self, servers: object, **environ: str) -> list[Any]:
        """What is read from a file with these servers."""
        self.write({"mcpServers": servers})
        return read_servers(self.path, environ)

    def complaint(self, entry: object, **environ: str) -> str:
        """Why an entry is not served, while the one beside it is."""
        fine, broken = self.servers({"fine": {"command": "x"}, "weather": entry}, **environ)
        assert fine == StdioServer("fine", ("x",))
        assert (type(broken), broken.name, broken.is_disabled) == (UnservedServer, "weather", False)
        return str(broken.reason)


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
    (server,) = ProxyConfig(config=str(file.path)).servers()
    assert server == StdioServer("a", ("from-the-environment",))
    assert read_servers(file.path, os.environ) == [server]


def test_keys_of_other_programs_are_left_alone(file: File) -> None:
    entry = {"command": "x", "type": "stdio", "autoApprove": ["${NO_SUCH}"]}
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
        ("${env:V}", "value"),
        ("${env:NO_SUCH:-other}", "other"),
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
    said = "the environment variable NO_SUCH is not set (line 1)"
    assert file.complaint(entry) == said


def test_headers_of_the_next_connection_may_be_set(file: File) -> None:
    headers = {"Proxy-Authorization": "Bearer x", "TE": "trailers", "Connection": "close"}
    (server,) = file.servers({"a": {"url": "http://h/mcp", "headers": headers}})
    told = ("Proxy-Authorization: Bearer x", "TE: trailers", "Connection: close")
    assert server == HttpServer("a", ("http://h/mcp",), told)


def test_an_http_server_has_headers_and_every_server_a_time_limit(file: File) -> None:
    url = "http://h/mcp"
    entry = {"url": url, "headers": {"Authorization": "Bearer ${T}", "x-a": "1:2"}, "timeout": 5}
    http, stdio = file.servers({"a": entry, "b": {"command": "x", "timeout": 2.5}}, T="secret")
    assert http == HttpServer("a", (url,), ("Authorization: Bearer secret", "x-a: 1:2"), 5)
    assert stdio == StdioServer("b", ("x",), timeout=2.5)
    assert "secret" not in repr(http)
    assert "secret" not in str(http)


def test_comments_and_commas_that_are_too_many_are_skipped(file: File) -> None:
    file.write(
        """// my servers
        {"mcpServers": { /* one
          */ "a": {"command": "x", // it's "quoted"
                   "args": ["//no", "/*no*/", ",]", "\\\\", "\\",}",],},
        },}"""
    )
    (server,) = read_servers(file.path, {})
    assert server == StdioServer("a", ("x", "//no", "/*no*/", ",]", "\\", '",}'))


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("arg", "args"),
        ("Args", "args"),
        ("comand", "command"),
        ("header", "headers"),
        ("agrs", "args"),
        ("evn", "env"),
        ("Cdw", "cwd"),
    ],
)
def test_a_key_that_is_nearly_known_is_refused_with_what_is_meant(
    file: File, key: str, meant: str
) -> None:
    complaint = file.complaint({"command": "python", key: ["-m", "x"]})
    assert complaint.startswith(f"'{key}' is not known; '{meant}' is meant")


def test_a_key_that_nobody_knows_is_named_with_its_line(file: File) -> None:
    file.write('{"mcpServers": {\n"a": {"command": "x"},\n"b": {"command": "y",\n"color": 1}}}')
    assert len(read_servers(file.path, {})) == 2
    sentence = f"{file.path}, line 4: b: 'color' is not known and is ignored"
    assert ProxyConfig(config=str(file.path)).ignored() == [sentence]


@pytest.mark.parametrize(
    ("key", "instead"),
    [("disabledTools", "deny"), ("excludeTools", "deny"), ("includeTools", "allow")],
)
def test_what_hides_tools_in_other_programs_is_named_with_what_does_so_here(
    file: File, key: str, instead: str
) -> None:
    file.write(json.dumps({"mcpServers": {"a": {"command": "x", key: ["add"]}}}))
    (sentence,) = ProxyConfig(config=str(file.path)).ignored()
    assert f"{key!r} is not known and is ignored; no tool is hidden by it" in sentence
    assert sentence.endswith(f'"tools": {{"{instead}": [...]}} does that')


def test_a_variable_of_the_entry_itself_is_left_to_the_program_in_its_arguments(file: File) -> None:
    """As the entries of mcp-remote have it, which puts it in: Claude Desktop replaces nothing."""
    args = ["mcp-remote", "https://a.example/mcp", "--header", "Authorization:${AUTH}"]
    entry = {"command": "npx", "args": args, "env": {"AUTH": "Bearer s3cr3t"}}
    file.write(json.dumps({"mcpServers": {"a": entry}}))
    assert read_servers(file.path, {}) == [
        StdioServer("a", ("npx", *args), {"AUTH": "Bearer s3cr3t"})
    ]
    (server,) = read_servers(file.path, {"AUTH": "from outside"})
    assert isinstance(server, StdioServer)
    assert server.argv[-1] == "Authorization:from outside"
    for text in ("${OTHER}", "${env:AUTH}"):
        assert "is not set" in file.complaint({**entry, "args": [text]})
    assert "is not set" in file.complaint({**entry, "command": "${AUTH}"})


def test_an_input_of_an_editor_is_refused(file: File) -> None:
    complaint = file.complaint({"command": "x", "env": {"T": "${input:token}"}})
    assert complaint.startswith("${input:token} asks the user of an editor")


@pytest.mark.parametrize(
    "text",
    [
        *("${workspaceFolder}", "${workspaceFolder:api}", "${workspaceFolderBasename}", "${/}"),
        *("${userHome}", "${pathSeparator}", "${command:pick}", "${config:a.b}"),
    ],
)
def test_what_an_editor_alone_knows_is_refused_by_name(file: File, text: str) -> None:
    complaint = file.complaint({"command": "x", "args": [f"{text}/x"]})
    assert complaint == f"{text} is known to an editor alone: write the value itself (line 1)"


@pytest.mark.parametrize("switch", [{"disabled": True}, {"enabled": False}])
def test_a_server_can_be_switched_off(file: File, switch: dict[str, bool]) -> None:
    off = {"command": "x", **switch}
    unserved = UnservedServer("b", "it is disabled", is_disabled=True)
    served = StdioServer("a", ("y",))
    assert file.servers({"b": off, "a": {"command": "y"}}) == [unserved, served]
    assert file.servers({"b": off}) == [unserved]
    with pytest.raises(ConfigError, match="no server is enabled"):
        ProxyConfig(config=str(file.path)).servers()


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
    (server,) = file.servers({"b": {**entry, "disabled": True}})
    assert server.is_disabled


@pytest.mark.parametrize("name", ["", ".", ".."])
def test_a_name_that_cannot_be_part_of_a_path_is_refused(file: File, name: str) -> None:
    with pytest.raises(ConfigError, match="has to be in its URL"):
        file.servers({name: {"command": "x"}})


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.b_C-1", "a.b_C-1"),
        ("my server", "my-server"),
        ("@scope/x", "-scope-x"),
        ("a?b#c%20:d", "a-b-c-20-d"),
        ("a\n", "a-"),
        ("é", "c3a9"),
        ("日本 1", "e697a5e69cac-1"),
    ],
)
def test_a_name_has_a_form_that_fits_into_a_path(file: File, name: str, expected: str) -> None:
    assert file.servers({name: {"command": "x"}}) == [StdioServer(expected, ("x",))]


def test_two_names_with_one_path_are_refused(file: File) -> None:
    entries = {"a b": {"command": "x"}, "a/b": {"command": "x"}}
    with pytest.raises(ConfigError) as caught:
        file.servers(entries)
    assert str(caught.value) == (
        f"{file.path}: 'a b' and 'a/b' would both be served at /servers/a-b: rename one of them"
    )


@given(st.dictionaries(st.text(min_size=1), st.just({"command": "x"}), min_size=1, max_size=4))
def test_any_names_are_served_under_paths_of_their_own_or_refused(entries: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        file = File(Path(directory, "servers.json"))
        with contextlib.suppress(ConfigError):
            names = [server.name for server in file.servers(entries)]
            assert len(set(names)) == len(entries)
            assert all(re.fullmatch("[A-Za-z0-9_.-]+", name) for name in names)


def test_the_servers_may_be_called_servers(file: File) -> None:
    file.write({"servers": {"a": {"type": "stdio", "command": "x"}}, "inputs": []})
    assert read_servers(file.path, {}) == [StdioServer("a", ("x",))]
    file.write({"servers": {"a": {"command": "x"}}, "mcpServers": None})
    assert read_servers(file.path, {}) == [StdioServer("a", ("x",))]


def test_the_servers_have_one_name(file: File) -> None:
    file.write({"servers": {"a": {"command": "x"}}, "mcpServers": {}})
    with pytest.raises(ConfigError, match="mcpServers and servers: only one of them"):
        read_servers(file.path, {})


@pytest.mark.parametrize("name", ["url", "serverUrl", "httpUrl"])
def test_a_url_has_three_names(file: File, name: str) -> None:
    found = file.servers({"a": {name: "http://h/${V}", "url": "http://h/v"}}, V="v")
    assert found == [HttpServer("a", ("http://h/v",))]
    assert file.servers({"a": {name: "http://h/v"}}) == found


def test_two_different_urls_are_refused(file: File) -> None:
    complaint = file.complaint({"httpUrl": "http://h/b", "url": "http://h/a"})
    assert complaint == "url and httpUrl are different: only one is served (line 1)"


def test_null_is_absent(file: File) -> None:
    nothing = dict.fromkeys(["url", "serverUrl", "cwd", "timeout", "headers", "disabled"])
    entry = {"command": "x", "args": None, "env": {"A": None, "B": "1"}, **nothing}
    assert file.servers({"a": entry}) == [StdioServer("a", ("x",), {"B": "1"})]
    assert file.complaint(nothing) == "a command is missing (line 1)"


def test_numbers_and_booleans_become_texts(file: File) -> None:
    env = {"INT": 8080, "FLOAT": 1.5, "YES": True, "NO": False}
    entry = {"command": "x", "args": ["--port", 8080, 0.5, True], "env": env}
    (server,) = file.servers({"a": entry})
    assert server.argv == ("x", "--port", "8080", "0.5", "true")
    assert server.env == {"INT": "8080", "FLOAT": "1.5", "YES": "true", "NO": "false"}


def test_a_working_directory_may_be_below_that_of_the_user(
    file: File, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    for cwd, expected in [("~", "/home/me"), ("~/x", "/home/me/x"), ("a~", "a~")]:
        (server,) = file.servers({"a": {"command": "x", "cwd": cwd}})
        assert server.cwd == expected


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (
            '{"mcpServers": {\n"a": {"command": "x"},\n"a": {"command": "y"}}}',
            ", line 3: the server 'a' is there twice, first on line 2",
        ),
        (
            '{"servers": {"a": {"command": "x",\n"env": {}, "args": [],\n\n"args": []}}}',
            ", line 4: a: 'args' is there twice, first on line 2",
        ),
        (
            '{"mcpServers": {"a": {"command": "x", "env": {\n"A": "1",\n"\\u0041": "2"}}}}',
            ", line 3: a: 'A' is there twice, first on line 2",
        ),
        (
            '{"mcpServers": {"a": {"command": "x"}},\n"mcpServers": {"b": {"command": "x"}}}',
            ", line 2: 'mcpServers' is there twice, first on line 1",
        ),
    ],
)
def test_what_is_there_twice_is_refused_with_its_line(file: File, text: str, sentence: str) -> None:
    file.write(text)
    with pytest.raises(ConfigError) as caught:
        read_servers(file.path, {})
    assert str(caught.value) == f"{file.path}{sentence}"


def test_equal_keys_of_different_objects_are_not_there_twice(file: File) -> None:
    text = '{"mcpServers": {"a": {"command": "a", "x": [{"a": 1}, {"a": "\\"a\\":"}]}}}'
    file.write(text)
    assert read_servers(file.path, {}) == [StdioServer("a", ("a",))]


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ('{"command": "x" "args": []}', "column 24: expecting ',' delimiter"),
        ('{"command": "x", "timeout": 1e999}', "column 36: a number that is too large"),
        ('{"command": "x", "timeout": -1e999}', "column 36: a number that is too large"),
        ('{"command": "x", "timeout": NaN}', "column 36: no number of JSON"),
        ('{"command": "x", "timeout": Infinity}', "column 36: no number of JSON"),
        ('{"command": "\\ud83d\\ude00 \\ud83d"}', "column 20: half a character"),
        ('{"command": "\\ude00"}', "column 20: half a character"),
        ('{"\\ud83d": "x"}', "column 9: half a character"),
    ],
)
def test_what_is_no_json_is_named_by_line_and_column(file: File, entry: str, reason: str) -> None:
    file.write(f'{{"mcpServers": {{\n  "a": {entry}}}}}')
    with pytest.raises(ConfigError) as caught:
        read_servers(file.path, {})
    assert str(caught.value) == f"{file.path}, line 2, {reason}"


@pytest.mark.parametrize(
    ("entry", "complaint"),
    [
        ({}, "command is missing"),
        ({"command": ""}, "command is missing"),
        ({"command": None}, "command is missing"),
        ({"url": "/mcp"}, "url"),
        ({"command": "x", "url": "https://127.0.0.1/mcp"}, "url"),
        ({"command": ["x"]}, "^command: expected a text, got a list$"),
        (
            {"command": "x", "args": "y"},
            "^args: expected a list of texts, got a text$",
        ),
        (
            {"command": "x", "args": [None]},
            "^args: .* list of texts, got one with null in it$",
        ),
        (
            {"command": "x", "env": ["A=1"]},
            "^env: expected an object of texts, got a list$",
        ),
        (
            {"command": "x", "env": {"A": [1]}},
            "^env: .* texts, got one with a list in it$",
        ),
        (
            {"command": "x", "disabled": "no"},
            "^disabled: expected true or false, got 'no'$",
        ),
        ({"command": "x", "headers": {"A": "b"}}, "headers belong to a url"),
        ({"url": "http://h", "headers": {"A": "b\r\nC: d"}}, "the header 'A'"),
        ({"url": "http://h", "headers": {"A b": "c"}}, "the header 'A b'"),
        ({"url": "http://h", "headers": {"A(b)": "c"}}, r"the header 'A\(b\)'"),
        ({"url": "http://h", "headers": {"A": "b\N{SNOWMAN}"}}, "the header 'A'"),
        ({"url": "http://h", "headers": {"A": "b\x7f"}}, "the header 'A'"),
        (
            {"url": "http://h", "headers": {"transfer-Encoding": "chunked"}},
            "the header 'transfer-Encoding' says where a message ends",
        ),
        (
            {"url": "http://h", "headers": {"Content-Length": "5"}},
            "the header 'Content-Length' says where a message ends",
        ),
        (
            {"command": "x", "timeout": 0},
            "^timeout: expected a number above 0 .*, got 0$",
        ),
        ({"command": "x", "timeout": "5"}, "^timeout: .*, got '5'$"),
        (
            {"command": "x", "timeout": 1e300},
            "^timeout: .* at most 315360000, got 1e\\+300$",
        ),
        (
            {"command": "x", "env": {"A=B": "c"}},
            "'A=\\*\\*\\*' is no name of an environment variable",
        ),
        ({"command": "x", "args": ["\0"]}, "has a NUL character"),
        ({"command": "x", "type": "ws"}, "type: 'ws' is not one of stdio, http, "),
        ({"command": "x", "type": "http"}, "type is 'http', and a url is missing"),
        ({"type": "streamableHttp"}, "type is 'streamableHttp', and a url is missing"),
        ({"url": "http://h", "transportType": "stdio"}, "and a command is missing"),
        (None, "^expected an object with a command or a url, got null$"),
        ("x", "^expected an object with a command or a url, got a text$"),
    ],
)
def test_a_server_that_cannot_be_served_is_so_alone_and_says_why(
    file: File, entry: object, complaint: str
) -> None:
    assert re.search(complaint, file.complaint(entry).removesuffix(" (line 1)"))


def test_a_value_of_another_type_is_named_with_its_line_and_no_secret(file: File) -> None:
    other = '{"x": {"a b": {"env": 1}}, '
    file.write(
        other + '"mcpServers": {"a b": {\n"command": "x",\n"env": {"K": {"swordfish": 1}}}}}'
    )
    complaint = "env: expected an object of texts, got one with an object in it (line 3)"
    assert read_servers(file.path, {}) == [UnservedServer("a-b", complaint)]


@pytest.mark.parametrize(
    "document",
    [
        *(b"", b"{", b"[]", b"null", b"{}", b'{"mcpServers": []}', b'{"mcpServers": {}}'),
        *(b"\xff\xfe{}", b"// a comment\n{}", b"[" * 100_000),
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
        ProxyConfig(config=str(file.path)).servers()
    assert str(file.path) in str(caught.value)
    with pytest.raises(ConfigError, match="directory"):
        read_servers(tmp_path, {})


# --- the shapes of clients -----------------------------------------------------------------------

CLAUDE_DESKTOP = """
{"mcpServers": {
  "files": {"command": "npx", "args": ["-y", "server-filesystem", "/srv"], "env": {"A": "b"}}},
 "globalShortcut": ""}
"""

VS_CODE = """
{ // mcp.json
  "inputs": [{"type": "promptString", "id": "key", "password": true}],
  "servers": {
    "playwright": {"type": "stdio", "command": "npx", "args": ["${env:PACKAGE}"],
                   "envFile": "%(env_file)s", "env": {"OVER": "2",}, "dev": {"watch": "src"}},
    "github": {"type": "http", "url": "https://h/mcp", "headers": {"X-Key": "${env:KEY}"}},
    "asked": {"command": "x", "env": {"KEY": "${input:key}"}},
  },
}
"""

CURSOR = """
{"mcpServers": {
  "local": {"type": "stdio", "command": "python", "args": ["${env:PACKAGE}"],
            "env": {"KEY": "${env:KEY}"}, "envFile": "%(env_file)s"},
  "far": {"url": "http://h/mcp", "headers": {"Authorization": "Bearer ${env:KEY}"}},
  "here": {"command": "${workspaceFolder}/x"}}}
"""

CLINE = """
{"mcpServers": {
  "one": {"autoApprove": ["a"], "disabled": false, "timeout": 60, "command": "node",
          "args": ["x.js"], "transportType": "stdio"},
  "two": {"disabled": true, "timeout": 60, "type": "sse", "url": "https://h/sse"},
  "three": {"disabled": false, "timeout": 30, "type": "streamableHttp", "url": "https://h/mcp",
            "headers": {"Authorization": "Bearer t"}, "alwaysAllow": []}}}
"""


@pytest.fixture
def env_file(tmp_path: Path) -> Path:
    """A file of variables, as editors read it."""
    lines = ["# a comment", "", "PLAIN=a b=c\r", "OVER=1", "export TICKED='d\\n'"]
    made = tmp_path / ".env"
    made.write_text("\n".join([*lines, ' QUOTED = "e\\nf" ', "NONE=", ""]))
    return made


VARIABLES = {"PLAIN": "a b=c", "OVER": "1", "TICKED": "d\\n", "QUOTED": "e\nf", "NONE": ""}


def test_what_claude_desktop_writes_is_served(file: File) -> None:
    file.write(CLAUDE_DESKTOP)
    argv = ("npx", "-y", "server-filesystem", "/srv")
    assert read_servers(file.path, {}) == [StdioServer("files", argv, {"A": "b"})]


def test_what_vs_code_writes_is_served_but_for_what_it_would_ask(
    file: File, env_file: Path
) -> None:
    file.write(VS_CODE % {"env_file": env_file})
    stdio, http, asked = read_servers(file.path, {"PACKAGE": "p", "KEY": "k"})
    assert stdio == StdioServer("playwright", ("npx", "p"), {**VARIABLES, "OVER": "2"})
    assert http == HttpServer("github", ("https://h/mcp",), ("X-Key: k",))
    assert isinstance(asked, UnservedServer)
    assert "${input:key} asks the user" in asked.reason
    assert ProxyConfig(config=str(file.path)).ignored() == []


def test_what_cursor_writes_is_served_but_for_what_it_alone_knows(
    file: File, env_file: Path
) -> None:
    file.write(CURSOR % {"env_file": env_file})
    local, far, here = read_servers(file.path, {"PACKAGE": "p", "KEY": "k"})
    assert local == StdioServer("local", ("python", "p"), {**VARIABLES, "KEY": "k"})
    assert far == HttpServer("far", ("http://h/mcp",), ("Authorization: Bearer k",))
    assert isinstance(here, UnservedServer)
    assert "${workspaceFolder} is known to an editor alone" in here.reason


def test_what_cline_writes_is_served(file: File) -> None:
    file.write(CLINE)
    one, two, three = read_servers(file.path, {})
    assert one == StdioServer("one", ("node", "x.js"), timeout=60)
    assert two == UnservedServer("two", "it is disabled", is_disabled=True)
    assert three == HttpServer("three", ("https://h/mcp",), ("Authorization: Bearer t",), 30)
    assert ProxyConfig(config=str(file.path)).ignored() == []


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (None, r"the file .*/\.env cannot be read: No such file or directory \(line 1\)"),
        ("A=1\nswordfish\n", r"the file .*/\.env, line 2: expected KEY=VALUE \(line 1\)"),
        ("A=swordfish\0", r"the variable 'A' has a NUL character \(line 1\)"),
    ],
)
def test_a_file_of_variables_that_cannot_be_read_is_named_and_not_shown(
    file: File, tmp_path: Path, text: str | None, complaint: str
) -> None:
    if text is not None:
        (tmp_path / ".env").write_text(text)
    said = file.complaint({"command": "x", "envFile": str(tmp_path / ".env")})
    assert re.fullmatch(complaint, said)
    assert "swordfish" not in said


# --- the content of files ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"word", "word"),
        (b"word\n", "word"),
        (b"word\r\n", "word"),
        (b"two\n\n", "two\n"),
        (b"\n", ""),
        (b"${KEY}", "${KEY}"),
        ("ü".encode(), "ü"),
    ],
)
def test_the_content_of_a_file_is_a_value_without_its_last_line_break(
    file: File, tmp_path: Path, content: bytes, expected: str
) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(content)
    entry = {"command": "x", "args": [f"a${{file:{secret}}}b"], "env": {"A": f"${{file:{secret}}}"}}
    (server,) = file.servers({"a": entry}, KEY="k")
    assert server.argv == ("x", f"a{expected}b")
    assert server.env == {"A": expected}


@pytest.mark.parametrize("directory", ["${DIR}", "${env:DIR}", "${NONE:-%s}"])
def test_a_file_may_be_named_by_a_variable(file: File, tmp_path: Path, directory: str) -> None:
    """As systemd names the directory of credentials, `CREDENTIALS_DIRECTORY`."""
    (tmp_path / "secret").write_text("swordfish\n")
    reference = f"${{file:{directory.replace('%s', str(tmp_path))}/secret}}"
    (server,) = file.servers({"a": {"command": "x", "env": {"A": reference}}}, DIR=str(tmp_path))
    assert server.env == {"A": "swordfish"}
    text = json.dumps({"env": {"A": reference}, "envFile": "${DIR}/more"})
    environ = {"DIR": str(tmp_path)}
    assert named_files(text, environ) == [f"{tmp_path}/secret", f"{tmp_path}/more"]


def test_a_name_that_leads_to_no_file_is_left_out(file: File) -> None:
    """Where it is empty it would be the working directory, in which files come and go."""
    named = ["${file:${NONE}}", "${file:${EMPTY}}", "${file:${NONE}/secret}", "${file:/${NONE:-a}}"]
    text = json.dumps({"env": dict(enumerate(named)), "envFile": "${NONE}"})
    assert named_files(text, {"EMPTY": ""}) == ["/a"]


def test_the_content_of_a_file_is_never_shown(file: File, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("swordfish is it\n")
    inserted = f"${{file:{secret}}}"
    stdio, http = file.servers(
        {
            "a": {"command": "x", "args": ["--fish", inserted, f"in {inserted}."]},
            "b": {"url": f"http://h/{inserted}/mcp", "headers": {"X-Key": inserted}},
        }
    )
    assert stdio.argv == ("x", "--fish", "swordfish is it", "in swordfish is it.")
    assert http.headers == ("X-Key: swordfish is it",)
    for server in (stdio, http):
        assert "swordfish" not in f"{server} {server!r}"
    assert str(stdio) == "x --fish *** 'in ***.'"


@pytest.mark.parametrize("key", ["command", "cwd", "envFile"])
def test_the_content_of_a_file_is_nowhere_where_it_would_be_shown(
    file: File, tmp_path: Path, key: str
) -> None:
    (tmp_path / "secret").write_text("swordfish")
    said = file.complaint({"command": "x", key: f"${{file:{tmp_path}/secret}}"})
    assert said == f"{key}: it is shown, and so may have no content of a file in it (line 1)"


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (None, "cannot be read: No such file or directory"),
        (b"\xff", "is not UTF-8"),
        (b"x" * (MAX_FILE + 1), f"is larger than {MAX_FILE} bytes"),
    ],
)
def test_a_file_that_is_no_value_is_the_error_of_its_entry(
    file: File, tmp_path: Path, content: bytes | None, complaint: str
) -> None:
    path = tmp_path / "secret"
    if content is not None:
        path.write_bytes(content)
    said = file.complaint({"command": "x", "env": {"A": f"${{file:{path}}}"}})
    assert said == f"the file {path} {complaint} (line 1)"


# --- several mistakes ----------------------------------------------------------------------------


def test_where_no_server_can_be_served_the_sentence_has_every_reason(file: File) -> None:
    file.write({"mcpServers": {"a": {}, "b": {"url": "/x"}, "c": {"disabled": True}}})
    with pytest.raises(ConfigError) as caught:
        ProxyConfig(config=str(file.path)).servers()
    assert str(caught.value) == (
        f"{file.path}: no server can be served: a: a command is missing (line 1); "
        "b: its url is not an absolute http:// or https:// URL (line 1)"
    )


@pytest.mark.parametrize(
    ("settings", "is_served"),
    [({}, True), ({"workers": 2}, False), ({"workers": 2, "redis_url": "redis://h"}, True)],
)
def test_an_http_server_of_several_workers_needs_redis(
    file: File, settings: dict[str, Any], is_served: bool
) -> None:
    file.write({"mcpServers": {"a": {"command": "x"}, "b": {"url": "http://h"}}})
    stdio, http = ProxyConfig(config=str(file.path), **settings).servers()
    assert stdio == StdioServer("a", ("x",))
    assert isinstance(http, HttpServer) is is_served
    if isinstance(http, UnservedServer):
        assert http.reason == "an HTTP server needs redis_url where there are 2 workers"


def test_the_example_has_six_servers_and_two_mistakes() -> None:
    path = Path(__file__).parents[2] / "examples" / "servers.json"
    config = ProxyConfig(config=str(path))
    broken = {server.name: server.reason for server in config.broken()}
    served = [server.name for server in config.servers() if server.name not in broken]
    assert served == ["time", "git", "fetch", "everything", "memory", "http"]
    assert "/run/secrets/no-such-key cannot be read" in broken["no-such-key"]
    assert "${workspaceFolder} is known to an editor alone" in broken["of-an-editor"]
    assert config.ignored() == []


# --- tools ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tools", "expected"),
    [
        ({"allow": ["a", "b*"], "deny": ["bc"]}, ToolFilter(("a", "b*"), ("bc",))),
        ({"deny": ["x"]}, ToolFilter(None, ("x",))),
        ({"allow": []}, ToolFilter(())),
        ({}, ToolFilter()),
        (["a", "b"], ToolFilter(("a", "b"))),
        (None, None),
    ],
)
def test_an_entry_says_which_tools_are_hidden(
    file: File, tools: object, expected: ToolFilter | None
) -> None:
    found = file.servers(
        {"a": {"command": "x", "tools": tools}, "b": {"url": "http://h", "tools": tools}}
    )
    assert [server.tools for server in found] == [expected] * 2


@pytest.mark.parametrize(
    "tools",
    ["a", 1, True, {"allow": "a"}, {"allow": [1]}, {"deny": {"a": 1}}, {"allowed": ["a"]}, [["a"]]],
)
def test_tools_of_another_form_are_the_error_of_their_entry(file: File, tools: object) -> None:
    said = 'tools: the form is {"allow": [...], "deny": [...]}, with texts (line 1)'
    assert file.complaint({"command": "x", "tools": tools}) == said

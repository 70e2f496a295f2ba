"""The command that keeps the file of API keys."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from mcp_proxy.auth.keys import ApiKeys, digest_of, read
from mcp_proxy.config import ProxyConfig
from mcp_proxy.server.banner import banner
from mcp_proxy.server.cli import main


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "keys"


def run(path: Path, *arguments: str) -> int:
    return main(["key", *arguments, "--api-keys", str(path)])


def test_a_key_is_shown_once_and_its_digest_is_kept(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(path, "add", "alice") == 0
    said = capsys.readouterr()
    key = said.out.strip()
    assert re.fullmatch(r"mcpk_[\w-]{43}", key)
    assert key not in said.err
    assert path.read_text() == f"alice sha256:{digest_of(key)}\n"
    caller = ApiKeys(str(path)).caller(key, None)
    assert caller is not None
    assert caller.principal.name == "key:alice"


def test_what_a_key_is_for_is_said_by_options(path: Path) -> None:
    options = ["--server", "a,b", "--server", "c", "--scope", "admin", "--expires", "2027-01-31"]
    assert run(path, "add", "alice", *options) == 0
    (key,) = read(str(path))
    assert (key.servers, key.scopes) == ({"a", "b", "c"}, {"admin"})
    assert path.read_text().endswith(" server=a,b,c scope=admin expires=2027-01-31\n")


@pytest.mark.parametrize(
    "arguments",
    [
        ["add", "a/b"],
        ["add", ""],
        ["add", "alice", "--expires", "tomorrow"],
        ["add", "alice", "--server", "a b"],
        ["add", "alice", "--scope", ""],
    ],
)
def test_what_no_line_could_have_is_refused(
    path: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(path, *arguments) == 2
    assert capsys.readouterr().err.startswith("mcp-wsgi-proxy: expected ") or arguments[3:]
    assert not path.exists()


@pytest.mark.parametrize("name", ["a b", "a=b", "", "#a"])
def test_what_is_no_name_is_named_and_not_its_line(
    path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(path, "add", name) == 2
    assert capsys.readouterr().err == (
        "mcp-wsgi-proxy: expected a NAME of letters, digits and _.@+- that begins with one of "
        f"the former two, at most 64 characters, got {name!r}\n"
    )
    assert not path.exists()


def test_a_further_key_of_a_name_and_one_that_is_over_are_said_to_be_so(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(path, "add", "alice")
    assert "now" not in capsys.readouterr().err
    run(path, "add", "alice", "--expires", "2020-01-01")
    said = capsys.readouterr().err
    assert "alice has 2 keys now, and each of them counts\n" in said
    assert "it counts no longer: 2020-01-01 is over\n" in said


def test_the_list_has_everything_but_a_key(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(path, "add", "bob", "--server", "a", "--expires", "2020-01-01")
    run(path, "add", "alice", "--scope", "admin")
    made = capsys.readouterr().out.split()
    assert run(path, "list") == 0
    said = capsys.readouterr().out
    assert not any(key in said for key in made)
    head, alice, bob = (re.split(r"\s{2,}", line) for line in said.splitlines())
    assert head == ["NAME", "SERVERS", "SCOPES", "EXPIRES", "LAST USE", "DIGEST"]
    assert alice == ["alice", "all", "admin", "never", "-", digest_of(made[1])[:12]]
    assert bob == ["bob", "a", "-", "2020-01-01T00:00Z (over)", "-", digest_of(made[0])[:12]]


def test_all_keys_of_a_name_are_removed(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path.write_text("# ours\n")
    for name in ("alice", "bob", "alice"):
        run(path, "add", name)
    assert run(path, "remove", "alice") == 0
    assert capsys.readouterr().err.endswith("2 keys of alice removed\n")
    assert [key.name for key in read(str(path))] == ["bob"]
    assert path.read_text().startswith("# ours\n")
    assert run(path, "remove", "alice") == 1


def test_where_the_file_cannot_be_written_the_line_is_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "missing" / "keys"
    assert run(path, "add", "alice") == 1
    said = capsys.readouterr()
    key = said.out.strip()
    assert f"alice sha256:{digest_of(key)}" in said.err
    assert "Put this line there" in said.err


def test_the_file_may_be_named_in_the_environment(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["key", "list"]) == 2
    assert "MCP_PROXY_API_KEYS" in capsys.readouterr().err
    monkeypatch.setenv("MCP_PROXY_API_KEYS", str(path))
    assert main(["key", "add", "alice"]) == 0
    assert path.exists()


def test_a_proxy_whose_keys_cannot_be_read_does_not_start(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--api-keys", str(path)]) == 2
    assert "No such file" in capsys.readouterr().err
    path.write_text("alice hunter2\n")
    assert main(["--api-keys", str(path)]) == 2
    assert main(["check", "--offline", "--api-keys", str(path)]) == 1
    said = "".join(capsys.readouterr())
    assert said.count("line 1: expected sha256:") == 2
    assert "hunter2" not in said


def test_a_check_counts_the_keys_and_knows_the_servers(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, server in (("alice", "demo"), ("alice", "gone"), ("bob", "demo")):
        run(path, "add", name, "--server", server)
    assert main(["check", "--offline", "--api-keys", str(path)]) == 0
    said = capsys.readouterr().out
    assert "3 keys of 2 callers" in said
    assert "WARN  api_keys                 a key is for gone, which is no server" in said


def test_a_proxy_that_is_open_to_all_says_so(path: Path) -> None:
    path.touch()
    elsewhere, here = ["http://0.0.0.0:80"], ["http://127.0.0.1:80"]
    warning = "Nobody is asked who they are"
    assert warning in banner(ProxyConfig(command=("x",)), elsewhere)
    assert warning not in banner(ProxyConfig(command=("x",)), here)
    assert warning not in banner(ProxyConfig(command=("x",), api_keys=str(path)), elsewhere)


def test_a_new_file_is_made_for_its_user_alone_whatever_the_mask(path: Path) -> None:
    before = os.umask(0)
    try:
        run(path, "add", "alice")
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o077 == 0

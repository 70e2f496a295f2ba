"""The benchmarks work: in their quick form, and where an answer is wrong."""

from __future__ import annotations

import http.server
import json
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
BENCH = ROOT / "bench"

SCRIPTS = sorted(
    path.name
    for path in BENCH.iterdir()
    if path.is_file() and path.read_bytes().startswith(b"#!/usr/bin/env python3")
)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A benchmark, to its end."""
    command = [sys.executable, str(BENCH / arguments[0]), *arguments[1:]]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def run_code(code: str) -> str:
    """What a program prints that may import the modules of the benchmarks."""
    path = f"import sys; sys.path.insert(0, {str(BENCH)!r})\n"
    command = [sys.executable, "-c", path + textwrap.dedent(code)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def measured(tmp_path: Path, *arguments: str) -> dict[str, Any]:
    """What a benchmark writes, which has a chart beside it, and says what it does."""
    file = tmp_path / "figures.json"
    done = run(*arguments, "--quick", "--json", str(file))
    assert done.returncode == 0, done.stderr
    assert "measurements, about" in done.stderr
    assert file.with_suffix(".svg").read_text(encoding="utf-8").startswith("<svg ")
    document: dict[str, Any] = json.loads(file.read_bytes())
    assert all(finding["what"] in done.stdout for finding in document["findings"])
    return document


def test_throughput_counts_calls_cpu_time_and_commands_of_redis(tmp_path: Path) -> None:
    names = ("--only", "redis", "--only", "bare")
    document = measured(tmp_path, "throughput", "http", "--sessions", "each", *names)
    rows = {row["name"]: row["figures"] for row in document["rows"]}
    assert rows["redis"]["calls/s"][0] > 0
    assert rows["redis"]["CPU us"][0] > 0
    assert 0.9 < rows["redis"]["Redis commands"][0] < 2
    assert "Redis commands" not in rows["bare"]
    assert [finding["at_least"] for finding in document["findings"]] == [0.75]


def test_relay_compares_owned_and_relayed_calls(tmp_path: Path) -> None:
    document = measured(tmp_path, "relay", "--connections", "2")
    assert {row["name"] for row in document["rows"]} == {"owned", "relayed"}
    assert len(document["findings"]) == 4


def test_groups_are_compared_with_the_server_alone(tmp_path: Path) -> None:
    options = ("--behind", "stdio", "--era", "legacy", "--size", "1", "--size", "2")
    document = measured(tmp_path, "groups", *options)
    rows = {(row["group"], row["name"]): row["figures"] for row in document["rows"]}
    one = "stdio servers, legacy calls, one call at a time"
    assert {name for group, name in rows if group == one} == {"alone", "of1", "of2"}
    assert all(rows[one, name]["CPU us"][0] > 0 for name in ("alone", "of1", "of2"))
    assert rows["the first list of 2 stdio servers", "second"]["initialize and list ms"][0] > 0
    processes = rows["5 sessions with a group of 8 stdio servers", "processes"]["processes"]
    assert processes == [10]


def test_groups_are_compared_with_those_of_other_proxies(tmp_path: Path) -> None:
    document = measured(tmp_path, "groups", "--peers", "--only", "ours")
    rows = {row["group"].partition(" ")[0]: row["figures"] for row in document["rows"]}
    assert rows["one"].keys() == {"p50 ms", "CPU us", "modern p50 ms"}
    assert rows["5"] == {"processes": [10]}
    slow = "the first list where one of 8 servers needs 1 s to start"
    (told,) = (row["figures"] for row in document["rows"] if row["group"] == slow)
    assert told["tools"] == [8]
    assert document["benchmark"] == "groups-peers"


def test_what_a_row_has_not_is_a_dash_and_a_sentence() -> None:
    done = run_code(
        """
        from measuring import Row, table
        whole = Row("group", "a", "A", figures={"ms": [1.0], "MB": [2.0]})
        part = Row("group", "b", "B", figures={"ms": [3.0]}, missing={"MB": "it has no memory"})
        print(table([whole, part], []))
        """
    )
    *_, row, reason = done.splitlines()
    assert row.split() == ["B", "3.00", "-"]
    assert reason == "B, MB: it has no memory."


def test_scale_says_what_replicas_ask_of_redis(tmp_path: Path) -> None:
    document = measured(tmp_path, "scale", "--replicas", "1", "--replicas", "3")
    rows = {(row["group"], row["name"]): row["figures"] for row in document["rows"]}
    assert rows["one Redis", "3"]["rest cmd/s"][0] > rows["one Redis", "1"]["rest cmd/s"][0] > 0
    assert rows["one Redis", "1"]["look-ups/s"][0] > 0
    assert 4 < rows["one Redis", "3"]["cmd/call"][0] < 12
    assert rows["calls at an even rate", "3"]["p50 ms"][0] > 0
    assert 300 < rows["records", "record"]["bytes of Redis"][0] < 2000


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_says_what_it_does(script: str) -> None:
    done = run(script, "--help")
    assert done.returncode == 0
    assert f"usage: bench/{script}" in done.stdout
    assert f"bench/{script}" in (BENCH / "README.md").read_text(encoding="utf-8")


def test_the_page_has_the_figures_of_its_documents() -> None:
    done = run("report", "--check")
    assert (done.returncode, done.stdout) == (0, "")


# --- wrong answers -------------------------------------------------------------------------------


class Confused(http.server.BaseHTTPRequestHandler):
    """An MCP server that answers each call with the text of another one."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        message = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        result = {"content": [{"type": "text", "text": "of somebody else"}]}
        answer = {"jsonrpc": "2.0", "id": message.get("id"), "result": result}
        body = json.dumps(answer).encode() if "id" in message else b""
        self.send_response(200 if body else 202)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def confused() -> Iterator[int]:
    """The port of such a server."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Confused) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


def test_an_answer_with_another_text_ends_the_load(confused: int) -> None:
    done = run("load.py", json.dumps({"port": confused, "connections": 1}))
    assert done.returncode == 1
    assert "was answered by" in done.stderr
    assert "of somebody else" in done.stderr


VOID = """
import sys
sys.path.insert(0, sys.argv.pop(1))
from measuring import Options, Wrong, carry_out, options_parser

def benchmark(options):
    raise Wrong("call 7 was answered by 8")

sys.exit(carry_out(benchmark, options_parser("void", None, 1, 1.0), Options()))
"""


def test_a_wrong_answer_voids_the_run(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    command = [sys.executable, "-c", VOID, str(BENCH), "--json", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.strip() == "void: call 7 was answered by 8"
    assert not file.exists()

"""Six stdio servers that others have written, with a tool of each that always answers the same."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any, NamedTuple

from tests.clients.programs import node, npm_program
from tests.support.startable import ServerThread

Json = dict[str, Any]

_PAGE = b"<html><body><article><h1>Six servers</h1><p>A page to fetch.</p></article></body></html>"


class RealServer(NamedTuple):
    """An entry of a file of servers, a tool of it, and what the answer has in it."""

    entry: Json
    tool: str
    arguments: Json
    expected: str


class Page(BaseHTTPRequestHandler):
    """One page, and no robots.txt."""

    def do_GET(self) -> None:
        is_page = self.path == "/page"
        self.send_response(200 if is_page else 404)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(_PAGE if is_page else b"")

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing."""


@contextmanager
def real_servers(folder: Path) -> Iterator[dict[str, RealServer]]:
    """The servers by their names; what they read is in a folder, and on a page of this machine."""
    repository, files = folder / "repository", folder / "files"
    for made in (repository, files):
        made.mkdir()
    (files / "letter.txt").write_text("Grüße aus dem Ordner\n", encoding="utf-8")
    subprocess.run(["git", "init", "--quiet", "--initial-branch", "known", repository], check=True)
    memory = {"MEMORY_FILE_PATH": str(folder / "memory.jsonl")}
    with ServerThread(Page) as page:
        url = f"http://127.0.0.1:{page.port}/page"
        yield {
            "time": RealServer(
                _python("mcp_server_time", "--local-timezone", "UTC"),
                "convert_time",
                {"source_timezone": "UTC", "time": "12:00", "target_timezone": "Asia/Tokyo"},
                "+9.0h",
            ),
            "git": RealServer(
                _python("mcp_server_git", "--repository", str(repository)),
                "git_status",
                {"repo_path": str(repository)},
                "On branch known",
            ),
            "fetch": RealServer(
                _python("mcp_server_fetch", "--allow-private-ips"),
                "fetch",
                {"url": url, "raw": True},
                "A page to fetch.",
            ),
            "everything": RealServer(
                _node("everything", "stdio"), "echo", {"message": "hear, hear"}, "hear, hear"
            ),
            "memory": RealServer({**_node("memory"), "env": memory}, "read_graph", {}, "entities"),
            "filesystem": RealServer(
                _node("filesystem", str(files)),
                "read_text_file",
                {"path": str(files / "letter.txt")},
                "Grüße aus dem Ordner",
            ),
        }


def _python(module: str, *arguments: str) -> Json:
    return {"command": sys.executable, "args": ["-m", module, *arguments]}


def _node(name: str, *arguments: str) -> Json:
    script = npm_program(f"@modelcontextprotocol/server-{name}/dist/index.js")
    return {"command": node(), "args": [str(script), *arguments]}

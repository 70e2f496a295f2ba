"""The command `mcp-wsgi-proxy key`: adds, lists and removes API keys in the file of `api_keys`.

A new key is printed once, alone on standard output; everything else goes to standard error. Where
the file cannot be written, the line to put there is printed.
"""

from __future__ import annotations

import argparse
import datetime
import sys
import time
from collections.abc import Mapping, Sequence

from mcp_proxy.auth.key_file import Unwritable, add, line_numbers, line_of, remove
from mcp_proxy.auth.keys import Key, digest_of, new_key, parse_line, read, require_name, seconds_of
from mcp_proxy.config import ProxyConfig, value_in_environment
from mcp_proxy.errors import ConfigError
from mcp_proxy.last_uses import last_use_of
from mcp_proxy.server.ctl import key_uses

_EPILOG = """The file is that of --api-keys, or of MCP_PROXY_API_KEYS. A running proxy notices each
change within a second; when a key was last used it says at --ctl-socket, or MCP_PROXY_CTL_SOCKET.
Several keys of one name are one caller, so that a key can be replaced while its sessions go on: add
the new one, then take the old line out."""

_COLUMNS = ("NAME", "SERVERS", "SCOPES", "EXPIRES", "LAST USE", "DIGEST")

# Hexadecimal digits by which a line is told from another of the same name.
_SHOWN_DIGITS = 12


def run(arguments: Sequence[str]) -> int:
    """Runs `key` with its arguments and returns the exit code; raises ConfigError."""
    given = parse(arguments)
    path = given.api_keys or value_in_environment("api_keys")
    if path is None:
        raise ConfigError("name the file of the keys: --api-keys FILE, or MCP_PROXY_API_KEYS")
    if given.action == "add":
        return _add(path, given)
    if given.action == "remove":
        return _remove(path, given.name)
    socket = given.ctl_socket or value_in_environment("ctl_socket")
    return _list(path, _uses_at(socket))


def show(config: ProxyConfig) -> int:
    """Prints the keys of a running proxy, each with its last use, and returns the exit code.

    Raises ConfigError where there are none, or the proxy cannot be reached.
    """
    if config.api_keys is None or config.ctl_socket is None:
        raise ConfigError("ctl keys needs the settings api_keys and ctl_socket of the proxy")
    return _list(config.api_keys, key_uses(config.ctl_socket))


def _uses_at(socket: str | None) -> Mapping[str, float]:
    """The last uses of keys; none where no proxy can say."""
    if socket is None:
        return {}
    try:
        return key_uses(socket)
    except ConfigError as error:
        print(f"mcp-wsgi-proxy: {error}", file=sys.stderr)
        return {}


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """What the arguments say; exits with 2 for what says nothing."""
    return _parser().parse_args(arguments)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("mcp-wsgi-proxy key", epilog=_EPILOG, allow_abbrev=False)
    actions = parser.add_subparsers(dest="action", required=True, metavar="add|list|remove")
    adding = actions.add_parser("add", help="make a key for NAME, and print it once")
    adding.add_argument("name", metavar="NAME", help="who gets the key")
    adding.add_argument(
        "--server", action="append", metavar="NAME", help="a server that it is for (all)"
    )
    adding.add_argument(
        "--scope", action="append", metavar="SCOPE", help="what it allows besides calls, as admin"
    )
    adding.add_argument(
        "--expires", metavar="DATE", help="when it ends: 2027-01-31, in UTC (never)"
    )
    listing = actions.add_parser("list", help="who has keys; no key is shown")
    removing = actions.add_parser("remove", help="remove all keys of NAME")
    removing.add_argument("name", metavar="NAME", help="who loses them")
    listing.add_argument(
        "--ctl-socket", metavar="PATH", help="where a running proxy says when they were last used"
    )
    for each in (adding, listing, removing):
        each.add_argument("--api-keys", metavar="FILE", help="the file of the keys")
    return parser


def _add(path: str, given: argparse.Namespace) -> int:
    require_name(given.name)
    is_over = given.expires is not None and seconds_of(given.expires) <= time.time()
    key = new_key()
    servers = None if given.server is None else frozenset(_names_in(given.server))
    entry = Key(given.name, digest_of(key), servers, frozenset(_names_in(given.scope or ())))
    line = line_of(entry, given.expires)
    parse_line(line)
    try:
        add(path, line)
    except Unwritable as error:
        print(f"mcp-wsgi-proxy: {error}. Put this line there:\n{line}", file=sys.stderr)
        print(key)
        return 1
    count = len(line_numbers(path, given.name))
    if count > 1:
        print(f"{given.name} has {count} keys now, and each of them counts", file=sys.stderr)
    if is_over:
        print(f"it counts no longer: {given.expires} is over", file=sys.stderr)
    print(f"The key of {given.name}, which is shown this once:", file=sys.stderr)
    print(key)
    return 0


def _names_in(given: Sequence[str]) -> list[str]:
    return [name for text in given for name in text.split(",")]


def _remove(path: str, name: str) -> int:
    read(path)
    try:
        count = remove(path, name)
    except Unwritable as error:
        lines = ", ".join(map(str, line_numbers(path, name)))
        print(f"mcp-wsgi-proxy: {error}. Take out: lines {lines or 'none'}", file=sys.stderr)
        return 1
    if not count:
        print(f"mcp-wsgi-proxy: {name} has no key in {path}", file=sys.stderr)
        return 1
    print(f"{count} key{'' if count == 1 else 's'} of {name} removed", file=sys.stderr)
    return 0


def _list(path: str, uses: Mapping[str, float]) -> int:
    keys = sorted(read(path), key=lambda key: key.name)
    rows = [_COLUMNS, *(_row(key, last_use_of(key.digest, uses)) for key in keys)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print("  ".join(cells).rstrip())
    return 0


def _row(key: Key, last_use: float | None) -> tuple[str, ...]:
    """A line of the table."""
    servers = "all" if key.servers is None else ",".join(sorted(key.servers))
    expires = "never"
    if key.expires is not None:
        expires = _as_text(key.expires)
        if key.expires <= time.time():
            expires += " (over)"
    used = "-" if last_use is None else _as_text(last_use)
    scopes = ",".join(sorted(key.scopes)) or "-"
    return key.name, servers, scopes, expires, used, key.digest[:_SHOWN_DIGITS]


def _as_text(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).strftime("%Y-%m-%dT%H:%MZ")

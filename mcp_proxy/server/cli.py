"""The command `mcp-wsgi-proxy`: every setting as an option, and gunicorn to serve."""

from __future__ import annotations

import argparse
import difflib
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from mcp_proxy import __version__
from mcp_proxy.config import (
    ProxyConfig,
    Setting,
    entries_of,
    environment_values,
    from_values,
    has_gunicorn_arguments,
    settings,
)
from mcp_proxy.errors import ConfigError
from mcp_proxy.server.gunicorn import (
    require_directory_and_cpus,
    require_keys,
    require_shared_sessions,
    require_worker_class,
    serve,
)
from mcp_proxy.server.machine import open_standard_streams
from mcp_proxy.servers import as_command
from mcp_proxy.shown_commands import shown_arguments

_USAGE = """mcp-wsgi-proxy [options] -- COMMAND ARG...
       mcp-wsgi-proxy [options] --target-url URL
       mcp-wsgi-proxy [options] --config FILE
       mcp-wsgi-proxy check [--offline] [options] [-- COMMAND ARG...]
       mcp-wsgi-proxy key add|list|remove [options]
       mcp-wsgi-proxy ctl [options] status [SESSION] | end SESSION | restart SERVER
       mcp-wsgi-proxy ctl [options] reload | keys"""

_EPILOG = """Without a command and without a file the bundled demo server is served. Every option
is also an environment variable: --session-ttl is MCP_PROXY_SESSION_TTL. "check" tries everything
out and serves nothing; with --offline it reads files only, and starts and connects to nothing.
"key" keeps the file of API keys."""

# The groups of the help, by the setting that each begins with, in the order of the table.
_GROUPS = {
    "command": "servers",
    "redis_url": "sessions",
    "failure_status": "answers",
    "max_body_bytes": "limits and processes",
    "allowed_origins": "who is served",
    "forward_headers": "HTTP servers",
    "jwt_issuer": "access tokens",
    "log_format": "log",
    "bind": "gunicorn",
}

# What `ctl` is told: alone, and about something.
_CTL_ALONE = ("status", "reload", "keys")
_CTL_ABOUT = ("status", "end", "restart")

# How much like an option of ours an unknown one is that must be meant for it.
_ALIKE = 0.8

# The settings that name the servers: an option for one replaces all of them.
_SOURCES = ("command", "target_url", "config", "env", "env_from", "cwd")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code; 2 for a configuration that cannot be served."""
    open_standard_streams()
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        if arguments[:1] == ["check"]:
            return _check(arguments[1:])
        if arguments[:1] == ["ctl"]:
            return _ctl(arguments[1:])
        if arguments[:1] == ["key"]:
            from mcp_proxy.server import keys

            return keys.run(arguments[1:])
        config = read_config(arguments)
        config.servers()  # its errors belong here, not in a worker's log
        require_directory_and_cpus(config)
        require_keys(config)
        require_worker_class(config)
        require_shared_sessions(config, config.workers)
        if config.redis_url is not None:
            _require_readable_url(config)
    except ConfigError as error:
        print(f"mcp-wsgi-proxy: {error}", file=sys.stderr)
        return 2
    if has_gunicorn_arguments():
        print(
            "mcp-wsgi-proxy: GUNICORN_CMD_ARGS is not read by this command; settings of gunicorn's "
            "own are for gunicorn wsgi:app",
            file=sys.stderr,
        )
    serve(config)
    return 0


def _check(arguments: list[str]) -> int:
    """The exit code of `check` with these arguments; raises ConfigError for what it cannot try."""
    from mcp_proxy.server.check import check, check_offline

    options, command = _split(arguments)
    is_offline = "--offline" in options
    rest = [option for option in options if option != "--offline"]
    config = read_config(rest if command is None else [*rest, "--", *command])
    config.listed()
    require_directory_and_cpus(config)
    return check_offline(config) if is_offline else check(config)


def _ctl(arguments: list[str]) -> int:
    """The exit code of `ctl` with these arguments; raises ConfigError for what is none."""
    from mcp_proxy.server import keys
    from mcp_proxy.server.ctl import ctl

    config, words = read_ctl(arguments)
    return keys.show(config) if words == ["keys"] else ctl(config, *words)


def read_ctl(arguments: Sequence[str]) -> tuple[ProxyConfig, list[str]]:
    """The configuration of `ctl`, and what it is told, which stands before or behind the options.

    Raises ConfigError where it is told nothing.
    """
    parser = _parser()
    given, words = parser.parse_known_args([_with_dashes(argument) for argument in arguments])
    known = {1: _CTL_ALONE, 2: _CTL_ABOUT}.get(len(words), ())
    if words[:1] and words[0] in known:
        return _config(vars(given), None), words
    if any(word.startswith("-") for word in words):
        _refuse(parser, words)
    raise ConfigError("ctl takes status [SESSION], end SESSION, restart SERVER, reload or keys")


def _require_readable_url(config: ProxyConfig) -> None:
    """Raises ConfigError where `redis_url` cannot be read; nothing is sent.

    The check runs in a process of its own: the one that becomes gunicorn's master loads no Redis
    client, whose imports a worker class may still patch.
    """
    readable, writable = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            from mcp_proxy.app import storage_of

            storage_of(config).close()
        except ConfigError as error:
            os.write(writable, str(error).encode())
        finally:
            os._exit(0)
    os.close(writable)
    with open(readable, encoding="utf-8") as answer:
        sentence = answer.read()
    os.waitpid(pid, 0)
    if sentence:
        raise ConfigError(sentence)


def read_config(arguments: Sequence[str]) -> ProxyConfig:
    """The configuration from the environment, overridden by options; raises ConfigError."""
    options, command = _split(list(arguments))
    return _config(_parse(options), command)


def _config(given: dict[str, Any], command: list[str] | None) -> ProxyConfig:
    """The configuration with these values of options, None for those that are not given."""
    values: dict[str, Any] = {
        name: [entry for text in value for entry in entries_of(name, text)]
        if isinstance(value, list)
        else value
        for name, value in given.items()
        if value is not None
    }
    if command is not None:
        values["command"] = as_command(command)
    inherited = environment_values()
    if any(name in values for name in ("command", "target_url", "config")):
        inherited = {name: v for name, v in inherited.items() if name not in _SOURCES}
    return from_values({**inherited, **values})


def _split(arguments: list[str]) -> tuple[list[str], list[str] | None]:
    """The options, and the command after `--`, word for word."""
    if "--" not in arguments:
        return arguments, None
    at = arguments.index("--")
    return arguments[:at], arguments[at + 1 :]


def _parse(options: Sequence[str]) -> dict[str, Any]:
    """The values of options, None for those that are not given; exits with 2 for what is none."""
    parser = _parser()
    given, unknown = parser.parse_known_args([_with_dashes(option) for option in options])
    if unknown:
        _refuse(parser, unknown)
    return vars(given)


def _refuse(parser: argparse.ArgumentParser, unknown: list[str]) -> NoReturn:
    """Exits with 2, and says what is meant by arguments that are none of ours."""
    shown = " ".join(shown_arguments(["", *unknown])[1:])
    name = unknown[0].partition("=")[0]
    options = [f"--{setting.name.replace('_', '-')}" for setting in settings()]
    nearest = difflib.get_close_matches(name, options, 1, _ALIKE)
    advice = "the command of a server stands behind --"
    if name in ("--host", "--port"):
        advice = "--bind HOST:PORT says where to listen"
    elif nearest:
        advice = f"{nearest[0]} is meant, it seems"
    parser.error(f"unrecognized arguments: {shown} ({advice})")


def _with_dashes(option: str) -> str:
    """An option in the spelling of the parser: `--max_sessions` is `--max-sessions`, too."""
    name, equals, value = option.partition("=")
    return f"{name.replace('_', '-')}{equals}{value}" if option.startswith("--") else option


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "mcp-wsgi-proxy", usage=_USAGE, epilog=_EPILOG, allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    group: argparse._ActionsContainer = parser
    for setting in settings():
        if setting.name in _GROUPS:
            group = parser.add_argument_group(_GROUPS[setting.name])
        if setting.name != "command":
            _add_option(group, setting)
    return parser


def _add_option(group: argparse._ActionsContainer, setting: Setting) -> None:
    default = f" (default: {setting.default_text})" if setting.default_text else ""
    switch: dict[str, Any] = {"nargs": "?", "const": "on"} if setting.is_switch else {}
    group.add_argument(
        f"--{setting.name.replace('_', '-')}",
        dest=setting.name,
        action="append" if setting.is_list else "store",
        metavar=setting.placeholder,
        **switch,
        help=f"{setting.reason}{default}".replace("%", "%%"),
    )

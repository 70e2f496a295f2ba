"""The MCP servers that are to be served: what each kind of them is."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta
from msgspec.inspect import BoolType, DictType, FloatType, ListType, UnionType, VarTupleType
from msgspec.structs import force_setattr

from mcp_proxy.errors import ConfigError
from mcp_proxy.rate_buckets import rate_of
from mcp_proxy.shown_commands import shown_arguments, shown_command, without
from mcp_proxy.wire.naming import MAX_PREFIX, is_prefix, same_prefix
from mcp_proxy.wire.tools import ToolFilter
from mcp_proxy.wire.urls import parse_target

#: A time limit, in seconds, as servers and settings have it.
MAX_SECONDS = 10 * 365 * 24 * 3600
Seconds = Annotated[float, Meta(gt=0, le=MAX_SECONDS)]

#: The most servers of a group.
MAX_MEMBERS = 32

# What a server's name has not where it stands in a URL.
_UNFIT = re.compile(r"[^A-Za-z0-9_.-]")

# A header as `Name: value`.
_CHANGE = re.compile(r"\s*[^\s:]+\s*:[^\r\n\0]*")

#: A scope of an access token (RFC 6749 section 3.3).
SCOPE = r"[\x21\x23-\x5b\x5d-\x7e]+"

# Where a variable of a caller comes from; a `?` at the end makes it optional.
_SOURCE = re.compile(r"header:[!#$%&'*+.^_`|~0-9A-Za-z-]+\??|claim:[^\s?]+\??")


class StdioServer(msgspec.Struct, frozen=True, tag=True):
    """An MCP server that is started as a child process and speaks over its standard streams.

    `argv` may be given as a text, which is split as a shell would. `timeout` is how long a call may
    take, in seconds; None: as the settings say. `secrets` are parts of its arguments that are not
    to be shown. `tools` says which of its tools are hidden; None: none is. `rate_limit` is how many
    requests a caller may have of it, as the setting is written; None: as the settings say.
    `jwt_scopes` are scopes that an access token must have for it, beside those of the settings.
    `env_from` says which variables come from the caller, each `header:NAME` or `claim:NAME`, with a
    `?` at the end where it is optional. The constructor raises ConfigError.
    """

    name: str
    argv: tuple[str, ...]
    env: dict[str, str] = {}
    cwd: str | None = None
    timeout: Seconds | None = None
    secrets: tuple[str, ...] = ()
    tools: ToolFilter | None = None
    rate_limit: str | None = None
    env_from: dict[str, str] = {}
    jwt_scopes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        force_setattr(self, "argv", as_command(self.argv))
        if isinstance(self.cwd, os.PathLike):
            force_setattr(self, "cwd", os.fspath(self.cwd))
        _require_fields(self)
        _require_startable(self)

    def __str__(self) -> str:
        return shown_command(self._argv_without_secrets())

    def __repr__(self) -> str:
        shown = shown_arguments(self._argv_without_secrets())
        return f"StdioServer({self.name!r}, {shown!r}, env={sorted(self.env)}, cwd={self.cwd!r})"

    def _argv_without_secrets(self) -> list[str]:
        return [without(self.secrets, argument) for argument in self.argv]


class HttpServer(msgspec.Struct, frozen=True, tag=True):
    """An MCP server that speaks HTTP: the URLs of its replicas.

    `headers`, each as `Name: value`, are set on every request to it. `timeout`, `secrets`, `tools`,
    `rate_limit` and `jwt_scopes` are as for a StdioServer. The constructor raises ConfigError.
    """

    name: str
    urls: tuple[str, ...]
    headers: tuple[str, ...] = ()
    timeout: Seconds | None = None
    secrets: tuple[str, ...] = ()
    tools: ToolFilter | None = None
    rate_limit: str | None = None
    jwt_scopes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.urls, str):
            force_setattr(self, "urls", (self.urls,))
        _make_tuples(self, "urls", "headers")
        _require_fields(self)
        if not self.urls or not all(map(parse_target, self.urls)):
            raise ConfigError(f"{self.name}: its URLs must be absolute http:// or https:// URLs")
        for header in self.headers:
            if not _CHANGE.fullmatch(header):
                name, colon, _ = header.partition(":")
                which = f"the header {name!r}" if colon else "a header"  # else a value, perhaps
                raise ConfigError(f"{self.name}: {which} has not the form 'Name: value'")

    def __str__(self) -> str:
        return without(self.secrets, " ".join(url.partition("?")[0] for url in self.urls))

    def __repr__(self) -> str:
        return f"HttpServer({self.name!r}, {str(self)!r})"


class UnservedServer(msgspec.Struct, frozen=True, tag=True):
    """An MCP server that is named in the file and not served.

    It is disabled there, or `reason` says what is wrong with its entry, without any value that may
    be a secret.
    """

    name: str
    reason: str
    is_disabled: bool = False

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


class GroupMember(msgspec.Struct, frozen=True):
    """A server of a group: what its tools are called by, which of them are hidden there, and the
    schemes of its resources.
    """

    server: str
    prefix: str
    tools: ToolFilter | None = None
    schemes: tuple[str, ...] = ()


class ServerGroup(msgspec.Struct, frozen=True, tag=True):
    """Servers that one endpoint carries together, in the order of trust.

    What is None here each server has for itself. The constructor raises ConfigError.
    """

    name: str
    members: tuple[GroupMember, ...]
    timeout: Seconds | None = None
    secrets: tuple[str, ...] = ()
    tools: ToolFilter | None = None
    rate_limit: str | None = None
    jwt_scopes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.members:
            raise ConfigError(f"the group {self.name!r} has no servers")
        if len(self.members) > MAX_MEMBERS:
            raise ConfigError(f"the group {self.name!r} has more than {MAX_MEMBERS} servers")
        prefixes: dict[str, str] = {}
        for member in self.members:
            if member.prefix and not is_prefix(member.prefix):
                raise ConfigError(
                    f"the group {self.name!r}: {member.prefix!r} is no prefix: a letter, then "
                    f"letters, digits, - and _, {MAX_PREFIX} at most, no __ and no _ at the end"
                )
            other = prefixes.pop(same_prefix(member.prefix), None)
            prefixes[same_prefix(member.prefix)] = member.server
            if other is not None:
                raise ConfigError(
                    f"the group {self.name!r}: {other} and {member.server} would have the same "
                    "prefix: give one of them another"
                )

    def __str__(self) -> str:
        return ", ".join(member.server for member in self.members)


Served = StdioServer | HttpServer | ServerGroup
Server = Served | UnservedServer


def _make_tuples(server: Served, *names: str) -> None:
    """Has fields that were given as other lists be tuples."""
    for name in names:
        value = getattr(server, name)
        if isinstance(value, Iterable) and not isinstance(value, str | bytes | Mapping):
            force_setattr(server, name, tuple(value))


def _require_fields(server: Served) -> None:
    """Raises ConfigError where a field has a value of another type, or the name is empty."""
    kind = type(server)
    _make_tuples(server, "jwt_scopes")
    try:
        require_types(kind, {name: getattr(server, name) for name in kind.__struct_fields__})
    except WrongValue as error:
        raise ConfigError(f"{kind.__name__}: {error}") from None
    if server.tools is not None and not isinstance(server.tools, ToolFilter):
        raise ConfigError(f"{kind.__name__}: tools: expected a ToolFilter")
    if server.rate_limit is not None:
        try:
            rate_of(server.rate_limit)
        except ValueError as error:
            raise ConfigError(f"{server.name}: rate_limit: {error}") from None
    for scope in server.jwt_scopes:
        if not re.fullmatch(SCOPE, scope):
            raise ConfigError(
                f"{server.name}: jwt_scopes: a scope has no blanks, quotes and backslashes, "
                f"got {scope!r}"
            )
    if not server.name:
        raise ConfigError(f"{kind.__name__}: name: expected a text that is not empty")


def _require_startable(server: StdioServer) -> None:
    """Raises ConfigError for what no process can be given; it shows no value."""
    if any("\0" in argument for argument in server.argv):
        raise ConfigError(f"{server.name}: an argument of its command has a NUL character")
    for name, value in server.env.items():
        require_variable(name, server.name)
        if "\0" in value:
            raise ConfigError(f"{server.name}: the variable {name!r} has a NUL character")
    for name, source in server.env_from.items():
        require_variable(name, server.name)
        if not _SOURCE.fullmatch(source):  # which may be a value, by mistake
            raise ConfigError(
                f"{server.name}: env_from: the source of {name!r} is to be header:NAME or "
                "claim:NAME, with a ? at the end where it is optional"
            )


def require_variable(name: str, of: str = "env_for") -> None:
    """Raises ConfigError for what is no name of an environment variable, for whom it is meant."""
    if not name or "=" in name or "\0" in name:
        shown = name if "=" not in name else f"{name.partition('=')[0]}=***"
        raise ConfigError(f"{of}: {shown!r} is no name of an environment variable")


def demo_server() -> StdioServer:
    """The demo server of this package."""
    script = Path(__file__).parent / "demo" / "server.py"
    return StdioServer("demo", (python(), "-I", str(script)))


def python() -> str:
    """The interpreter of this process; uWSGI, for one, names itself as `sys.executable`."""
    if re.match(r"python|pypy", os.path.basename(sys.executable)):
        return sys.executable
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    for prefix in (sys.exec_prefix, sys.base_exec_prefix):
        for name in (version, "python3", "python"):
            found = os.path.join(prefix, "bin", name)
            if os.access(found, os.X_OK):
                return found
    return shutil.which(version) or sys.executable


def path_name(name: str) -> str:
    """A server's name as it stands in URLs, in the log and in the store.

    Letters, digits, `_`, `.` and `-` of ASCII stay. What is beyond ASCII becomes the hexadecimal
    digits of its UTF-8, anything else becomes `-`.
    """
    return _UNFIT.sub(lambda c: "-" if c[0].isascii() else c[0].encode().hex(), name)


def split_command(command: str) -> list[str]:
    """A command line as a shell would split it; raises ConfigError for an invalid one."""
    try:
        return shlex.split(command)
    except ValueError as error:
        raise ConfigError(f"command: {str(error).lower()}") from error


def as_command(command: Sequence[str] | str) -> tuple[str, ...]:
    """A command as arguments, a string split as a shell would; ConfigError for any other type,
    and if it is empty.
    """
    if isinstance(command, str):
        argv = tuple(split_command(command))
    elif isinstance(command, Sequence) and all(isinstance(part, str) for part in command):
        argv = tuple(command)
    else:
        raise ConfigError(f"A command is a text or a list of texts, not {command!r}")
    if not argv or not argv[0]:
        raise ConfigError("The command of a stdio server is empty")
    return argv


# --- what is said of a value of another type ------------------------------------------------------


class WrongValue(ValueError):
    """The value of `key` has another type, or is out of bounds."""

    def __init__(self, key: str, complaint: str) -> None:
        super().__init__(f"{key}: {complaint}")
        self.key = key


_KINDS = {
    type(None): "null",
    bool: "true or false",
    int: "a number",
    float: "a number",
    str: "a text",
    list: "a list",
    tuple: "a list",
    dict: "an object",
}


def require_types(kind: type[msgspec.Struct], values: Mapping[str, Any]) -> None:
    """Raises WrongValue for the first value that does not fit its field of `kind`."""
    for field in msgspec.structs.fields(kind):
        if field.encode_name in values:
            value = values[field.encode_name]
            try:
                msgspec.convert(value, field.type)
            except msgspec.ValidationError:
                complaint = _expected(msgspec.inspect.type_info(field.type), value)
                raise WrongValue(field.encode_name, complaint) from None


def _expected(takes: msgspec.inspect.Type, value: Any) -> str:
    """What is allowed, and what was given: of a text that may be a secret only its kind."""
    match takes:
        case UnionType():
            return _expected(takes.types[0], value)
        case FloatType():
            return f"expected a number above {takes.gt} and at most {takes.le}, got {_shown(value)}"
        case BoolType():
            return f"expected true or false, got {_shown(value)}"
        case DictType():
            is_fit, wanted = isinstance(value, dict), "an object of texts"
            parts = [*value.values(), *value] if is_fit else []
        case ListType() | VarTupleType():
            is_fit, wanted = isinstance(value, list | tuple), "a list of texts"
            parts = value if is_fit else []
        case _:
            return f"expected a text, got {kind_of(value)}"
    wrong = next((part for part in parts if not isinstance(part, str)), "")
    given = f"one with {kind_of(wrong)} in it" if is_fit else kind_of(value)
    return f"expected {wanted}, got {given}"


def _shown(value: Any) -> str:
    """A value where none is a secret, in short."""
    return kind_of(value) if isinstance(value, list | tuple | dict) else repr(value)


def kind_of(value: Any) -> str:
    """What a value of JSON is, in words: a text, a list, null."""
    return _KINDS.get(type(value), type(value).__name__)

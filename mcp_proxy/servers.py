"""The MCP servers that are to be served, the file that lists them, and how a command is shown."""

from __future__ import annotations

import difflib
import json
import os
import re
import shlex
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import msgspec
from msgspec import Meta
from msgspec.inspect import BoolType, DictType, FloatType, ListType, UnionType, VarTupleType
from msgspec.structs import force_setattr

from mcp_proxy.errors import ConfigError
from mcp_proxy.wire.urls import parse_target

#: A time limit, in seconds, as servers and settings have it.
MAX_SECONDS = 10 * 365 * 24 * 3600
Seconds = Annotated[float, Meta(gt=0, le=MAX_SECONDS)]


class StdioServer(msgspec.Struct, frozen=True):
    """An MCP server that is started as a child process and speaks over its standard streams.

    `argv` may be given as a text, which is split as a shell would. `timeout` is how long a call may
    take, in seconds; None: as the settings say. The constructor raises ConfigError.
    """

    name: str
    argv: tuple[str, ...]
    env: dict[str, str] = {}
    cwd: str | None = None
    timeout: Seconds | None = None

    def __post_init__(self) -> None:
        force_setattr(self, "argv", as_command(self.argv))
        if isinstance(self.cwd, os.PathLike):
            force_setattr(self, "cwd", os.fspath(self.cwd))
        _require_fields(self)
        _require_startable(self)

    def __str__(self) -> str:
        return shown_command(self.argv)

    def __repr__(self) -> str:
        return (
            f"StdioServer({self.name!r}, {shown_arguments(self.argv)!r}, env={sorted(self.env)}, "
            f"cwd={self.cwd!r})"
        )


class HttpServer(msgspec.Struct, frozen=True):
    """An MCP server that speaks HTTP: the URLs of its replicas.

    `headers`, each as `Name: value`, are set on every request to it. `timeout` is as for a
    StdioServer. The constructor raises ConfigError.
    """

    name: str
    urls: tuple[str, ...]
    headers: tuple[str, ...] = ()
    timeout: Seconds | None = None

    def __post_init__(self) -> None:
        if isinstance(self.urls, str):
            force_setattr(self, "urls", (self.urls,))
        for name in ("urls", "headers"):
            value = getattr(self, name)
            if isinstance(value, Iterable) and not isinstance(value, str | bytes | Mapping):
                force_setattr(self, name, tuple(value))
        _require_fields(self)
        if not self.urls or not all(map(parse_target, self.urls)):
            raise ConfigError(f"{self.name}: its URLs must be absolute http:// or https:// URLs")
        for header in self.headers:
            if not _CHANGE.fullmatch(header):
                name, colon, _ = header.partition(":")
                which = f"the header {name!r}" if colon else "a header"  # else a value, perhaps
                raise ConfigError(f"{self.name}: {which} has not the form 'Name: value'")

    def __str__(self) -> str:
        return " ".join(url.partition("?")[0] for url in self.urls)

    def __repr__(self) -> str:
        return f"HttpServer({self.name!r}, {str(self)!r})"


Server = StdioServer | HttpServer


def _require_fields(server: Server) -> None:
    """Raises ConfigError where a field has a value of another type, or the name is empty."""
    kind = type(server)
    try:
        _require_types(kind, {name: getattr(server, name) for name in kind.__struct_fields__})
    except _WrongValue as error:
        raise ConfigError(f"{kind.__name__}: {error}") from None
    if not server.name:
        raise ConfigError(f"{kind.__name__}: name: expected a text that is not empty")


def _require_startable(server: StdioServer) -> None:
    """Raises ConfigError for what no process can be given; it shows no value."""
    if any("\0" in argument for argument in server.argv):
        raise ConfigError(f"{server.name}: an argument of its command has a NUL character")
    for name, value in server.env.items():
        if not name or "=" in name or "\0" in name:
            raise ConfigError(f"{server.name}: {name!r} is no name of an environment variable")
        if "\0" in value:
            raise ConfigError(f"{server.name}: the variable {name!r} has a NUL character")


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


_BOM = b"\xef\xbb\xbf"

# Where the servers stand in a file; the second is the name in VS Code's mcp.json.
_SERVERS = ("mcpServers", "servers")

# A string, and the colon behind it where it is a key; the beginning and the end of what is nested.
_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"(?=\s*(:))?|[{}\[\]]')

_UNFIT = re.compile(r"[^A-Za-z0-9_.-]")
_VARIABLE = re.compile(r"\$\{(?:env:)?(\w+)(?::-([^}]*))?\}")
_INPUT = re.compile(r"\$\{input:[^}]*\}")
_HEADER = re.compile(r"[^\s:]+: [^\r\n\0]+")
_CHANGE = re.compile(r"\s*[^\s:]+\s*:[^\r\n\0]*")

# A string; a comment; a comma before the end of a list or an object.
_COMMENTED = re.compile(r'("(?:[^"\\]|\\.)*")|//[^\n]*|/\*.*?\*/', re.DOTALL)
_TRAILING = re.compile(r'("(?:[^"\\]|\\.)*")|,(?=\s*[\]}])', re.DOTALL)

# Keys of an entry that other programs have and that mean nothing here.
_FOREIGN = frozenset(
    {
        *("type", "transport", "transportType", "alwaysAllow", "autoApprove"),
        *("description", "icon", "note", "version"),
    }
)

# How much like a key of ours an unknown one is that must be meant for it.
_ALIKE = 0.8


class _Switch(msgspec.Struct):
    """Whether a server of the file is to be served."""

    disabled: bool = False
    enabled: bool = True


class _Entry(msgspec.Struct):
    """A server in the file; what other keys there are `ignored_keys` tells."""

    command: str | None = None
    args: list[str] = []
    env: dict[str, str] = {}
    cwd: str | None = None
    url: str | None = None
    server_url: str | None = msgspec.field(default=None, name="serverUrl")
    http_url: str | None = msgspec.field(default=None, name="httpUrl")
    headers: dict[str, str] = {}
    timeout: Seconds | None = None


class _Key(NamedTuple):
    """A key in the file: the keys that lead to it, itself included, and its line.

    `first` is the line where the same object has it already.
    """

    way: tuple[str, ...]
    line: int
    first: int | None


def read_servers(path: Path, environ: Mapping[str, str]) -> list[Server]:
    """The enabled servers of a `{"mcpServers": {...}}` file, or one with `servers` in its place.

    `${NAME}`, `${env:NAME}` and `${NAME:-default}` are replaced from `environ`; comments and commas
    at the end of a list are skipped, null counts as absent. Each is named by its `path_name`.
    Raises ConfigError with a sentence that names the file and the server.
    """
    enabled: dict[str, tuple[str, Server]] = {}
    text, servers = _read(path)
    for name, entry in servers.items():
        try:
            server = _read_server(path, name, entry, environ)
        except _WrongValue as error:
            ways = [(section, name, error.key) for section in _SERVERS]
            line = next(key.line for key in _keys(text) if key.way in ways)
            raise ConfigError(f"{path}, line {line}: {name}: {error}") from None
        if server is None:
            continue
        other, _ = enabled.setdefault(server.name, (name, server))
        if other != name:
            raise ConfigError(
                f"{path}: {other!r} and {name!r} would both be served at /servers/{server.name}: "
                "rename one of them"
            )
    if not enabled:
        raise ConfigError(f"{path}: no server is enabled")
    return [server for _, server in enabled.values()]


def path_name(name: str) -> str:
    """A server's name as it stands in URLs, in the log and in the store.

    Letters, digits, `_`, `.` and `-` of ASCII stay. What is beyond ASCII becomes the hexadecimal
    digits of its UTF-8, anything else becomes `-`.
    """
    return _UNFIT.sub(lambda c: "-" if c[0].isascii() else c[0].encode().hex(), name)


def ignored_keys(path: Path) -> list[str]:
    """What nobody reads in the entries of a file, each as a sentence with its line."""
    known = {*_known_keys(), *_FOREIGN}
    return [
        f"{path}, line {key.line}: {key.way[1]}: {key.way[2]!r} is not known and is ignored"
        for key in _keys(_read(path)[0])
        if len(key.way) == 3 and key.way[0] in _SERVERS and key.way[2] not in known
    ]


def _read(path: Path) -> tuple[str, dict[str, Any]]:
    """The text of a file, and its servers by their names."""
    text = _text(path)
    try:
        servers = _servers(msgspec.json.decode(text))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}{_malformed(text) or f': {plain(str(error))}'}") from error
    for way, line, first in _keys(text):
        if first is not None:
            what = repr(way[-1])
            if way[0] in _SERVERS and len(way) > 1:
                what = f"the server {what}" if len(way) == 2 else f"{way[1]}: {what}"
            raise ConfigError(f"{path}, line {line}: {what} is there twice, first on line {first}")
    return text, servers


def _text(path: Path) -> str:
    """What is in the file, with spaces in place of comments and of commas that are too many."""
    try:
        text = path.read_bytes().removeprefix(_BOM).decode()
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{path}: the file is not UTF-8") from error
    for pattern in (_COMMENTED, _TRAILING):
        text = pattern.sub(lambda m: m[1] or re.sub(r"[^\n]", " ", m[0]), text)
    return text


def _malformed(text: str) -> str | None:
    """Where a text is no JSON, and why; None for one that is."""
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        return f", line {error.lineno}, column {error.colno}: {plain(error.msg)}"
    except RecursionError:
        pass
    return None


def _servers(document: Any) -> dict[str, Any]:
    """The servers of a document by their names; raises ValueError."""
    given = document if isinstance(document, dict) else {}
    named = [name for name in _SERVERS if given.get(name) is not None]
    if len(named) != 1:
        both = "only one of them may name the servers"
        raise ValueError(
            f"{' and '.join(named)}: {both}" if named else 'the form is {"mcpServers": {...}}'
        )
    servers = given[named[0]]
    if not isinstance(servers, dict):
        raise ValueError(f"{named[0]} is to be an object, with a server under each name")
    return servers


def _keys(text: str) -> Iterator[_Key]:
    """Every key of the objects in a text, which is JSON, in their order."""
    way: list[str] = []
    lines: list[dict[str, int]] = []  # of the keys of each object that has begun
    line, at = 1, 0
    for token in _TOKEN.finditer(text):
        line, at = line + text.count("\n", at, token.start()), token.start()
        if token[0] in "{[":
            way.append("")
            lines.append({})
        elif token[0] in "}]":
            way.pop()
            lines.pop()
        elif token[1]:
            way[-1] = json.loads(token[0])
            yield _Key(tuple(way), line, lines[-1].get(way[-1]))
            lines[-1].setdefault(way[-1], line)


def _known_keys() -> list[str]:
    kinds: tuple[type[msgspec.Struct], ...] = (_Entry, _Switch)
    return [field.encode_name for kind in kinds for field in msgspec.structs.fields(kind)]


def _require_no_slip(entry: dict[str, Any]) -> None:
    """Raises ValueError for a key that is nearly one of ours: its server would not be the same."""
    known = _known_keys()
    for key in entry:
        if key not in known and key not in _FOREIGN:
            nearest = difflib.get_close_matches(key.lower(), known, 1, _ALIKE)
            if nearest:
                raise ValueError(f"{key!r} is not known; {nearest[0]!r} is meant, it seems")


def _read_server(path: Path, name: str, entry: Any, environ: Mapping[str, str]) -> Server | None:
    """The server of one entry, None if it is switched off. Raises _WrongValue, ConfigError."""
    if name in ("", ".", ".."):
        raise ConfigError(f"{path}: a server's name must fit into a URL path, {name!r} does not")
    try:
        if not isinstance(entry, dict):
            raise ValueError(f"expected an object with a command or a url, got {_kind(entry)}")
        given = _without_nulls(entry)
        _require_types(_Switch, given)
        switch = msgspec.convert(given, _Switch)
        if switch.disabled or not switch.enabled:
            return None
        _require_no_slip(given)
        expanded = _expanded(given, environ)
        _require_types(_Entry, expanded)
        return _server(path_name(name), msgspec.convert(expanded, _Entry))
    except _WrongValue:
        raise
    except ConfigError as error:  # of a constructor, which names the server
        raise ConfigError(f"{path}: {error}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: {name}: {plain(str(error))}") from error


def _server(name: str, entry: _Entry) -> Server:
    url = _url(entry)
    if url is not None and entry.command is not None:
        raise ValueError("a server has either a command or a url, not both")
    if url is not None:
        if parse_target(url) is None:
            raise ValueError("its url is not an absolute http:// or https:// URL")
        headers = tuple(f"{key.strip()}: {text.strip()}" for key, text in entry.headers.items())
        for header in headers:
            if not _HEADER.fullmatch(header):
                raise ValueError(f"the header {header.partition(':')[0]!r} has no name or no value")
        return HttpServer(name, (url,), headers, entry.timeout)
    if not entry.command:
        raise ValueError("a command is missing")
    if entry.headers:
        raise ValueError("headers belong to a url")
    argv = (entry.command, *entry.args)
    cwd = None if entry.cwd is None else os.path.expanduser(entry.cwd)
    return StdioServer(name, argv, entry.env, cwd, entry.timeout)


def _url(entry: _Entry) -> str | None:
    """The URL of an entry by whichever name it has."""
    named = {"url": entry.url, "serverUrl": entry.server_url, "httpUrl": entry.http_url}
    given = {name: url for name, url in named.items() if url is not None}
    if len(set(given.values())) > 1:
        raise ValueError(f"{' and '.join(given)} are different: only one is served")
    return next(iter(given.values()), None)


def _without_nulls(entry: Any) -> Any:
    """An entry without what is null in it, or in an object in it."""
    if not isinstance(entry, dict):
        return entry
    return {key: _without_nulls(value) for key, value in entry.items() if value is not None}


def _expanded(entry: dict[str, Any], environ: Mapping[str, str]) -> dict[str, Any]:
    """The fields of an entry that we use, with variables replaced and texts for numbers."""
    ours = {field.encode_name for field in msgspec.structs.fields(_Entry)}
    found = {name: _expand(value, environ) for name, value in entry.items() if name in ours}
    if isinstance(args := found.get("args"), list):
        found["args"] = [_as_text(value) for value in args]
    if isinstance(env := found.get("env"), dict):
        found["env"] = {name: _as_text(value) for name, value in env.items()}
    return found


def _as_text(value: Any) -> Any:
    """A number or a boolean as it stands in JSON."""
    return json.dumps(value) if isinstance(value, int | float) else value


def _expand(value: Any, environ: Mapping[str, str]) -> Any:
    if isinstance(value, str):
        if asked := _INPUT.search(value):
            raise ValueError(
                f"{asked[0]} asks the user of an editor, and there is none: name an environment "
                "variable, ${NAME}"
            )
        return _VARIABLE.sub(lambda match: _lookup(match, environ), value)
    if isinstance(value, list):
        return [_expand(item, environ) for item in value]
    if isinstance(value, dict):
        return {key: _expand(item, environ) for key, item in value.items()}
    return value


def _lookup(match: re.Match[str], environ: Mapping[str, str]) -> str:
    name, default = match.groups()
    value = environ.get(name, default)
    if value is None:
        raise ValueError(f"the environment variable {name} is not set")
    return value


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


def plain(complaint: str) -> str:
    """An error message about a text, in plain words for its author."""
    complaint = complaint.replace("`", "")
    return complaint[:1].lower() + complaint[1:] if complaint[1:2].islower() else complaint


# --- what is said of a value of another type ------------------------------------------------------


class _WrongValue(ValueError):
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


def _require_types(kind: type[msgspec.Struct], values: Mapping[str, Any]) -> None:
    """Raises _WrongValue for the first value that does not fit its field of `kind`."""
    for field in msgspec.structs.fields(kind):
        if field.encode_name in values:
            value = values[field.encode_name]
            try:
                msgspec.convert(value, field.type)
            except msgspec.ValidationError:
                complaint = _expected(msgspec.inspect.type_info(field.type), value)
                raise _WrongValue(field.encode_name, complaint) from None


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
            return f"expected a text, got {_kind(value)}"
    wrong = next((part for part in parts if not isinstance(part, str)), "")
    return f"expected {wanted}, got {f'one with {_kind(wrong)} in it' if is_fit else _kind(value)}"


def _shown(value: Any) -> str:
    """A value where none is a secret, in short."""
    return _kind(value) if isinstance(value, list | tuple | dict) else repr(value)


def _kind(value: Any) -> str:
    return _KINDS.get(type(value), type(value).__name__)


# --- what is printed of a command ----------------------------------------------------------------

_SECRET_NAME = (
    r"[\w.-]*(?:token|secret|passw|pwd|passphrase|credential|auth(?!or(?!iz))|bearer|cookie|key(?![a-z]))"
    r"[\w.-]*"
)

# Options whose value is a secret, or may be: the next argument.
_SECRET_OPTION = re.compile(rf"-{{1,2}}{_SECRET_NAME}|bearer|-H|--header", re.IGNORECASE)
_PAIR_OPTION = re.compile(r"-e|--env|--environment")

# Arguments of which the end is hidden, and then what is hidden in any: the first group stays.
_SECRET_ARGUMENTS = (
    re.compile(rf"(-{{0,2}}{_SECRET_NAME}[=:]\s*).+", re.IGNORECASE | re.DOTALL),
    re.compile(r"((?:-e|--?[\w-]+=)?[A-Z_][A-Z0-9_]*=).+", re.DOTALL),
)
_SECRET_PARTS = (
    re.compile(r"(\b(?:bearer|basic)\s+)[^\s\"']+", re.IGNORECASE),
    re.compile(rf"({_SECRET_NAME}[\"']?\s*[=:]\s*[\"']?)[^\s\"'&;,}}]+", re.IGNORECASE),
    re.compile(rf"((?<!\S)--?{_SECRET_NAME}\s+)[^\s\"'-][^\s\"']*", re.IGNORECASE),
    re.compile(r"((?<!\S)[A-Z_][A-Z0-9_]*=)\S+"),
    re.compile(r"(://)[^/@\s]+(?=@)"),
    re.compile(r"(://[^\s?]*\?)[^\s\"'#]+"),
)
_HIDDEN = "***"

_LONG_WORD = re.compile(r"(?<![\w/.@+-])[\w+-]{20,}=*(?![\w/.@])")
_HEXADECIMAL = re.compile(r"[0-9a-f-]+", re.IGNORECASE)


def shown_command(argv: Sequence[str]) -> str:
    """A command for a log or a terminal, without what `shown_arguments` hides."""
    return " ".join(
        argument if shlex.quote(bare) == bare else shlex.quote(argument)
        for argument in shown_arguments(argv)
        for bare in [argument.replace(_HIDDEN, "x")]
    )


def shown_arguments(argv: Sequence[str]) -> tuple[str, ...]:
    """The arguments of a command, with `***` for what looks like a secret.

    That is the value of an option or a name such as token, key, password or Authorization, of a
    header and of an environment variable, what follows Bearer, the password and the query of a URL,
    and a long random word. The program is shown as it is.
    """
    shown = list(argv[:1])
    before = ""
    for argument in argv[1:]:
        if _SECRET_OPTION.fullmatch(before) and not argument.startswith("--"):
            shown.append(_HIDDEN)
        elif _PAIR_OPTION.fullmatch(before) and "=" in argument:
            shown.append(f"{argument.partition('=')[0]}={_HIDDEN}")
        else:
            shown.append(_without_secrets(argument))
        before = argument
    return tuple(shown)


def _without_secrets(argument: str) -> str:
    for pattern in _SECRET_ARGUMENTS:
        if found := pattern.fullmatch(argument):
            return found[1] + _HIDDEN
    for pattern in _SECRET_PARTS:
        argument = pattern.sub(lambda found: found[1] + _HIDDEN, argument)
    return _LONG_WORD.sub(lambda found: _HIDDEN if _is_random(found[0]) else found[0], argument)


def _is_random(word: str) -> bool:
    """Whether a long word has digits where no word of a language, and no name, has them."""
    has_digits = any(map(str.isdigit, word)) and any(map(str.isalpha, word))
    is_mixed = word.lower() != word != word.upper()
    is_one = word.isalnum() or _HEXADECIMAL.fullmatch(word) is not None
    return has_digits and (is_mixed or is_one)

"""What stands for something else in the values of an entry: variables, and the content of files."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

#: Bytes that a file may have of which the content is a value, or whose lines are variables.
MAX_FILE = 64 * 1024

# `${NAME}`, `${env:NAME}` and `${NAME:-default}`, or `${file:PATH}`, in whose path these may stand:
# `${file:${CREDENTIALS_DIRECTORY}/token}`.
_VARIABLE = re.compile(r"\$\{(?:env:)?(\w+)(?::-([^}]*))?\}")
_FILE = re.compile(rf"\$\{{file:((?:{_VARIABLE.pattern}|[^}}])*)\}}")
_REFERENCE = re.compile(rf"{_FILE.pattern}|{_VARIABLE.pattern}")
_ENV_FILE = re.compile(r'"envFile"\s*:\s*"([^"]*)"')

# What only an editor can replace: VS Code and Cursor do.
_INPUT = re.compile(r"\$\{input:[^}]*\}")
_OF_AN_EDITOR = re.compile(r"\$\{(?:(?:command|config|workspaceFolder):[^}]*|/)\}")
_NAMES_OF_EDITORS = frozenset(
    {"workspaceFolder", "workspaceFolderBasename", "workspaceRoot", "userHome", "pathSeparator"}
)

# Keys whose values are shown: no secret may come into them.
_SHOWN = frozenset({"command", "cwd", "envFile"})

_LINE = re.compile(r"(?:export\s+)?([\w.-]+)\s*=\s*(.*)", re.DOTALL)
_LAST_LINE_BREAK = re.compile(r"\r?\n\Z")


class EntryValues:
    """Replaces what stands for something else in the values of one entry.

    `secrets` are the contents of files that came into it.
    """

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._environ = environ
        self._own: Collection[str] = ()  # variables that the entry itself sets
        self.secrets: list[str] = []

    def expanded(self, entry: Mapping[str, Any], keys: Collection[str]) -> dict[str, Any]:
        """The values under these keys, with texts for the numbers in `args` and `env`.

        Raises ValueError for a variable that is not set, one of an editor, and a file that cannot
        be read. `${NAME}` in `args` stays where only `env` of the entry sets NAME: programs such as
        mcp-remote put that in themselves, and a secret is then not seen among the arguments.
        """
        own = entry.get("env")
        self._own = own if isinstance(own, dict) else ()
        found = {key: self._value(key, value) for key, value in entry.items() if key in keys}
        if isinstance(args := found.get("args"), list):
            found["args"] = [_as_text(value) for value in args]
        if isinstance(env := found.get("env"), dict):
            found["env"] = {name: _as_text(value) for name, value in env.items()}
        return found

    def _value(self, key: str, value: Any) -> Any:
        if isinstance(value, str):
            _require_no_editor(value)
            return _REFERENCE.sub(lambda match: self._meant(key, match), value)
        if isinstance(value, list):
            return [self._value(key, item) for item in value]
        if isinstance(value, dict):
            return {name: self._value(key, item) for name, item in value.items()}
        return value

    def _meant(self, key: str, reference: re.Match[str]) -> str:
        path = reference[1]
        if path is None:
            name = reference[0][2:-1]
            if key == "args" and name in self._own and name not in self._environ:
                return reference[0]
            return self._variable(reference[0])
        if key in _SHOWN:
            raise ValueError(f"{key}: it is shown, and so may have no content of a file in it")
        secret = _LAST_LINE_BREAK.sub("", _content(self.path(path)))
        self.secrets.append(secret)
        return secret

    def path(self, name: str) -> str:
        """The path by which a file is named; raises ValueError for a variable that is not set."""
        return os.path.expanduser(_VARIABLE.sub(lambda match: self._variable(match[0]), name))

    def _variable(self, reference: str) -> str:
        name, default = _VARIABLE.fullmatch(reference).groups()  # type: ignore[union-attr]
        value: str | None = self._environ.get(name, default)
        if value is None and name in _NAMES_OF_EDITORS:
            raise ValueError(f"{reference} is known to an editor alone: write the value itself")
        if value is None:
            raise ValueError(f"the environment variable {name} is not set")
        return value


def named_files(text: str, environ: Mapping[str, str]) -> list[str]:
    """The files whose content or variables come into the entries of the file with this text.

    One that is named by a variable which is not set, or by nothing, is left out: its entry is not
    served, and an empty path would be the working directory.
    """
    values = EntryValues(environ)
    named = [found[1] for pattern in (_FILE, _ENV_FILE) for found in pattern.finditer(text)]
    paths = []
    for name in named:
        with contextlib.suppress(ValueError):
            paths.append(values.path(name))
    return [path for path in paths if path]


def read_env_file(path: str) -> dict[str, str]:
    """The variables of a file with a KEY=VALUE in each line, as editors read it.

    Empty lines and those that begin with `#` are skipped; a value may be in quotes. Raises
    ValueError, which shows nothing of the lines.
    """
    return dict(_variables(path, _content(path)))


def _variables(path: str, text: str) -> Iterator[tuple[str, str]]:
    for number, line in enumerate(text.split("\n"), 1):
        given = line.strip()
        if not given or given.startswith("#"):
            continue
        found = _LINE.fullmatch(given)
        if found is None:
            raise ValueError(f"the file {path}, line {number}: expected KEY=VALUE")
        name, value = found.groups()
        if len(value) > 1 and value[0] == value[-1] == '"':
            value = value[1:-1].replace("\\n", "\n")
        elif len(value) > 1 and value[0] == value[-1] == "'":
            value = value[1:-1]
        yield name, value


def _content(path: str) -> str:
    """What is in a file, which is never shown; raises ValueError where it cannot be read."""
    try:
        with open(os.path.expanduser(path), "rb") as file:
            data = file.read(MAX_FILE + 1)
        if len(data) > MAX_FILE:
            raise ValueError(f"the file {path} is larger than {MAX_FILE} bytes")
        return data.decode()
    except OSError as error:
        raise ValueError(f"the file {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ValueError(f"the file {path} is not UTF-8") from None


def _require_no_editor(text: str) -> None:
    """Raises ValueError for what an editor asks its user, or knows itself."""
    if asked := _INPUT.search(text):
        raise ValueError(
            f"{asked[0]} asks the user of an editor, and there is none: name an environment "
            "variable, ${NAME}"
        )
    if found := _OF_AN_EDITOR.search(text):
        raise ValueError(f"{found[0]} is known to an editor alone: write the value itself")


def _as_text(value: Any) -> Any:
    """A number or a boolean as it stands in JSON."""
    return json.dumps(value) if isinstance(value, int | float) else value

"""Variables that a stdio server gets of its caller: per-user credentials, say.

They come from request headers and from claims of the principal (`env_from`), or from a function of
the embedder (`env_for`). They are in memory alone. Records have their digest.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Self

from msgspec.structs import replace

from mcp_proxy.auth.principal import Principal
from mcp_proxy.context_value import ContextValue
from mcp_proxy.errors import ConfigError, InvalidRequest
from mcp_proxy.servers import Served, StdioServer, require_variable

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment

Values = Mapping[str, str]

#: An embedder's own choice: the variables that the server of this caller gets.
EnvFor = Callable[["WSGIEnvironment"], Values]

# What no variable may have: NUL ends it, and a line break may begin another one for who prints it.
_UNFIT = re.compile(r"[\0\r\n]")

# Those of the caller for whom a child is started; None where the request has not all of them.
_current: ContextVar[Values | None] = ContextVar("caller_env", default=None)


def current_values() -> Values | None:
    """The variables of the caller for whom something is done; None where they are not known."""
    return _current.get()


def on_behalf_of(values: Values | None) -> ContextValue[Values | None]:
    """Has children that are started meanwhile get these variables."""
    return ContextValue(_current, values)


class CallerEnv:
    """Which variables a server gets of its caller. Thread-safe."""

    def __init__(self, env_from: Mapping[str, str], env_for: EnvFor | None) -> None:
        self._sources = [(name, *source.partition(":")[::2]) for name, source in env_from.items()]
        self._env_for = env_for

    @classmethod
    def of(cls, server: Served, env_for: EnvFor | None) -> Self | None:
        """What a server gets; None where it gets nothing of its caller."""
        env_from = server.env_from if isinstance(server, StdioServer) else {}
        return cls(env_from, env_for) if env_from or env_for is not None else None

    def __repr__(self) -> str:
        return f"<CallerEnv {[name for name, *_ in self._sources]} env_for={self._env_for!r}>"

    def values_of(self, environ: WSGIEnvironment, principal: Principal | None) -> Values:
        """The variables of who has sent a request.

        Raises InvalidRequest, which names the source and no value, where a source that is not
        optional is missing, and where a value cannot be one of a variable. Raises ConfigError where
        `env_for` returns no such mapping.
        """
        found = {}
        for name, kind, key in self._sources:
            source = key.removesuffix("?")
            value = _header(environ, source) if kind == "header" else _claim(principal, source)
            if value is None and not key.endswith("?"):
                raise InvalidRequest(f"This server needs the {kind} {source}, and it is missing")
            if value is not None:
                found[name] = _fit(value, f"The {kind} {source}")
        if self._env_for is not None:
            found |= _of_embedder(self._env_for(environ))
        return found


def with_values(server: StdioServer, values: Values) -> StdioServer:
    """The server with the variables of a caller, which go before its own."""
    return replace(server, env={**server.env, **values})


def as_text(values: Values) -> bytes:
    """The variables as bytes, the same for the same ones: for a digest."""
    pairs = (f"{name}={value}" for name, value in sorted(values.items()))
    return "\0".join(pairs).encode("utf-8", "surrogateescape")


def _header(environ: WSGIEnvironment, name: str) -> str | None:
    """A header, the bytes of which the child is to have as they came (PEP 3333: latin-1)."""
    value: str = environ.get("HTTP_" + name.upper().replace("-", "_"), "")
    return os.fsdecode(value.encode("latin-1", "replace")) or None


def _claim(principal: Principal | None, name: str) -> str | None:
    """A claim as a text; an object or a list is none. Raises InvalidRequest for those."""
    value: Any = None if principal is None else principal.claims.get(name)
    if value is None or isinstance(value, str):
        return value or None
    if isinstance(value, bool | int | float):
        return json.dumps(value)
    raise InvalidRequest(f"The claim {name} is no text, and this server needs one")


def _fit(value: str, source: str) -> str:
    if _UNFIT.search(value):
        raise InvalidRequest(f"{source} has a NUL or a line break in it")
    try:
        os.fsencode(value)
    except UnicodeEncodeError:
        raise InvalidRequest(f"{source} is no text that a variable can have") from None
    return value


def _of_embedder(values: Any) -> dict[str, str]:
    if not isinstance(values, Mapping) or not all(
        isinstance(part, str) for pair in values.items() for part in pair
    ):
        raise ConfigError("env_for is to return a mapping of texts to texts")
    for name in values:
        require_variable(name)
    return {name: _fit(value, f"The variable {name}") for name, value in values.items()}

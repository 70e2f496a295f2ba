"""Which tools of a server its clients may see and call, and what that makes of messages.

Pure. What is hidden is in no answer to tools/list, and a call of it is refused as one of a tool
that there is not. A request is built anew from what was checked: another reader may take another
value of a key that is there twice, and Go's takes `Name` for `name`.
"""

from __future__ import annotations

import fnmatch
import re
from functools import cache

import msgspec
from msgspec import UNSET, Raw
from msgspec.structs import force_setattr

from mcp_proxy.errors import ConfigError, InvalidParams, UnknownTool
from mcp_proxy.wire import jsonrpc
from mcp_proxy.wire.jsonrpc import Notification, Request, Response

LIST = "tools/list"
CALL = "tools/call"

# The fields of the params of a call, by which readers that know no case know them, too.
_FIELDS = frozenset({"name", "arguments", "_meta", "task"})

# The longest name that is repeated in a refusal.
_SHOWN = 200


class ToolFilter(msgspec.Struct, frozen=True):
    """The tools that clients see: those of `allow`, None for all, without those of `deny`.

    Each is a name or a pattern as of fnmatch, in which case counts. The constructor raises
    ConfigError.
    """

    allow: tuple[str, ...] | None = None
    deny: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for field in ("allow", "deny"):
            names = getattr(self, field)
            if field == "allow" and names is None:
                continue
            if not isinstance(names, list | tuple) or not all(isinstance(n, str) for n in names):
                raise ConfigError(f"ToolFilter: {field}: expected a list of texts")
            force_setattr(self, field, tuple(names))

    def shows(self, name: str) -> bool:
        """Whether a tool of this name is not hidden."""
        is_allowed = self.allow is None or _pattern(self.allow).fullmatch(name) is not None
        return is_allowed and _pattern(self.deny).fullmatch(name) is None

    def admitted(self, request: Request) -> Request:
        """The request as the server may get it: a tools/call is built anew.

        Raises UnknownTool for a hidden tool, InvalidParams where no tool is named.
        """
        if request.method != CALL:
            return request
        fields = jsonrpc.fields_of(request.params)
        name = jsonrpc.text_of(fields.get("name", UNSET))
        if name is None:
            raise InvalidParams("The params of tools/call need a name, which is a text")
        if not self.shows(name):
            raise UnknownTool(name[:_SHOWN])
        kept = {key: value for key, value in fields.items() if not _is_misspelt(key)}
        kept["name"] = jsonrpc.as_payload(name)
        return Request(request.id, CALL, jsonrpc.as_payload(kept))

    def admits(self, notification: Notification) -> bool:
        """Whether the server may get a notification: not one that would call a tool."""
        return notification.method != CALL

    def visible(self, response: Response) -> Response:
        """The answer to a tools/list without the hidden tools; the others keep their bytes.

        Raises ParseError where the nesting is as deep as `parse` allows.
        """
        result = response.result
        if not jsonrpc.is_object(result):
            return response
        return Response(response.id, jsonrpc.edited(result, self._hide), response.error)

    def _hide(self, fields: dict[str, Raw]) -> None:
        entries = jsonrpc.elements_of(fields.get("tools", UNSET))
        if entries is not None:
            fields["tools"] = jsonrpc.as_payload([one for one in entries if self._is_shown(one)])

    def _is_shown(self, entry: Raw) -> bool:
        try:
            return self.shows(_named.decode(entry).name)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return False  # it has no name, or none that a call could have


def lists_tools(response: Response) -> bool:
    """Whether a response whose request is not known has a list of tools."""
    fields = jsonrpc.fields_of(response.result)
    return jsonrpc.elements_of(fields.get("tools", UNSET)) is not None


class _Named(msgspec.Struct):
    name: str


_named = msgspec.json.Decoder(_Named)


def _is_misspelt(key: str) -> bool:
    """Whether a key is one of a call's for readers that know no case."""
    return key not in _FIELDS and key.casefold() in _FIELDS


@cache
def _pattern(patterns: tuple[str, ...]) -> re.Pattern[str]:
    """What matches a name that one of the patterns matches; none matches nothing."""
    return re.compile("|".join(map(fnmatch.translate, patterns)) or r"(?!)")

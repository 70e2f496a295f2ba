"""Takes hidden tools out of the answers of a server while they are forwarded.

Pure. An answer is a JSON document, which is held until it is whole, or an event stream, of which
each event is; every event without a list of tools passes with its bytes, for any line endings and
any split into pieces.
"""

from __future__ import annotations

import msgspec

from mcp_proxy.errors import BadAnswer, ClientError
from mcp_proxy.wire import jsonrpc, sse
from mcp_proxy.wire.jsonrpc import Batch, Message, Response
from mcp_proxy.wire.tools import ToolFilter, lists_tools

#: The largest document, or event, that is held, in bytes.
MAX_HELD = 64 * 1024 * 1024

# What the key of a list has in it, as it is or escaped.
_KEY, _ESCAPE = b"tools", b"\\u"

_UNREADABLE = "The server's list of tools cannot be read"


class ToolLists:
    """The reader of one answer. Not thread-safe.

    With `is_stream` the answer is an event stream, else a document.
    """

    def __init__(self, tools: ToolFilter, is_stream: bool) -> None:
        self._tools = tools
        self._is_stream = is_stream
        self._held = bytearray()
        self._searched = 0  # bytes of them in which no event ends
        self._is_first = True

    def feed(self, piece: bytes) -> bytes:
        """The bytes that may be passed on now; all that are left for b"", the answer's end.

        Raises BadAnswer for what is too long, or may be a list and cannot be read.
        """
        self._held += piece
        if len(self._held) > MAX_HELD:
            raise BadAnswer(_UNREADABLE)
        passed = self._whole_events() if self._is_stream else b""
        if not piece and self._held:
            rest, self._held = bytes(self._held), bytearray()
            passed += self._event(rest) if self._is_stream else self._document(rest)
        return passed

    def _whole_events(self) -> bytes:
        passed = bytearray()
        while found := sse.BLOCK_END.search(self._held, self._searched):
            block = bytes(self._held[: found.end()])
            del self._held[: found.end()]
            self._searched = 0
            passed += self._event(block)
        self._searched = max(0, len(self._held) - sse.LONGEST_BLOCK_END)
        return bytes(passed)

    def _event(self, block: bytes) -> bytes:
        bom = sse.BOM if self._is_first and block.startswith(sse.BOM) else b""
        self._is_first = False
        block = block.removeprefix(bom)
        data = sse.data_of(block)
        shown = self._document(data)
        return bom + (block if shown == data else sse.with_data(block, shown))

    def _document(self, data: bytes) -> bytes:
        if _KEY not in data and _ESCAPE not in data:
            return data  # it is no list, whatever it is
        try:
            parsed = jsonrpc.parse(data)
            shown = self._shown(parsed)
        except ClientError as error:
            if _may_list(data):
                raise BadAnswer(_UNREADABLE) from error
            return data  # as an error without an id, which some servers write
        if shown is parsed:
            return data
        return jsonrpc.encoded(shown)

    def _shown(self, parsed: Message | Batch) -> Message | Batch:
        """What is in a document as clients may see it; the same where nothing is a list."""
        if isinstance(parsed, list):
            shown = [self._message(message) for message in parsed]
            is_same = all(one is other for one, other in zip(shown, parsed, strict=True))
            return parsed if is_same else shown
        return self._message(parsed)

    def _message(self, message: Message) -> Message:
        if isinstance(message, Response) and lists_tools(message):
            return self._tools.visible(message)
        return message


def _may_list(data: bytes) -> bool:
    """Whether what is no JSON-RPC may have a list of tools for some reader."""
    try:
        document = msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return True
    parts = document if isinstance(document, list) else [document]
    results = [found for part in parts for found in _members(part, "result")]
    return any(_members(result, "tools") for result in results)


def _members(document: object, name: str) -> list[object]:
    """The values under a key of an object, in whichever case."""
    if not isinstance(document, dict):
        return []
    return [value for key, value in document.items() if key.casefold() == name]

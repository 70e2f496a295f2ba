"""JSON-RPC 2.0 messages as MCP uses them: envelopes are decoded, payloads stay bytes.

Checked are: one object (or one array) per body, UTF-8, ids that are strings or integers (MCP
2025-11-25, basic, "Messages": never null), params that are an object or an array. Not checked is
the content of params, results and errors, except for the few fields that routing needs.

Liberal is what is taken: members that are null count as absent where null means nothing, a byte
order mark is skipped, half a character in an escape passes as it came.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import TypeVar

import msgspec
from msgspec import UNSET, Raw, UnsetType

from mcp_proxy.errors import EncodedBody, InvalidRequest, ParseError, RequestId
from mcp_proxy.wire import mending

#: The most messages in a batch; MCP 2025-03-26 sets no limit.
MAX_BATCH = 256

#: The notification that takes a request back.
CANCELLED = "notifications/cancelled"

_PIECE = 1024 * 1024

_BOM = b"\xef\xbb\xbf"
_GZIP = b"\x1f\x8b"

T = TypeVar("T")


def _meta_of(message: Request | Notification) -> Meta:
    """The routing keys in `params._meta`; InvalidRequest where they have wrong types."""
    if message.params is UNSET or bytes(memoryview(message.params)[:1]) != b"{":
        return _NO_META
    try:
        meta = _decode(_meta, message.params).meta
    except ParseError:
        meta = _decode(_meta, mending.repair(bytes(message.params))).meta
    return _NO_META if meta is UNSET else meta


class Request(msgspec.Struct, frozen=True, dict=True):
    """A message that expects a response."""

    id: RequestId
    method: str
    params: Raw | UnsetType = UNSET

    meta = cached_property(_meta_of)

    def note_meta(self, meta: Meta) -> None:
        """What somebody has read of `_meta` already, so that it is not read again."""
        self.__dict__["meta"] = meta

    def with_params(self, params: Raw) -> Request:
        """The same request with other params that have the same `_meta`."""
        changed = Request(self.id, self.method, params)
        changed.__dict__.update(self.__dict__)  # `meta` need not be read again
        return changed


class Notification(msgspec.Struct, frozen=True, dict=True):
    """A message that expects no response."""

    method: str
    params: Raw | UnsetType = UNSET

    meta = cached_property(_meta_of)


class Response(msgspec.Struct, frozen=True):
    """The answer to a request: exactly one of `result` and `error`."""

    id: RequestId
    result: Raw | UnsetType = UNSET
    error: Raw | UnsetType = UNSET


Message = Request | Notification | Response
Batch = list[Message]


class Meta(msgspec.Struct, frozen=True):
    """The keys of a request's `params._meta` that a proxy routes by."""

    progress_token: RequestId | UnsetType = msgspec.field(default=UNSET, name="progressToken")
    protocol_version: str | UnsetType = msgspec.field(
        default=UNSET, name="io.modelcontextprotocol/protocolVersion"
    )
    log_level: Raw | UnsetType = msgspec.field(
        default=UNSET, name="io.modelcontextprotocol/logLevel"
    )


class _Envelope(msgspec.Struct):
    jsonrpc: str
    id: RequestId | UnsetType = UNSET
    method: str | UnsetType | None = UNSET
    params: Raw | UnsetType = UNSET
    result: Raw | UnsetType = UNSET
    error: Raw | UnsetType = UNSET


class _MetaOnly(msgspec.Struct):
    meta: Meta | UnsetType = msgspec.field(default=UNSET, name="_meta")


class _ProgressParams(msgspec.Struct):
    token: RequestId | UnsetType = msgspec.field(default=UNSET, name="progressToken")


class _CancelParams(msgspec.Struct):
    request_id: RequestId | UnsetType = msgspec.field(default=UNSET, name="requestId")


class _InitializeParams(msgspec.Struct):
    protocol_version: str = msgspec.field(name="protocolVersion")


class _ClientInfo(msgspec.Struct):
    name: str = ""
    version: str = ""


class _ClientMeta(msgspec.Struct):
    client: _ClientInfo | None = msgspec.field(
        name="io.modelcontextprotocol/clientInfo", default=None
    )


class _NamedParams(msgspec.Struct):
    name: str = ""
    client: _ClientInfo | None = msgspec.field(name="clientInfo", default=None)
    meta: _ClientMeta | None = msgspec.field(name="_meta", default=None)


class _Initialize(msgspec.Struct):
    params: Raw | UnsetType = UNSET


class _ErrorBody(msgspec.Struct):
    code: int
    message: str
    data: object | UnsetType = UNSET


_envelope = msgspec.json.Decoder(_Envelope)
_elements = msgspec.json.Decoder(list[Raw])
_meta = msgspec.json.Decoder(_MetaOnly)
_progress = msgspec.json.Decoder(_ProgressParams)
_cancel = msgspec.json.Decoder(_CancelParams)
_initialize = msgspec.json.Decoder(_InitializeParams)
_named = msgspec.json.Decoder(_NamedParams)
_recorded = msgspec.json.Decoder(_Initialize)
_fields = msgspec.json.Decoder(dict[str, Raw])
_request_id: msgspec.json.Decoder[RequestId] = msgspec.json.Decoder(RequestId)
_text = msgspec.json.Decoder(str)
_encoder = msgspec.json.Encoder()

_NO_META = Meta()


# --- reading -------------------------------------------------------------------------------------


def parse(body: bytes, keeps_halves: bool = True) -> Message | Batch:
    """The message in `body`, or the list of messages where `body` is an array (2025-03-26 batches).

    Without `keeps_halves` an escape of half a character is refused, as strict readers do.
    Raises ParseError (not JSON, not UTF-8) or InvalidRequest (JSON, but not a JSON-RPC message).
    """
    if not body.isascii():
        if body.startswith(_GZIP):
            raise EncodedBody
        _require_utf8(body)
        body = body.removeprefix(_BOM)
    try:
        if body.lstrip(b" \t\r\n")[:1] == b"[":
            return _parse_batch(body)
        return _message(body, b"null" in body)
    except ParseError:
        if not keeps_halves or not mending.has_halves(body):
            raise
        return _with_halves(body)


def parse_message(body: bytes) -> Message:
    """The one message in `body`; raises as `parse` does, also for an array."""
    message = parse(body)
    if isinstance(message, list):
        raise InvalidRequest("A single JSON-RPC message is expected here, not a batch")
    return message


def _parse_batch(body: bytes) -> Batch:
    elements = _decode(_elements, body)
    if not elements:
        raise InvalidRequest("A JSON-RPC batch must not be empty")
    if len(elements) > MAX_BATCH:
        raise InvalidRequest(f"A JSON-RPC batch may hold at most {MAX_BATCH} messages")
    may_have_nulls = b"null" in body
    return [_message(element, may_have_nulls) for element in elements]


def _require_utf8(body: bytes) -> None:
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        for start in range(0, len(body), _PIECE):  # decoding 50 MB at once would take 200 MB
            decoder.decode(body[start : start + _PIECE])
        decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        raise ParseError(f"The body is not UTF-8: {error.reason}") from error


def _decode(decoder: msgspec.json.Decoder[T], body: bytes | Raw) -> T:
    """The decoded `body`; raises ParseError or InvalidRequest."""
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        raise InvalidRequest(f"Not a JSON-RPC 2.0 message: {error}") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        why = error if bytes(body).strip() else "it is empty"
        raise ParseError(f"The body is not JSON: {why}") from error
    except RecursionError as error:
        raise ParseError("The JSON is nested too deeply") from error


def _message(encoded: bytes | Raw, may_have_nulls: bool) -> Message:
    envelope = _decode(_envelope, encoded)
    if may_have_nulls:
        _drop_nulls(envelope)
    if envelope.jsonrpc != "2.0":
        raise InvalidRequest('Not a JSON-RPC 2.0 message: "jsonrpc" must be "2.0"')
    has_result, has_error = envelope.result is not UNSET, envelope.error is not UNSET
    if not isinstance(envelope.method, str):
        if has_result == has_error:
            raise InvalidRequest('A JSON-RPC message needs a "method", a "result" or an "error"')
        if envelope.id is UNSET:
            raise InvalidRequest('A JSON-RPC response needs the "id" of its request')
        return Response(envelope.id, envelope.result, envelope.error)
    if has_result or has_error:
        raise InvalidRequest("A JSON-RPC message has either a method or a result, not both")
    if envelope.params is not UNSET and bytes(memoryview(envelope.params)[:1]) not in (b"{", b"["):
        raise InvalidRequest('"params" must be an object')
    if envelope.id is UNSET:
        return Notification(envelope.method, envelope.params)
    return Request(envelope.id, envelope.method, envelope.params)


def _drop_nulls(envelope: _Envelope) -> None:
    """Leaves out what is null where that means nothing: in a response a result may be null."""
    envelope.params, envelope.error = _present(envelope.params), _present(envelope.error)
    if envelope.error is not UNSET or isinstance(envelope.method, str):
        envelope.result = _present(envelope.result)
    if envelope.params is not UNSET:
        params = _without_null(envelope.params, ("_meta",))
        envelope.params = _without_null(params, ("_meta", "progressToken"))


def _present(payload: Raw | UnsetType) -> Raw | UnsetType:
    """The payload; null is none."""
    if payload is UNSET or (len(memoryview(payload)) == 4 and bytes(payload) == b"null"):
        return UNSET
    return payload


def _without_null(payload: Raw, path: Sequence[str]) -> Raw:
    """`payload` without the field at `path` if that is null, else `payload` itself."""
    head, *rest = path
    if bytes(memoryview(payload)[:1]) != b"{":
        return payload
    fields = _decode(_fields, payload)
    found = fields.get(head)
    if found is None:
        return payload
    if rest:
        inner = _without_null(found, rest)
        if inner is found:
            return payload
        fields[head] = inner
    elif _present(found) is UNSET:
        del fields[head]
    else:
        return payload
    return as_payload(fields)


# --- half a character ----------------------------------------------------------------------------


def _with_halves(body: bytes) -> Message | Batch:
    """The messages of a body with lone halves; their payloads have them as they came."""
    masked = mending.masked(body)
    if masked is None:
        raise ParseError("The body is not JSON: it has half of a character in an escape")
    parsed = parse(masked.text, keeps_halves=False)
    if isinstance(parsed, list):
        return [_unmasked(message, masked) for message in parsed]
    return _unmasked(parsed, masked)


def _unmasked(message: Message, masked: mending.Masked) -> Message:
    """Raises ParseError where the id or the method has half a character."""
    placeholder = chr(int(masked.placeholder[2:], 16))
    names = (getattr(message, "id", ""), getattr(message, "method", ""))
    if any(isinstance(name, str) and placeholder in name for name in names):
        raise ParseError("An id or a method must not have half of a character")
    payloads = {
        name: masked.original(payload)
        for name in ("params", "result", "error")
        if isinstance(payload := getattr(message, name, UNSET), Raw)
    }
    return msgspec.structs.replace(message, **payloads)


# --- the few fields that routing needs -----------------------------------------------------------


def progress_token_of(notification: Notification) -> RequestId | None:
    """The token that a `notifications/progress` names, None where it names none."""
    return _field(_progress, notification.params, "token")


def cancelled_id_of(notification: Notification) -> RequestId | None:
    """The request id that a `notifications/cancelled` names, None where it names none."""
    return _field(_cancel, notification.params, "request_id")


def protocol_version_of(payload: Raw | UnsetType) -> str | None:
    """`protocolVersion` of initialize params or of an InitializeResult, None without one."""
    return _field(_initialize, payload, "protocol_version")


def names_in(params: Raw | UnsetType) -> tuple[str, str]:
    """The name that a request's params have, as a tool's, and the client's name and version, which
    an initialize has and each request of 2026-07-28.

    Each is empty where there is none, or where its type is wrong.
    """
    try:
        found = _NamedParams() if params is UNSET else _named.decode(params)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        found = _NamedParams()
    client = found.client or (found.meta and found.meta.client)
    return found.name, f"{client.name} {client.version}".strip() if client else ""


def client_in(initialize: str) -> str:
    """The client's name and version in a whole initialize request; empty where it has none."""
    try:
        return names_in(_recorded.decode(initialize).params)[1]
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        return ""


def is_object(payload: Raw | UnsetType) -> bool:
    """Whether a payload is a JSON object."""
    return payload is not UNSET and bytes(memoryview(payload)[:1]) == b"{"


def fields_of(payload: Raw | UnsetType) -> dict[str, Raw]:
    """The fields of an object, each as it came; none of anything else.

    Raises ParseError where the nesting is as deep as `parse` allows.
    """
    if payload is UNSET or not is_object(payload):
        return {}
    try:
        return _decode(_fields, payload)
    except ParseError:
        masked = mending.masked(bytes(payload))
        if masked is None:
            raise
        fields = _decode(_fields, masked.text)
        return {name: masked.original(value) for name, value in fields.items()}


def elements_of(payload: Raw | UnsetType) -> list[Raw] | None:
    """The elements of an array, each as it came; None of anything else."""
    try:
        return _elements.decode(payload) if payload else None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


def member(fields: Mapping[str, Raw], name: str) -> Raw | UnsetType:
    """The field of this name; null is none."""
    return _present(fields.get(name, UNSET))


def id_of(payload: Raw | UnsetType) -> RequestId | None:
    """The id or token that a payload is, None where it is anything else."""
    try:
        return _request_id.decode(payload) if payload else None
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None


def text_of(payload: Raw | UnsetType) -> str | None:
    """The text that a payload is, None where it is anything else."""
    try:
        return _text.decode(payload) if payload else None
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None


def _field(decoder: msgspec.json.Decoder[T], payload: Raw | UnsetType, name: str) -> str | None:
    if payload is UNSET:
        return None
    try:
        value = getattr(decoder.decode(payload), name)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        whole = bytes(payload)
        if not mending.has_halves(whole) or (repaired := mending.repair(whole)) == whole:
            return None
        found = _field(decoder, Raw(repaired), name)
        return None if isinstance(found, str) and "\ufffd" in found else found
    return None if value is UNSET else value


# --- writing -------------------------------------------------------------------------------------


def encode(message: Message, request_id: RequestId | None = None) -> bytes:
    """`message` as one line of JSON without a line break, under `request_id` where one is given."""
    if isinstance(message, Notification):
        envelope = _Envelope("2.0", method=message.method, params=message.params)
    elif isinstance(message, Request):
        key = message.id if request_id is None else request_id
        envelope = _Envelope("2.0", key, message.method, message.params)
    else:
        key = message.id if request_id is None else request_id
        envelope = _Envelope("2.0", key, result=message.result, error=message.error)
    line = _encoder.encode(envelope)
    # JSON has line breaks between tokens only, so a space can replace each.
    return line if b"\n" not in line and b"\r" not in line else one_line(line)


def encoded(message: Message | Batch) -> bytes:
    """A message, or a batch as an array."""
    return (
        encode_batch(list(map(encode, message))) if isinstance(message, list) else encode(message)
    )


def encode_batch(messages: Sequence[bytes]) -> bytes:
    """The JSON array of encoded messages."""
    return b"[" + b",".join(messages) + b"]"


def encode_error(
    code: int, message: str, request_id: RequestId | None, data: object | None = None
) -> bytes:
    """An error response; without a `request_id` the id is left out, never null."""
    key = UNSET if request_id is None else request_id
    return _encoder.encode(_Envelope("2.0", key, error=error_payload(code, message, data)))


def error_payload(code: int, message: str, data: object | None = None) -> Raw:
    """A JSON-RPC error object; `data` of None is left out."""
    return as_payload(_ErrorBody(code, message, UNSET if data is None else data))


def as_payload(value: object) -> Raw:
    """`value` as JSON, to be used as params or result."""
    return Raw(_encoder.encode(value))


def replace_field(payload: Raw | UnsetType, path: Sequence[str], value: RequestId) -> Raw:
    """`payload` with the existing field at `path` replaced; every other value keeps its bytes.

    Raises ParseError where the nesting is as deep as `parse` allows.
    """
    given = Raw(b"{}") if payload is UNSET else payload
    try:
        return _replaced(given, path, value)
    except ParseError:
        masked = mending.masked(bytes(given))
        if masked is None:
            raise
        return masked.original(_replaced(Raw(masked.text), path, value))


def _replaced(payload: Raw, path: Sequence[str], value: RequestId) -> Raw:
    fields = _decode(_fields, payload)
    head, *rest = path
    fields[head] = _replaced(fields[head], rest, value) if rest else as_payload(value)
    return as_payload(fields)


def edited(payload: Raw | UnsetType, change: Callable[[dict[str, Raw]], object]) -> Raw:
    """`payload` with its fields as `change` leaves them; every value keeps its bytes.

    Without a payload `change` gets no fields, and so it does where that is no object. Raises
    ParseError where the nesting is as deep as `parse` allows.
    """
    given = payload if payload is not UNSET and is_object(payload) else Raw(b"{}")
    try:
        return _edited(given, change)
    except ParseError:
        masked = mending.masked(bytes(given))
        if masked is None:
            raise
        return masked.original(_edited(Raw(masked.text), change))


def _edited(payload: Raw, change: Callable[[dict[str, Raw]], object]) -> Raw:
    fields = _decode(_fields, payload)
    change(fields)
    return as_payload(fields)


def with_params(body: bytes, params: Raw | UnsetType) -> bytes:
    """The message in `body` with other params; whatever else it has keeps its bytes."""
    whole = Raw(body.strip())
    if params is UNSET or not is_object(whole):
        return body
    return bytes(edited(whole, lambda fields: fields.update(params=params)))


def one_line(encoded: bytes) -> bytes:
    """`encoded` with a space for each CR and LF."""
    return encoded.replace(b"\n", b" ").replace(b"\r", b" ")

"""Which of several HTTP backends has a task (the extension of MCP 2026-07-28, SEP-2663).

A request about a task comes without a session and names the task alone. So what begins a task is
read on its way to the client, and the backend's address is kept for the time that the task has.
Where callers are authenticated the server cannot know them, so it is kept, too, whose the task is.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Collection, Mapping

from msgspec import UNSET, Raw

from mcp_proxy.backends.http import HttpCall
from mcp_proxy.errors import (
    INVALID_PARAMS,
    BackendUnreached,
    ClientError,
    InvalidParams,
    StorageError,
)
from mcp_proxy.storage.records import Storage
from mcp_proxy.storage.session import PRINCIPAL
from mcp_proxy.transparent.balancing import Balancer
from mcp_proxy.transparent.forwarding import closed_on_error, decoded
from mcp_proxy.transparent.session_affinity import SessionAffinity
from mcp_proxy.wire import headers, jsonrpc, listening, modern, results, sse
from mcp_proxy.wire.capabilities import TASKS_EXTENSION
from mcp_proxy.wire.jsonrpc import Batch, Message, Request, Response
from mcp_proxy.wire.urls import Address

log = logging.getLogger(__name__)

#: Seconds for which the address of a task is kept at most, and where it has no time of its own.
LONGEST = 24 * 3600.0

# The longest answer about a task that is read, in bytes; a longer one is no refusal.
_MAX_ANSWER = 1024 * 1024

# The methods that name a task; the last one may name several, and something else.
_ABOUT_TASKS = frozenset({"tasks/get", "tasks/update", "tasks/cancel", modern.LISTEN})
_DECLARED = f'"{TASKS_EXTENSION}"'.encode()
_BEGUN = b'"task"'


class Tasks:
    """The tasks of one transport's backends. Thread-safe."""

    def __init__(self, balancer: Balancer, affinity: SessionAffinity, storage: Storage) -> None:
        self._balancer = balancer
        self._affinity = affinity
        self._storage = storage

    # --- tasks that begin ------------------------------------------------------------------------

    def reader(
        self, message: Message | Batch | None, call: HttpCall, binding: Mapping[str, str]
    ) -> Callable[[bytes], bytes] | None:
        """What gets the pieces of an answer that may begin a task, and returns them unchanged.

        The task's address is kept before the client knows of the task, with its caller, as
        `SessionManager.binding` says who that is. None where nothing is left to read.
        """
        if not isinstance(message, Request) or message.method == modern.LISTEN:
            return None
        params = b"" if message.params is UNSET else bytes(message.params)
        if _DECLARED not in params or not (binding or self._balancer.has_several()):
            return None
        whose = binding.get(PRINCIPAL, "")
        if call.media_type == headers.JSON and call.whole is not None:
            self._note(_response_in(call), call.address, whose)
        if call.media_type != headers.EVENT_STREAM:
            return None
        decoder = sse.Decoder(_MAX_ANSWER)

        def feed(piece: bytes) -> bytes:
            for event in decoder.feed(piece):
                if event.data and _BEGUN in event.data:
                    self._note(_parsed(event.data), call.address, whose)
            return piece

        return feed

    def _note(self, answer: Response | None, address: Address, whose: str) -> None:
        fields = {} if answer is None else jsonrpc.fields_of(answer.result)
        task_id = jsonrpc.text_of(fields.get("taskId", UNSET))
        if task_id is not None and fields.get("resultType") == Raw(_BEGUN):
            self._keep(task_id, address, fields, whose)

    def _keep(self, task_id: str, address: Address, fields: Mapping[str, Raw], whose: str) -> None:
        """Keeps the address of a task. The client gets its answer whatever becomes of that: without
        it every backend is asked, and a task of a caller is nobody's.
        """
        lasting = jsonrpc.id_of(fields.get("ttlMs", UNSET))
        seconds = lasting / 1000 if isinstance(lasting, int) and lasting > 0 else LONGEST
        value = " ".join([address.backend_url, address.name or "", *([whose] if whose else [])])
        try:
            self._storage.keep(_name_of(task_id), value, min(seconds, LONGEST))
        except StorageError as error:
            log.warning("the backend of a task was not recorded: %s", error)

    # --- requests about them ---------------------------------------------------------------------

    def require_own(self, message: Message | Batch | None, binding: Mapping[str, str]) -> None:
        """Raises InvalidParams, as servers do for a task that they do not know, where a request is
        about one that is not the caller's.
        """
        if not binding:
            return
        for part in message if isinstance(message, list) else [message]:
            if isinstance(part, Request) and part.method in _ABOUT_TASKS:
                for task_id in _all_named_in(part):
                    kept = self._storage.kept(_name_of(task_id)) or ""
                    if kept.rpartition(" ")[2] != binding[PRINCIPAL]:
                        raise InvalidParams("Unknown task")
                _require_no_other_name(part)

    def asked(
        self,
        message: Message | Batch | None,
        act: Callable[[Address], HttpCall],
        but: Callable[[Address], bool] | None = None,
    ) -> HttpCall | None:
        """The answer of the backend that has the task which a request is about; `act` gets that of
        one backend. None where the request is about none, or there is one backend alone.

        Where it is not known who has it, or they cannot be reached, every other is asked once,
        `but` some excepted; a stream that tells of tasks has any backend then: None. Raises the
        errors of `act`, BackendUnreached only where none that can be reached has the task.
        """
        if not isinstance(message, Request) or message.method not in _ABOUT_TASKS:
            return None
        if not self._balancer.has_several() or (task_id := _named_in(message)) is None:
            return None
        known, failure = self._address_of(task_id), None
        if known is not None:
            failure = self._balancer.failure([known])
            if self._balancer.is_usable(known):
                try:
                    return act(known)
                except BackendUnreached as error:
                    self._balancer.note_failure(known, error)
                    failure = error
        return None if message.method == modern.LISTEN else self._found(task_id, act, but, failure)

    def _found(
        self,
        task_id: str,
        act: Callable[[Address], HttpCall],
        but: Callable[[Address], bool] | None,
        failure: BackendUnreached | None,
    ) -> HttpCall:
        """The answer of the first backend that does not refuse the task as unknown.

        Where all of them do, that of the last, unless there is one that could not be asked.
        """
        refused: HttpCall | None = None
        for address in self._balancer.one_by_one():
            if but is not None and but(address):
                continue
            if refused is not None:
                refused.close()
            try:
                refused = call = act(address)
            except BackendUnreached as error:
                self._balancer.note_failure(address, error)
                failure = error
                continue
            with closed_on_error(call):
                answer = _response_in(call)
            if answer is None or not _is_unknown(answer):
                if answer is not None and answer.result is not UNSET:
                    self._keep(task_id, call.address, jsonrpc.fields_of(answer.result), "")
                return call
        if refused is not None and failure is None:
            return refused
        if refused is not None:
            refused.close()
        raise failure or self._balancer.failure([])

    def _address_of(self, task_id: str) -> Address | None:
        """The address that is kept for a task, None where there is none that may be asked."""
        try:
            kept = self._storage.kept(_name_of(task_id))
        except StorageError as error:
            log.warning("the backend of a task is not known: %s", error)
            return None
        url, _, rest = (kept or "").partition(" ")
        name = rest.partition(" ")[0]
        return self._affinity.allowed(url, name or None) if url else None


def _name_of(task_id: str) -> str:
    return f"task:{hashlib.sha256(task_id.encode('utf-8', 'replace')).hexdigest()}"


def _named_in(message: Request) -> str | None:
    """The task that a request is about, the first one to be heard of; None without one."""
    return next(iter(_all_named_in(message)), None)


def _all_named_in(message: Request) -> Collection[str]:
    """The tasks that a request is about."""
    if message.method != modern.LISTEN:
        name = modern.name_of(message.method, jsonrpc.fields_of(message.params))
        return () if name is None else (name,)
    try:
        return listening.filter_of(message.params).tasks
    except ClientError:
        return ()


def _require_no_other_name(request: Request) -> None:
    """Raises InvalidParams where another reader may find the name of a task, or another one.

    Some readers do not look at capitals.
    """
    names = jsonrpc.fields_of(request.params)
    is_odd = any(name != "taskId" and name.casefold() == "taskid" for name in names)
    if is_odd or (request.method != modern.LISTEN and "taskId" not in names):
        raise InvalidParams("Unknown task")


def _is_unknown(answer: Response) -> bool:
    """Whether a backend says that it has no such task."""
    return answer.error is not UNSET and results.code_of(answer.error) == INVALID_PARAMS


def _response_in(call: HttpCall) -> Response | None:
    """The response in an answer, None where there is none; the body can still be read.

    Raises as `HttpCall.pieces` does.
    """
    body = call.read_ahead(_MAX_ANSWER)
    if body is None or (body := decoded(body, call.header("Content-Encoding"))) is None:
        return None
    if call.media_type == headers.JSON:
        return _parsed(body)
    if call.media_type != headers.EVENT_STREAM:
        return None
    events = sse.Decoder().feed(body + b"\n\n")
    found = (_parsed(event.data) for event in events if event.data)
    return next((each for each in found if each is not None), None)


def _parsed(data: bytes) -> Response | None:
    try:
        message = jsonrpc.parse_message(data)
    except ClientError:
        return None
    return message if isinstance(message, Response) else None

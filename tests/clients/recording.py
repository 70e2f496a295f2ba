"""A session of the Python SDK that keeps everything it hears, to be compared with another session.

Results are taken as the JSON that came over the wire, not as the SDK's models, so that nothing that
a model would leave out escapes the comparison.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import anyio
from mcp import ClientSession, MCPError, types
from mcp.shared.jsonrpc_dispatcher import JSONRPCDispatcher
from pydantic import TypeAdapter

Json = dict[str, Any]

_AS_IT_CAME: TypeAdapter[Any] = TypeAdapter(Json)
_HEARING_TIME = 15.0
_STEP_TIME = 30.0

#: What the outcome of a step holds if it ended in anything but a result or a JSON-RPC error.
FAILURE = "the step failed"


class Recording:
    """One client's side: asks, listens, and answers what it is asked.

    What the server is told when it asks is set by whoever drives the session: `answer` for
    elicitation, `completion` for sampling, `roots`.
    """

    def __init__(self) -> None:
        self.session: ClientSession
        self.dispatcher: JSONRPCDispatcher[Any]
        self.called: set[str] = set()
        self.heard: list[Json] = []
        self.asked: list[Json] = []
        self.roots = [a_root("one")]
        self.answer: types.ElicitResult | types.ErrorData = types.ElicitResult(action="cancel")
        self.completion: types.CreateMessageResult | types.ErrorData = types.ErrorData(
            code=types.INVALID_REQUEST, message="No model today"
        )

    # --- asking ----------------------------------------------------------------------------------

    async def ask(self, method: str, **params: Any) -> Json:
        """The result of a request as it came over the wire; raises MCPError."""
        self._note_tool(method, params)
        request = types.Request[Json, str](method=method, params=params)
        result: Json = await self.session.send_request(request, _AS_IT_CAME)
        return result

    async def ask_unchecked(self, method: str, **params: Any) -> Json:
        """The same for what SDK 2.x knows no more; it does not look at the result."""
        self._note_tool(method, params)
        return await self.dispatcher.send_raw_request(method, params)

    async def call(self, name: str, /, **arguments: Any) -> Json:
        """The result of a tool."""
        return await self.ask("tools/call", name=name, arguments=arguments)

    async def call_with_progress(self, name: str, /, **arguments: Any) -> Json:
        """The result of a tool, and the progress it reported."""
        told: list[list[Any]] = []
        params = {"name": name, "arguments": arguments}
        self._note_tool("tools/call", params)

        async def progressed(progress: float, total: float | None, message: str | None) -> None:
            told.append([progress, total, message])

        request = types.Request[Json, str](method="tools/call", params=params)
        result = await self.session.send_request(request, _AS_IT_CAME, progress_callback=progressed)
        return {"result": result, "progress": told}

    async def tell(self, method: str) -> None:
        """Sends a notification."""
        notification: Any = types.Notification[None, str](method=method, params=None)
        await self.session.send_notification(notification)

    def _note_tool(self, method: str, params: Json) -> None:
        if method == "tools/call":
            self.called.add(params["name"])

    # --- listening -------------------------------------------------------------------------------

    async def hear(self, method: str, count: int = 1) -> list[Json]:
        """The next `count` notifications of a kind, taken out of what was heard; waits for them."""
        await self._until(lambda: len(self._notifications(method)) >= count, f"{count} {method}")
        found = self._notifications(method)[:count]
        for notification in found:
            self.heard.remove(notification)
        return found

    async def be_asked(self, method: str) -> Json:
        """The next request of the server of a kind, taken out of what was asked; waits for it."""
        await self._until(lambda: any(a["method"] == method for a in self.asked), method)
        found = next(asked for asked in self.asked if asked["method"] == method)
        self.asked.remove(found)
        return found

    def _notifications(self, method: str) -> list[Json]:
        return [notification for notification in self.heard if notification["method"] == method]

    async def _until(self, condition: Callable[[], bool], what: str) -> None:
        try:
            with anyio.fail_after(_HEARING_TIME):
                while not condition():
                    await anyio.sleep(0.01)
        except TimeoutError:
            raise AssertionError(
                f"waited for {what}; heard {self.heard}, was asked {self.asked}"
            ) from None

    # --- what the SDK calls ----------------------------------------------------------------------

    async def on_message(self, message: types.ServerNotification | Exception) -> None:
        """Notes a notification; progress is noted by its call."""
        if isinstance(message, Exception):
            self.heard.append({"method": "an exception", "params": repr(message)})
        elif not isinstance(message, types.ProgressNotification):
            self.heard.append(_plain(message))

    async def on_elicitation(
        self, context: Any, params: Any
    ) -> types.ElicitResult | types.ErrorData:
        """Answers as it was set to."""
        self.asked.append({"method": "elicitation/create", "params": _plain(params)})
        return self.answer

    async def on_sampling(
        self, context: Any, params: Any
    ) -> types.CreateMessageResult | types.ErrorData:
        """Answers as it was set to."""
        self.asked.append({"method": "sampling/createMessage", "params": _plain(params)})
        return self.completion

    async def on_roots(self, context: Any) -> types.ListRootsResult:
        """Answers as it was set to."""
        self.asked.append({"method": "roots/list"})
        return types.ListRootsResult(roots=self.roots)


Transport = AbstractAsyncContextManager[Any]
Step = Callable[[Recording], Awaitable[Any]]
Outcomes = dict[str, Any]


@asynccontextmanager
async def recorded(transport: Transport) -> AsyncIterator[Recording]:
    """A session over a transport of the SDK's, opened by initialize."""
    talk = Recording()
    async with transport as (reading, writing):
        talk.dispatcher = JSONRPCDispatcher(reading, writing)
        talk.session = ClientSession(
            dispatcher=talk.dispatcher,
            message_handler=talk.on_message,
            elicitation_callback=talk.on_elicitation,
            sampling_callback=talk.on_sampling,
            list_roots_callback=talk.on_roots,
        )
        async with talk.session:
            await talk.session.initialize()
            yield talk


async def walk(transport: Transport, steps: Sequence[Step], outcomes: Outcomes) -> None:
    """Takes every step of one session, and puts what came of each under its name in `outcomes`.

    A step that fails is the last: those after it would fail for its sake, and slowly.
    """
    async with recorded(transport) as talk:
        for step in steps:
            outcomes[step.__name__] = outcome = await _outcome(step, talk)
            if FAILURE in outcome:
                return


async def _outcome(step: Step, talk: Recording) -> Any:
    """What a step returns, or the error it ran into: a JSON-RPC error is an outcome, too."""
    try:
        with anyio.fail_after(_STEP_TIME):
            return await step(talk)
    except MCPError as error:
        return {"error": _plain(error.error)}
    except Exception as error:
        return {FAILURE: repr(error)}


def a_root(name: str) -> types.Root:
    """A directory that the client lets the server see."""
    return types.Root.model_validate({"uri": f"file:///{name}", "name": name})


def _plain(model: Any) -> Json:
    dumped: Json = model.model_dump(by_alias=True, mode="json", exclude_unset=True)
    return dumped

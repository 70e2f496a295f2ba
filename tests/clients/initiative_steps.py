"""What the everything server does of its own accord: it asks the client, and tells it things.

Simulated log lines and updates repeat every five seconds until they are turned off; the first of
each comes with the call that turns them on, the second while no call runs: through the proxy it
takes the standing stream.
"""

from __future__ import annotations

from typing import Any

from mcp import types

from tests.clients.recording import Recording, Step, a_root

DOCUMENT = "demo://resource/static/document/features.md"
LOG = "notifications/message"

_UPDATED = "notifications/resources/updated"

# --- what the server asks of the client ----------------------------------------------------------


async def be_asked_for_a_completion(talk: Recording) -> Any:
    said = types.TextContent(type="text", text="forty-two")
    talk.completion = types.CreateMessageResult(
        role="assistant", content=said, model="none", stop_reason="endTurn"
    )
    result = await talk.call("trigger-sampling-request", prompt="How much?", maxTokens=7)
    return {"result": result, "asked": await talk.be_asked("sampling/createMessage")}


async def refuse_a_completion(talk: Recording) -> Any:
    talk.completion = types.ErrorData(code=-1, message="No model today")
    result = await talk.call("trigger-sampling-request", prompt="How much?")
    return {"result": result, "asked": await talk.be_asked("sampling/createMessage")}


async def fill_in_a_form(talk: Recording) -> Any:
    content: Any = {"name": "Ada", "check": True, "integer": 7, "number": 2.5}
    return await _elicit(talk, types.ElicitResult(action="accept", content=content))


async def decline_a_form(talk: Recording) -> Any:
    return await _elicit(talk, types.ElicitResult(action="decline"))


async def cancel_a_form(talk: Recording) -> Any:
    return await _elicit(talk, types.ElicitResult(action="cancel"))


async def _elicit(talk: Recording, answer: types.ElicitResult) -> Any:
    talk.answer = answer
    result = await talk.call("trigger-elicitation-request")
    return {"result": result, "asked": await talk.be_asked("elicitation/create")}


async def be_sent_to_a_page(talk: Recording) -> Any:
    talk.answer = types.ElicitResult(action="accept")
    result = await talk.call(
        "trigger-url-elicitation", url="https://example.com/", elicitationId="one"
    )
    return {"result": result, "asked": await talk.be_asked("elicitation/create")}


async def be_told_that_a_page_comes_first(talk: Recording) -> Any:
    return await talk.call("trigger-url-elicitation", url="https://example.com/", errorPath=True)


async def tell_the_roots(talk: Recording) -> Any:
    return await talk.call("get-roots-list")


async def change_the_roots(talk: Recording) -> Any:
    """The server asks for them anew when it is told that they changed."""
    talk.roots = [*talk.roots, a_root("two")]
    await talk.tell("notifications/roots/list_changed")
    asked = await talk.be_asked("roots/list")
    logged = await talk.hear(LOG)
    return {"asked": asked, "logged": logged, "roots": await talk.call("get-roots-list")}


# --- what the server tells by itself -------------------------------------------------------------


async def subscribe(talk: Recording) -> Any:
    result = await talk.ask("resources/subscribe", uri=DOCUMENT)
    return {"result": result, "logged": await talk.hear(LOG)}


async def set_the_log_level(talk: Recording) -> Any:
    return await talk.ask("logging/setLevel", level="debug")


async def turn_updates_on(talk: Recording) -> Any:
    toggled = await talk.call("toggle-subscriber-updates")
    return {"toggled": toggled, "told": await talk.hear(_UPDATED)}


async def turn_log_lines_on(talk: Recording) -> Any:
    toggled = await talk.call("toggle-simulated-logging")
    return {"toggled": toggled, "logged": await talk.hear(LOG)}


async def hear_an_update_while_no_call_runs(talk: Recording) -> Any:
    return await talk.hear(_UPDATED)


async def hear_a_log_line_while_no_call_runs(talk: Recording) -> Any:
    return await talk.hear(LOG)


async def turn_updates_off(talk: Recording) -> Any:
    return await talk.call("toggle-subscriber-updates")


async def turn_log_lines_off(talk: Recording) -> Any:
    return await talk.call("toggle-simulated-logging")


async def unsubscribe(talk: Recording) -> Any:
    result = await talk.ask("resources/unsubscribe", uri=DOCUMENT)
    return {"result": result, "logged": await talk.hear(LOG)}


async def set_a_level_that_lets_nothing_through(talk: Recording) -> Any:
    """The line about the subscription is of level info."""
    level = await talk.ask("logging/setLevel", level="emergency")
    subscribed = await talk.ask("resources/subscribe", uri=DOCUMENT)
    return {"level": level, "subscribed": subscribed, "ping": await talk.ask("ping")}


async def set_an_unknown_level(talk: Recording) -> Any:
    return await talk.ask("logging/setLevel", level="loud")


STEPS: tuple[Step, ...] = (
    be_asked_for_a_completion,
    refuse_a_completion,
    fill_in_a_form,
    decline_a_form,
    cancel_a_form,
    be_sent_to_a_page,
    be_told_that_a_page_comes_first,
    tell_the_roots,
    change_the_roots,
    subscribe,
    set_the_log_level,
    turn_updates_on,
    turn_log_lines_on,
    hear_an_update_while_no_call_runs,
    hear_a_log_line_while_no_call_runs,
    turn_updates_off,
    turn_log_lines_off,
    unsubscribe,
    set_a_level_that_lets_nothing_through,
    set_an_unknown_level,
)

"""What is asked of @modelcontextprotocol/server-everything, in order: one session, step by step.

The order matters where a step waits for what an earlier one set in motion. What the server does of
its own accord has a file of its own, `initiative_steps.py`.
"""

from __future__ import annotations

from typing import Any

import anyio
from mcp import types

from tests.clients import initiative_steps
from tests.clients.initiative_steps import DOCUMENT, LOG
from tests.clients.opening_steps import initialize, list_tools, ping
from tests.clients.recording import Json, Recording, Step

RESOURCES_CHANGED = "notifications/resources/list_changed"
LARGE = "0123456789abcdef" * 65536  # 1 MiB

# --- the beginning -------------------------------------------------------------------------------


async def be_asked_for_roots_after_initialize(talk: Recording) -> Any:
    """No call is running: question and log line have to find another way than an answer's."""
    asked = await talk.be_asked("roots/list")
    return {"asked": asked, "logged": await talk.hear(LOG)}


async def hear_of_the_tools_that_suit_this_client(talk: Recording) -> Any:
    """Sent right after initialize, while the standing stream is being opened."""
    told, talk.heard = talk.heard, []
    return told


# --- prompts, resources, completion --------------------------------------------------------------


async def list_prompts(talk: Recording) -> Any:
    return await talk.ask("prompts/list")


async def get_a_prompt(talk: Recording) -> Any:
    return await talk.ask("prompts/get", name="simple-prompt")


async def get_a_prompt_with_arguments(talk: Recording) -> Any:
    arguments = {"city": "Zürich", "state": "ZH"}
    return await talk.ask("prompts/get", name="args-prompt", arguments=arguments)


async def get_a_prompt_with_completions(talk: Recording) -> Any:
    arguments = {"department": "Sales", "name": "Eve"}
    return await talk.ask("prompts/get", name="completable-prompt", arguments=arguments)


async def get_a_prompt_with_a_resource(talk: Recording) -> Any:
    arguments = {"resourceType": "Text", "resourceId": "3"}
    return await talk.ask("prompts/get", name="resource-prompt", arguments=arguments)


async def get_an_unknown_prompt(talk: Recording) -> Any:
    return await talk.ask("prompts/get", name="no-such-prompt")


async def get_a_prompt_without_its_argument(talk: Recording) -> Any:
    return await talk.ask("prompts/get", name="args-prompt", arguments={})


async def list_resources(talk: Recording) -> Any:
    return await talk.ask("resources/list")


async def list_resource_templates(talk: Recording) -> Any:
    return await talk.ask("resources/templates/list")


async def read_a_document(talk: Recording) -> Any:
    return await talk.ask("resources/read", uri=DOCUMENT)


async def read_a_dynamic_text(talk: Recording) -> Any:
    return await talk.ask("resources/read", uri="demo://resource/dynamic/text/7")


async def read_a_dynamic_blob(talk: Recording) -> Any:
    return await talk.ask("resources/read", uri="demo://resource/dynamic/blob/8")


async def read_an_unknown_resource(talk: Recording) -> Any:
    return await talk.ask("resources/read", uri="demo://resource/none")


async def complete_a_prompt_argument(talk: Recording) -> Any:
    return await talk.ask(
        "completion/complete",
        ref={"type": "ref/prompt", "name": "completable-prompt"},
        argument={"name": "department", "value": "S"},
    )


async def complete_with_context(talk: Recording) -> Any:
    return await talk.ask(
        "completion/complete",
        ref={"type": "ref/prompt", "name": "completable-prompt"},
        argument={"name": "name", "value": ""},
        context={"arguments": {"department": "Engineering"}},
    )


async def complete_a_resource_template(talk: Recording) -> Any:
    return await talk.ask(
        "completion/complete",
        ref={"type": "ref/resource", "uri": "demo://resource/dynamic/text/{resourceId}"},
        argument={"name": "resourceId", "value": "12"},
    )


# --- tools that answer at once -------------------------------------------------------------------


async def echo(talk: Recording) -> Any:
    return await talk.call("echo", message="Grüße, 世界 \N{WAVING HAND SIGN} \u2028 \0 end")


async def echo_a_mebibyte(talk: Recording) -> Any:
    """Its own result is too long to be shown where it differs."""
    result = await talk.call("echo", message=LARGE)
    (content,) = result.pop("content")
    return {**result, "came back": content.pop("text") == f"Echo: {LARGE}", **content}


async def get_a_sum(talk: Recording) -> Any:
    return await talk.call("get-sum", a=0.1, b=2**53)


async def get_the_environment(talk: Recording) -> Any:
    return await talk.call("get-env")


async def get_annotated_messages(talk: Recording) -> Any:
    kinds = ("error", "success", "debug")
    return [
        await talk.call("get-annotated-message", messageType=kind, includeImage=True)
        for kind in kinds
    ]


async def get_resource_links(talk: Recording) -> Any:
    return await talk.call("get-resource-links", count=4)


async def get_resource_references(talk: Recording) -> Any:
    return [
        await talk.call("get-resource-reference", resourceType=kind, resourceId=5)
        for kind in ("Text", "Blob")
    ]


async def get_structured_content(talk: Recording) -> Any:
    return await talk.call("get-structured-content", location="Chicago")


async def get_an_image(talk: Recording) -> Any:
    return await talk.call("get-tiny-image")


async def compress_into_the_answer(talk: Recording) -> Any:
    result = await _compress(talk, "resource")
    return {"result": result, "told": await talk.hear(RESOURCES_CHANGED)}


async def compress_into_a_resource_of_the_session(talk: Recording) -> Any:
    result = await _compress(talk, "resourceLink")
    (link,) = result["content"]
    told = await talk.hear(RESOURCES_CHANGED, 2)  # the one of the same name goes, the new one comes
    return {
        "result": result,
        "told": told,
        "resource": await talk.ask("resources/read", uri=link["uri"]),
        "listed": await talk.ask("resources/list"),
    }


async def _compress(talk: Recording, output: str) -> Json:
    return await talk.call(
        "gzip-file-as-resource",
        name="hello.txt.gz",
        data="data:text/plain,hello%20hello%20hello",
        outputType=output,
    )


# --- tools that take their time ------------------------------------------------------------------


async def run_long_with_progress(talk: Recording) -> Any:
    return await talk.call_with_progress("trigger-long-running-operation", duration=0.8, steps=4)


async def run_long_without_progress(talk: Recording) -> Any:
    return await talk.call("trigger-long-running-operation", duration=0.2, steps=2)


async def run_several_calls_at_once(talk: Recording) -> Any:
    """Each gets its own answer, each of the long ones its own progress."""
    answers: dict[str, Any] = {}

    async def run(steps: int) -> None:
        answers[f"{steps} steps"] = await talk.call_with_progress(
            "trigger-long-running-operation", duration=0.5, steps=steps
        )

    async def say(number: int) -> None:
        answers[f"echo {number}"] = await talk.call("echo", message=f"number {number}")

    async with anyio.create_task_group() as group:
        for steps in (2, 3, 5):
            group.start_soon(run, steps)
        for number in range(10):
            group.start_soon(say, number)
    return dict(sorted(answers.items()))


async def cancel_a_call(talk: Recording) -> Any:
    """Given up once it has begun; the session goes on."""
    begun = anyio.Event()
    arguments = {"duration": 600, "steps": 6000}

    async def progressed(progress: float, total: float | None, message: str | None) -> None:
        begun.set()

    async def run() -> None:
        await talk.session.call_tool(
            "trigger-long-running-operation", arguments, progress_callback=progressed
        )

    async with anyio.create_task_group() as group:
        group.start_soon(run)
        await begun.wait()
        group.cancel_scope.cancel()
    return await talk.ask("ping")


async def run_a_task(talk: Recording) -> Any:
    """A call as a task (2025-11-25): the client is asked while it waits for the result."""
    talk.answer = types.ElicitResult(action="accept", content={"interpretation": "snake"})
    created = await talk.ask_unchecked(
        "tools/call",
        name="simulate-research-query",
        arguments={"topic": "python", "ambiguous": True},
        task={"ttl": 60_000},
    )
    task = created["task"]["taskId"]
    status = await talk.ask_unchecked("tasks/get", taskId=task)
    result = await talk.ask_unchecked("tasks/result", taskId=task)
    asked = await talk.be_asked("elicitation/create")
    return {"created": created, "status": status, "result": result, "asked": asked}


async def call_what_can_only_be_a_task(talk: Recording) -> Any:
    return await talk.call("simulate-research-query", topic="python")


# --- errors --------------------------------------------------------------------------------------


async def call_an_unknown_tool(talk: Recording) -> Any:
    return await talk.call("no-such-tool", a=1)


async def call_with_a_bad_argument(talk: Recording) -> Any:
    return await talk.call("get-sum", a="one", b=2)


async def call_without_an_argument(talk: Recording) -> Any:
    return await talk.call("get-annotated-message")


async def send_an_unknown_method(talk: Recording) -> Any:
    return await talk.ask("no/such/method", some={"thing": [1, 2.5, None]})


async def hear_nothing_else(talk: Recording) -> Any:
    """Nothing came twice, and nothing that no step has waited for."""
    await talk.ask("ping")
    return {"heard": talk.heard, "asked": talk.asked, "called": sorted(talk.called)}


STEPS: tuple[Step, ...] = (
    initialize,
    be_asked_for_roots_after_initialize,
    hear_of_the_tools_that_suit_this_client,
    ping,
    list_tools,
    list_prompts,
    get_a_prompt,
    get_a_prompt_with_arguments,
    get_a_prompt_with_completions,
    get_a_prompt_with_a_resource,
    get_an_unknown_prompt,
    get_a_prompt_without_its_argument,
    list_resources,
    list_resource_templates,
    read_a_document,
    read_a_dynamic_text,
    read_a_dynamic_blob,
    read_an_unknown_resource,
    complete_a_prompt_argument,
    complete_with_context,
    complete_a_resource_template,
    echo,
    echo_a_mebibyte,
    get_a_sum,
    get_the_environment,
    get_annotated_messages,
    get_resource_links,
    get_resource_references,
    get_structured_content,
    get_an_image,
    compress_into_the_answer,
    compress_into_a_resource_of_the_session,
    run_long_with_progress,
    run_long_without_progress,
    run_several_calls_at_once,
    cancel_a_call,
    run_a_task,
    call_what_can_only_be_a_task,
    *initiative_steps.STEPS,
    call_an_unknown_tool,
    call_with_a_bad_argument,
    call_without_an_argument,
    send_an_unknown_method,
    hear_nothing_else,
)

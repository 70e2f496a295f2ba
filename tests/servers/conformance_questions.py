"""The conformance server's tools that ask the client something: its user, its model, its roots.

A legacy server sends the client a request and waits. A modern one ends the call with a result
that says `input_required` and is called again with the answers.
"""

import json

import mcp_types as types
from conformance_tools import Context, Json, Params, add_tool, result, text, tool
from mcp.shared.exceptions import MCPError

Interactive = types.CallToolRequestParams | types.GetPromptRequestParams

STRING = {"type": "string"}
SAMPLING = types.ClientCapabilities(sampling=types.SamplingCapability())
ELICITATION = types.ClientCapabilities(elicitation=types.ElicitationCapability())
ROOTS = types.ClientCapabilities(roots=types.RootsCapability())


# --- legacy ----------------------------------------------------------------------------------


@tool(properties={"prompt": STRING}, required=["prompt"])
async def test_sampling(ctx: Context, params: Params) -> Json:
    """Asks the client's model."""
    if not ctx.session.check_client_capability(SAMPLING):
        return result(text("The client does not support sampling"), is_error=True)
    prompt = types.TextContent(text=str((params.arguments or {}).get("prompt")))
    answer = await ctx.session.create_message(
        [types.SamplingMessage(role="user", content=prompt)],
        max_tokens=100,
        related_request_id=ctx.request_id,
    )
    return result(text(f"LLM response: {answer.content}"))


async def elicit(ctx: Context, message: str, fields: Json, required: list[str]) -> Json:
    """Ask the client's user and report what came back."""
    if not ctx.session.check_client_capability(ELICITATION):
        return result(text("The client does not support elicitation"), is_error=True)
    schema = {"type": "object", "properties": fields, "required": required}
    answer = await ctx.session.elicit_form(message, schema, related_request_id=ctx.request_id)
    content = json.dumps(answer.content)
    return result(text(f"Elicitation completed: action={answer.action}, content={content}"))


@tool(properties={"message": STRING}, required=["message"])
async def test_elicitation(ctx: Context, params: Params) -> Json:
    """Asks the user for a name and an address."""
    message = str((params.arguments or {}).get("message"))
    fields = {"username": STRING, "email": STRING}
    return await elicit(ctx, message, fields, list(fields))


@tool()
async def test_elicitation_sep1034_defaults(ctx: Context, params: Params) -> Json:
    """Asks with a default for every primitive type."""
    states = ["active", "inactive", "pending"]
    fields = {
        "name": {"type": "string", "default": "John Doe"},
        "age": {"type": "integer", "default": 30},
        "score": {"type": "number", "default": 95.5},
        "status": {"type": "string", "enum": states, "default": "active"},
        "verified": {"type": "boolean", "default": True},
    }
    return await elicit(ctx, "Please review your details", fields, [])


@tool()
async def test_elicitation_sep1330_enums(ctx: Context, params: Params) -> Json:
    """Asks with every form of enumeration."""
    plain = {"type": "string", "enum": ["option1", "option2", "option3"]}
    titled = [{"const": f"value{n}", "title": f"Option {n}"} for n in (1, 2, 3)]
    names = {"enum": ["opt1", "opt2", "opt3"], "enumNames": ["One", "Two", "Three"]}
    fields = {
        "untitledSingle": plain,
        "titledSingle": {"type": "string", "oneOf": titled},
        "legacyEnum": {"type": "string", **names},
        "untitledMulti": {"type": "array", "items": plain},
        "titledMulti": {"type": "array", "items": {"anyOf": titled}},
    }
    return await elicit(ctx, "Please choose", fields, [])


# --- modern ----------------------------------------------------------------------------------


def question(message: str, name: str, kind: str = "string") -> Json:
    """An elicitation that asks for one field."""
    schema = {"type": "object", "properties": {name: {"type": kind}}, "required": [name]}
    params = {"mode": "form", "message": message, "requestedSchema": schema}
    return {"method": "elicitation/create", "params": params}


def sampling(prompt: str, max_tokens: int) -> Json:
    """A request to the client's model."""
    messages = [{"role": "user", "content": text(prompt)}]
    params = {"messages": messages, "maxTokens": max_tokens}
    return {"method": "sampling/createMessage", "params": params}


def ask(questions: Json, state: str | None = None) -> Json:
    """The result that stands for: answer these, and call again."""
    asked = {"resultType": "input_required", "inputRequests": questions}
    return asked if state is None else {**asked, "requestState": state}


def answered(params: Interactive, questions: Json, state: str | None = None) -> str | None:
    """All answers to `questions` as text, or None while one, or the state, is missing."""
    given = params.input_responses or {}
    if params.request_state != state or not questions.keys() <= given.keys():
        return None
    return str([given[key].model_dump(exclude_none=True) for key in questions])


def require(ctx: Context, capability: types.ClientCapabilities) -> None:
    """Refuse the call of a client that did not declare `capability`."""
    if not ctx.session.check_client_capability(capability):
        needed = {"requiredCapabilities": capability.model_dump(by_alias=True, exclude_none=True)}
        code = types.MISSING_REQUIRED_CLIENT_CAPABILITY
        raise MCPError(code, "The client did not declare a capability this needs", needed)


def add_asking_tool(name: str, questions: Json, state: str | None = None) -> None:
    """Offer a tool that asks until all `questions` are answered.

    That the state comes back as it was sent is the SDK's work, see `build`.
    """

    async def handler(ctx: Context, params: Params) -> Json:
        answers = answered(params, questions, state)
        return result(text(f"state-ok {answers}")) if answers else ask(questions, state)

    add_tool(f"test_input_required_result_{name}", f"Asks the client ({name})", handler)


NAME = question("What is your name?", "name")
GREETING = sampling("Generate a greeting", 50)
CONFIRM = question("Please confirm", "ok", "boolean")
LIST_ROOTS: Json = {"method": "roots/list"}
ALL_THREE = {"user_name": NAME, "greeting": GREETING, "client_roots": LIST_ROOTS}

add_asking_tool("elicitation", {"user_name": NAME})
add_asking_tool("sampling", {"capital_question": sampling("What is the capital of France?", 100)})
add_asking_tool("list_roots", {"client_roots": LIST_ROOTS})
add_asking_tool("multiple_inputs", ALL_THREE, "three questions")
add_asking_tool("request_state", {"confirm": CONFIRM}, "confirming")
add_asking_tool("tampered_state", {"confirm": CONFIRM}, "confirming")


@tool()
async def test_input_required_result_multi_round(ctx: Context, params: Params) -> Json:
    """Asks twice, one after the other."""
    first = {"step1": question("Step 1: What is your name?", "name")}
    second = {"step2": question("Step 2: What is your favorite color?", "color")}
    if answered(params, second, "second"):
        return result(text("Both answered"))
    return ask(second, "second") if answered(params, first, "first") else ask(first, "first")


@tool()
async def test_input_required_result_capabilities(ctx: Context, params: Params) -> Json:
    """Asks only what the client declared it can answer."""
    needs = {"user_name": ELICITATION, "greeting": SAMPLING, "client_roots": ROOTS}
    able = [key for key, need in needs.items() if ctx.session.check_client_capability(need)]
    questions = {key: ALL_THREE[key] for key in able}
    answers = answered(params, questions)
    return result(text(answers)) if answers else ask(questions)


@tool()
async def test_missing_capability(ctx: Context, params: Params) -> Json:
    """Needs sampling, and refuses clients without."""
    require(ctx, SAMPLING)
    return result(text("The client supports sampling"))


@tool()
async def test_streaming_elicitation(ctx: Context, params: Params) -> Json:
    """Asks the user in a stream that may carry progress already."""
    require(ctx, ELICITATION)
    await ctx.session.report_progress(1, 2)
    answers = answered(params, {"user_name": NAME})
    return result(text(answers)) if answers else ask({"user_name": NAME})

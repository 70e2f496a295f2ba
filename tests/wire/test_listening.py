"""Listening: what is asked for, what of it is honoured, and what goes out on the stream."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import UNSET, Raw

from mcp_proxy.errors import InvalidParams, RequestId
from mcp_proxy.wire import jsonrpc, listening
from mcp_proxy.wire.jsonrpc import Notification
from mcp_proxy.wire.listening import Filter
from tests.support import json_values

ID = "io.modelcontextprotocol/subscriptionId"
EVERYTHING = Filter(True, True, True, ("file:///a",), ("t",))

FILTERS = st.builds(
    Filter,
    tools=st.booleans(),
    prompts=st.booleans(),
    resources=st.booleans(),
    uris=st.lists(st.text(), unique=True, max_size=3).map(tuple),
    tasks=st.lists(st.text(), unique=True, max_size=3).map(tuple),
)


def filter_of(notifications: Any) -> Filter:
    return listening.filter_of(jsonrpc.as_payload({"notifications": notifications}))


def notification(method: str, **params: Any) -> Notification:
    return Notification(f"notifications/{method}", jsonrpc.as_payload(params))


# --- the filter ----------------------------------------------------------------------------------


def test_a_filter_is_read() -> None:
    found = filter_of(
        {
            "toolsListChanged": True,
            "promptsListChanged": False,
            "resourceSubscriptions": ["file:///a", "file:///b", "file:///a"],
            "taskIds": ["t"],
            "unknown": [1],
        }
    )
    assert found == Filter(tools=True, uris=("file:///a", "file:///b"), tasks=("t",))


def test_null_in_a_filter_is_nothing() -> None:
    assert filter_of({"toolsListChanged": None, "resourceSubscriptions": None}) == Filter()
    assert filter_of({}).is_empty


@pytest.mark.parametrize("params", [UNSET, Raw(b"{}"), Raw(b"[]"), Raw(b'{"_meta":{}}')])
def test_a_listener_needs_a_filter(params: Any) -> None:
    with pytest.raises(InvalidParams):
        listening.filter_of(params)


@pytest.mark.parametrize(
    "notifications",
    [
        None,
        [],
        True,
        {"toolsListChanged": 1},
        {"promptsListChanged": "yes"},
        {"resourcesListChanged": []},
        {"resourceSubscriptions": "file:///a"},
        {"resourceSubscriptions": [5]},
        {"taskIds": {}},
    ],
)
def test_a_filter_of_wrong_types_is_invalid(notifications: Any) -> None:
    with pytest.raises(InvalidParams):
        filter_of(notifications)


@given(FILTERS)
def test_a_filter_that_is_written_is_read_again(wanted: Filter) -> None:
    assert filter_of(wanted.payload()) == wanted
    assert wanted.is_empty == (bytes(wanted.payload()) == b"{}")


@given(FILTERS, FILTERS)
def test_a_union_wants_what_each_wants(one: Filter, other: Filter) -> None:
    union = one.union([other])
    assert union.union([one, other, union]) == union
    assert Filter().union([one]) == one
    assert union.tools == (one.tools or other.tools)
    assert set(union.uris) == {*one.uris, *other.uris}
    assert set(union.tasks) == {*one.tasks, *other.tasks}


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({}, Filter()),
        ({"tools": {"listChanged": True}}, Filter(tools=True)),
        ({"prompts": {"listChanged": True}}, Filter(prompts=True)),
        ({"resources": {"listChanged": True}}, Filter(resources=True)),
        ({"resources": {"subscribe": True}}, Filter(uris=("file:///a",))),
        ({"tools": {"listChanged": False}, "prompts": {}, "resources": True}, Filter()),
        ({"tools": {"listChanged": 1}, "resources": {"subscribe": "true"}}, Filter()),
        (None, Filter()),
    ],
)
def test_what_the_server_never_tells_is_not_honoured(capabilities: Any, expected: Filter) -> None:
    assert EVERYTHING.honoured(jsonrpc.as_payload(capabilities)) == expected


def test_what_is_not_asked_for_is_not_honoured() -> None:
    declared = {name: {"listChanged": True, "subscribe": True} for name in ("tools", "resources")}
    assert Filter().honoured(jsonrpc.as_payload(declared)).is_empty


# --- what is wanted ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["tools", "prompts", "resources"])
def test_a_changed_list_is_told_to_who_asked(kind: str) -> None:
    changed = notification(f"{kind}/list_changed")
    wanted = [
        name for name in ("tools", "prompts", "resources") if Filter(**{name: True}).wants(changed)
    ]
    assert wanted == [kind]
    assert not Filter(uris=("",)).wants(changed)


@pytest.mark.parametrize(
    ("uri", "whole"),
    [
        ("file:///a", "file:///a"),
        ("file:///a/b/c", "file:///a"),
        ("file:///a/b", "file:///a/"),
        ("file:///a?x", "file:///a"),
        ("file:///a#x", "file:///a"),
        ("test://x/y", "test://x"),
    ],
)
def test_an_update_of_a_resource_or_of_a_part_of_it_is_wanted(uri: str, whole: str) -> None:
    assert Filter(uris=("other:x", whole)).wants(notification("resources/updated", uri=uri))


@pytest.mark.parametrize(
    ("uri", "whole"),
    [
        ("file:///ab", "file:///a"),
        ("file:///", "file:///a"),
        ("FILE:///a", "file:///a"),
        (None, "file:///a"),
        (5, "5"),
    ],
)
def test_an_update_of_another_resource_is_not(uri: Any, whole: str) -> None:
    assert not Filter(uris=(whole,)).wants(notification("resources/updated", uri=uri))
    assert not Filter(True, True, True).wants(notification("resources/updated", uri=uri))


def test_a_task_is_told_to_who_named_it() -> None:
    status = notification("tasks", taskId="t", status="working")
    assert EVERYTHING.wants(status)
    assert not Filter(True, True, True, ("t",), ("u",)).wants(status)
    assert not EVERYTHING.wants(notification("tasks"))


@pytest.mark.parametrize(
    "method", ["progress", "message", "cancelled", "tasks/status", "subscriptions/acknowledged"]
)
def test_nothing_else_is_ever_wanted(method: str) -> None:
    assert not EVERYTHING.wants(notification(method, uri="file:///a", taskId="t"))


# --- the stream ----------------------------------------------------------------------------------


@pytest.mark.parametrize("key", [0, 7, "7", "", 2**60])
def test_a_stream_begins_with_what_is_honoured(key: RequestId) -> None:
    first = listening.acknowledged(Filter(tools=True, uris=("a:b",)), key)
    assert first.method == "notifications/subscriptions/acknowledged"
    assert json.loads(bytes(first.params or b"")) == {
        "notifications": {"toolsListChanged": True, "resourceSubscriptions": ["a:b"]},
        "_meta": {ID: key},
    }
    assert listening.subscription_id_of(first) == key
    assert type(listening.subscription_id_of(first)) is type(key)


def test_a_stream_ends_with_a_result() -> None:
    expected = {"resultType": "complete", "_meta": {ID: "k"}}
    assert json.loads(bytes(listening.listen_result("k"))) == expected


def test_a_notification_is_tagged_with_the_id_of_its_stream() -> None:
    given = notification("resources/updated", uri="a:b", _meta={"x": 1, ID: "old"})
    tagged = listening.tagged(given, 5)
    assert json.loads(bytes(tagged.params or b"")) == {"uri": "a:b", "_meta": {"x": 1, ID: 5}}
    untagged = listening.untagged(tagged)
    assert json.loads(bytes(untagged.params or b"")) == {"uri": "a:b", "_meta": {"x": 1}}


def test_a_notification_without_params_can_be_tagged() -> None:
    tagged = listening.tagged(Notification(listening.TOOLS_CHANGED), "s")
    assert json.loads(bytes(tagged.params or b"")) == {"_meta": {ID: "s"}}
    assert listening.untagged(tagged) == Notification(listening.TOOLS_CHANGED, Raw(b"{}"))


@pytest.mark.parametrize("params", [UNSET, Raw(b"[]"), Raw(b"{}")])
def test_a_notification_without_a_tag_stays_as_it_is(params: Any) -> None:
    given = Notification("m", params)
    assert listening.untagged(given) == given
    assert listening.subscription_id_of(given) is None


@pytest.mark.parametrize("key", [None, 1.5, [], {}, True])
def test_a_tag_that_is_no_id_is_none(key: Any) -> None:
    assert listening.subscription_id_of(notification("x", _meta={ID: key})) is None


@given(json_values.objects, json_values.ids)
def test_a_tag_is_read_and_taken_off_again(params: dict[str, Any], key: RequestId) -> None:
    params.pop("_meta", None)
    tagged = listening.tagged(Notification("m", jsonrpc.as_payload(params)), key)
    assert listening.subscription_id_of(tagged) == key
    assert json.loads(bytes(listening.untagged(tagged).params or b"")) == params


@given(
    st.sampled_from([listening.UPDATED, listening.TOOLS_CHANGED, "notifications/tasks", "m"]),
    json_values.values
    | st.dictionaries(
        st.sampled_from(["notifications", "uri", "taskId", "_meta"]),
        json_values.values | st.dictionaries(st.just(ID), json_values.scalars),
    ),
)
def test_no_json_breaks_a_stream(method: str, value: Any) -> None:
    given = Notification(method, jsonrpc.as_payload(value))
    EVERYTHING.wants(given)
    EVERYTHING.honoured(jsonrpc.as_payload(value))
    listening.subscription_id_of(listening.untagged(given))
    listening.tagged(given, 1)
    with contextlib.suppress(InvalidParams):
        listening.filter_of(given.params)

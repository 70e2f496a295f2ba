"""Listening to a modern server: the filter of `subscriptions/listen`, and what its stream says.

MCP 2026-07-28, subscriptions: a stream begins with what of the filter is honoured, everything on it
carries the id of the request that opened it, and nothing is on it that was not asked for. Pure.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import msgspec
from msgspec import UNSET, Raw, UnsetType

from mcp_proxy.errors import InvalidParams, RequestId
from mcp_proxy.wire import jsonrpc
from mcp_proxy.wire.jsonrpc import Notification
from mcp_proxy.wire.modern import SUBSCRIPTION_ID, edited_meta, meta_of, with_meta

ACKNOWLEDGED = "notifications/subscriptions/acknowledged"
TOOLS_CHANGED = "notifications/tools/list_changed"
PROMPTS_CHANGED = "notifications/prompts/list_changed"
RESOURCES_CHANGED = "notifications/resources/list_changed"
UPDATED = "notifications/resources/updated"

# SEP-2663: the status of a task, for listeners that name the task.
_TASK = "notifications/tasks"

# What may follow a URI in the URI of a part of it.
_SEPARATORS = ("/", "?", "#")


#: The most resources that a client hears of.
MAX_URIS = 256


class Filter(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a client wants to hear of: changes of lists, these resources and these tasks."""

    tools: bool = msgspec.field(default=False, name="toolsListChanged")
    prompts: bool = msgspec.field(default=False, name="promptsListChanged")
    resources: bool = msgspec.field(default=False, name="resourcesListChanged")
    uris: tuple[str, ...] = msgspec.field(default=(), name="resourceSubscriptions")
    tasks: tuple[str, ...] = msgspec.field(default=(), name="taskIds")

    @property
    def is_empty(self) -> bool:
        """Whether nothing is wanted."""
        return self == _NOTHING

    def honoured(self, capabilities: Raw | UnsetType) -> Filter:
        """The part of which a legacy server with these capabilities tells; never of tasks.

        Of resources it is told at most `MAX_URIS`.
        """
        declared = jsonrpc.fields_of(capabilities)
        return Filter(
            tools=self.tools and _has(declared, "tools", "listChanged"),
            prompts=self.prompts and _has(declared, "prompts", "listChanged"),
            resources=self.resources and _has(declared, "resources", "listChanged"),
            uris=self.uris[:MAX_URIS] if _has(declared, "resources", "subscribe") else (),
        )

    def wants(self, notification: Notification) -> bool:
        """Whether a notification is wanted; progress and log messages never are.

        A part of a resource has a URI of its own, which begins with that of the resource.
        """
        method = notification.method
        if method == UPDATED:
            uri = _text_in(notification, "uri")
            return uri is not None and any(_is_within(uri, whole) for whole in self.uris)
        if method == _TASK:
            return _text_in(notification, "taskId") in self.tasks
        lists = {
            TOOLS_CHANGED: self.tools,
            PROMPTS_CHANGED: self.prompts,
            RESOURCES_CHANGED: self.resources,
        }
        return lists.get(method, False)

    def changes(self) -> list[Notification]:
        """A change of every kind that is wanted."""
        lists = (
            (self.tools, TOOLS_CHANGED),
            (self.prompts, PROMPTS_CHANGED),
            (self.resources, RESOURCES_CHANGED),
        )
        changed = [Notification(method) for is_wanted, method in lists if is_wanted]
        updated = [Notification(UPDATED, jsonrpc.as_payload({"uri": uri})) for uri in self.uris]
        return changed + updated

    def union(self, others: Iterable[Filter]) -> Filter:
        """What this filter or any of the others wants, each URI and task once."""
        every = [self, *others]
        return Filter(
            tools=any(each.tools for each in every),
            prompts=any(each.prompts for each in every),
            resources=any(each.resources for each in every),
            uris=tuple(dict.fromkeys(uri for each in every for uri in each.uris)),
            tasks=tuple(dict.fromkeys(task for each in every for task in each.tasks)),
        )

    def payload(self) -> Raw:
        """The filter as `notifications` of a request or of an acknowledgement."""
        return jsonrpc.as_payload(self)


_NOTHING = Filter()

_filter = msgspec.json.Decoder(Filter)


def filter_of(params: Raw | UnsetType) -> Filter:
    """The filter of a `subscriptions/listen`; null in it counts as absent.

    Raises InvalidParams where there is none, or something in it has a wrong type.
    """
    given = jsonrpc.fields_of(params).get("notifications")
    if given is None or not jsonrpc.is_object(given):
        raise InvalidParams("params.notifications must be an object")
    fields = jsonrpc.fields_of(given)
    present = {name: value for name, value in fields.items() if value != Raw(b"null")}
    try:
        return _filter.decode(jsonrpc.as_payload(present)).union(())
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidParams(f"params.notifications is no filter: {error}") from error


def honoured_of(acknowledgement: Notification) -> Filter:
    """The part of a filter that a server acknowledges; none where that cannot be read."""
    try:
        return filter_of(acknowledgement.params)
    except InvalidParams:
        return _NOTHING


def _has(declared: Mapping[str, Raw], name: str, flag: str) -> bool:
    return jsonrpc.fields_of(declared.get(name, UNSET)).get(flag) == Raw(b"true")


def _text_in(notification: Notification, name: str) -> str | None:
    return jsonrpc.text_of(jsonrpc.fields_of(notification.params).get(name, UNSET))


def _is_within(uri: str, whole: str) -> bool:
    """Whether a URI is that of a resource or of a part of it."""
    if not uri.startswith(whole):
        return False
    return uri == whole or whole.endswith("/") or uri[len(whole) :].startswith(_SEPARATORS)


# --- the messages of a stream ---------------------------------------------------------------------


def acknowledged(honoured: Filter, subscription_id: RequestId) -> Notification:
    """The first message of a stream."""
    meta = {SUBSCRIPTION_ID: subscription_id}
    params = {"notifications": honoured, "_meta": meta}
    return Notification(ACKNOWLEDGED, jsonrpc.as_payload(params))


def tagged(notification: Notification, subscription_id: RequestId) -> Notification:
    """A notification as it is on the stream of this subscription."""
    params = with_meta(notification.params, {SUBSCRIPTION_ID: subscription_id})
    return Notification(notification.method, params)


def untagged(notification: Notification) -> Notification:
    """A notification of a stream as it is on a legacy stream."""
    if not jsonrpc.is_object(notification.params):
        return notification
    params = edited_meta(notification.params, lambda meta: meta.pop(SUBSCRIPTION_ID, None))
    return Notification(notification.method, params)


def subscription_id_of(notification: Notification) -> RequestId | None:
    """The subscription whose stream a notification is on, None where it names none."""
    return jsonrpc.id_of(meta_of(notification.params).get(SUBSCRIPTION_ID, UNSET))


def listen_result(subscription_id: RequestId) -> Raw:
    """The result that ends a stream in good order."""
    meta = {SUBSCRIPTION_ID: subscription_id}
    return jsonrpc.as_payload({"resultType": "complete", "_meta": meta})

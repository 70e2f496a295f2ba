"""Asking several servers what they list, on behalf of one request, without a thread that waits.

Each server is asked one thing after another. Whoever has asked hears of all answers together, once,
and of those that did not come in time not at all; they are taken note of when they come.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from functools import partial
from typing import NamedTuple

from msgspec import UNSET, Raw

from mcp_proxy.backends.catalogue import Listed
from mcp_proxy.backends.exchange import Exchange
from mcp_proxy.backends.group_lists import require_bounded
from mcp_proxy.errors import BackendError, BackendTimeout, BadAnswer, ProxyError
from mcp_proxy.wire import jsonrpc, merging, modern
from mcp_proxy.wire.jsonrpc import Response

log = logging.getLogger(__name__)

# Pages of one list that are asked for.
_MAX_PAGES = 100

_EMPTY = Raw(b"{}")


class Learnt(NamedTuple):
    """What a server has said, the lists that it was asked for alone, and for how long
    (milliseconds) and whom that holds.
    """

    listed: Listed
    ttl: int
    is_public: bool


#: A method and its params, and what the server answers: None where it refuses.
Steps = Generator[tuple[str, Raw], Raw | None, Learnt]
Open = Callable[[str, Raw], Exchange]
OnLearnt = Callable[[Learnt | ProxyError], object]


def looked_up(known: Listed | None, methods: Sequence[str]) -> Steps:
    """Asks for these lists, all pages; for all lists where nothing is known of the server.

    Without methods it is asked what it says of itself.
    """
    result = None if known is None else known.result
    if result is None or not methods:
        result = yield modern.DISCOVER, _EMPTY
    if result is None:
        raise BadAnswer("The server refuses server/discover")
    lists: dict[str, Sequence[Raw]] = {}
    capabilities = jsonrpc.fields_of(jsonrpc.fields_of(result).get("capabilities", UNSET))
    pages: list[Raw] = []
    for method in merging.KINDS if known is None else methods:
        lists[method] = []
        if merging.CAPABILITY[method] in capabilities:
            pages += yield from _pages(method, lists)
    ttls = [merging.ttl_of(page) for page in pages]
    is_public = all(merging.is_public(page) for page in pages)
    return Learnt(Listed(result, lists), min(ttls, default=0), is_public)


def _pages(
    method: str, lists: dict[str, Sequence[Raw]]
) -> Generator[tuple[str, Raw], Raw | None, list[Raw]]:
    """The pages of one list, whose entries are put into `lists`."""
    entries: list[Raw] = []
    pages: list[Raw] = []
    cursors: list[str] = []
    params = _EMPTY
    while len(pages) < _MAX_PAGES:
        page = yield method, params
        if page is None:
            break
        more, cursor = merging.entries_of(page, method)
        entries += more
        pages.append(page)
        require_bounded(method, entries)
        if not cursor or cursor in cursors:
            break
        cursors.append(cursor)
        params = jsonrpc.as_payload({"cursor": cursor})
    lists[method] = entries
    return pages


class Survey:
    """What some servers say, for one request. Thread-safe.

    `done` is called once, with what those have said by then that are waited for.
    """

    def __init__(self, done: Callable[[Mapping[str, Learnt]], object]) -> None:
        self._done = done
        self._lock = threading.Lock()  # guards what follows
        self._awaited: dict[str, float] = {}
        self._learnt: dict[str, Learnt] = {}
        self._is_over = False

    def expect(self, key: str, until: float) -> None:
        """A server is waited for, until then at most."""
        self._awaited[key] = until

    def awaited(self) -> Mapping[str, float]:
        """The servers that are waited for, and until when."""
        with self._lock:
            return dict(self._awaited)

    def give_up(self, key: str) -> None:
        """A server is no longer waited for."""
        with self._lock:
            self._awaited.pop(key, None)
        self.finish_if_whole()

    def note(self, key: str, learnt: Learnt | ProxyError) -> None:
        """A server has said what it lists, or has not."""
        with self._lock:
            if isinstance(learnt, Learnt):
                self._learnt[key] = learnt
        self.give_up(key)

    def finish_if_whole(self) -> None:
        """Calls `done` where nobody is waited for."""
        if not self._awaited:
            self.finish()

    def finish(self) -> None:
        """Calls `done`, unless that has been called: the time is over."""
        with self._lock:
            was_over, self._is_over = self._is_over, True
            learnt = dict(self._learnt)
            done, self._done = self._done, _done_before
            self._learnt = {}
        if not was_over:
            done(learnt)


class Asked:
    """A server that is asked one thing after another. Thread-safe.

    `on_over` is called once. Who calls `give_up` later keeps nothing but this.
    """

    def __init__(self, open_at: Open, steps: Steps, on_over: OnLearnt) -> None:
        self._open_at: Open | None = open_at
        self._steps = steps
        self._on_over: OnLearnt | None = on_over
        # Guards what follows, and the order of the steps; a step may be answered while it begins.
        self._lock = threading.RLock()
        self._exchange: Exchange | None = None

    def begin(self) -> None:
        """Asks the first thing."""
        with self._lock:
            self._go_on(partial(next, self._steps))

    def give_up(self) -> None:
        """Waits no longer."""
        with self._lock:
            exchange, self._exchange = self._exchange, None
        if exchange is not None:
            exchange.close()  # without the lock, which its server's reader may want
        self._end(BackendTimeout("The server has not answered in time"))

    def _go_on(self, step: Callable[[], tuple[str, Raw]]) -> None:
        try:
            method, params = step()
            open_at = self._open_at
            if open_at is None:  # it was given up
                return
            self._exchange = open_at(method, params)
        except StopIteration as stop:
            self._end(stop.value)
        except ProxyError as error:
            self._end(error)
        except Exception:
            log.exception("a server could not be asked for its lists")
            self._end(BackendError("The server could not be asked"))
        else:
            self._exchange.set_on_ready(partial(self._read, self._exchange))

    def _read(self, exchange: Exchange) -> None:
        with self._lock:
            if exchange is not self._exchange:
                return
            try:
                answer = _answer_on(exchange)
            except ProxyError as error:
                self._exchange = None  # nobody else has it any more
                self._end(error)
                return
            if answer is not None:
                self._exchange = None
                result = answer.result
                self._go_on(partial(self._steps.send, None if result is UNSET else result))

    def _end(self, learnt: Learnt | ProxyError) -> None:
        with self._lock:
            on_over, self._on_over, self._open_at = self._on_over, None, None
        if on_over is not None:
            on_over(learnt)


def _done_before(learnt: Mapping[str, Learnt]) -> None:
    """What is called in the place of what has been called."""


def _answer_on(exchange: Exchange) -> Response | None:
    """The answer, if it has come; raises what the proxy says in its place."""
    while (message := exchange.poll()) is not None:
        if message.failure is not None:
            raise message.failure
        if message.is_response:
            answer = jsonrpc.parse_message(message.data)
            assert isinstance(answer, Response)
            return answer
    return None

"""Relays in trouble: large messages, owners that leave, stores that are away."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from functools import partial

import pytest
import redis

from mcp_proxy.backends.exchange import Exchange
from mcp_proxy.errors import BackendError, BackendLost, BackendUnreached, StorageUnavailable
from mcp_proxy.redis.client import Connection
from mcp_proxy.redis.mailboxes import RedisMailboxes
from mcp_proxy.relay import protocol
from mcp_proxy.relay.protocol import Kind
from mcp_proxy.storage.mailboxes import Envelope, LocalMailboxes, Mailboxes
from mcp_proxy.wire.jsonrpc import Notification
from tests.relay.scene import PATIENCE, Node, Scene
from tests.relay.scripted import ScriptedCall, call, result_of, silent
from tests.storage.offices import FickleMailboxes
from tests.support.ended_threads import end_worker, threads_end
from tests.support.exchanges import listening, sent
from tests.support.redis_server import RedisServer
from tests.support.waiting import eventually

LARGE = 20 * 1024 * 1024

#: What one exchange may have under way in one direction.
WINDOW_BYTES = protocol.WINDOW * (protocol.PIECE + 200)


class Observer:
    """Looks at the mailboxes in Redis, again and again, until it is stopped."""

    def __init__(self, server: RedisServer, prefix: str) -> None:
        self.longest = 0
        self.largest = 0
        self._client = server.client()
        self._prefix = prefix
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Observer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._thread.join()
        self._client.close()

    def _run(self) -> None:
        while not self._stopping.wait(0.005):
            for key in self._client.keys(f"{self._prefix}*"):
                self.longest = max(self.longest, self._client.xlen(key))
                self.largest = max(self.largest, self._client.memory_usage(key) or 0)


@pytest.fixture
def scene(
    redis_url: str, redis_prefix: str, redis_at: Callable[..., Connection]
) -> Iterator[Scene]:
    """Two replicas over Redis."""
    with Scene(*[RedisMailboxes(redis_at(redis_url), redis_prefix) for _ in range(2)]) as made:
        yield made


# --- large messages ------------------------------------------------------------------------------


def test_large_messages_go_both_ways_through_a_small_mailbox(
    scene: Scene, redis_server: RedisServer, redis_prefix: str
) -> None:
    client, owner = scene.nodes
    large = "x" * LARGE
    owner.child.scripts["large"] = lambda exchange, _: exchange.answer(large)
    with Observer(redis_server, redis_prefix) as seen:
        exchange = sent(client.reach(owner), [call("large", text=large)], False, 60)
        assert result_of(exchange.receive(60)) == large
    assert len(bytes(owner.child.requests[0].params)) > LARGE  # type: ignore[arg-type]
    assert seen.longest <= 2 * protocol.WINDOW + 8  # what is deleted late stays for one more look
    assert seen.largest <= 3 * WINDOW_BYTES
    assert client.ask(owner, call("add")) == "add"


def test_a_slow_reader_keeps_no_more_than_a_window_anywhere(
    scene: Scene, redis_server: RedisServer, redis_prefix: str
) -> None:
    client, owner = scene.nodes
    piece = b"y" * 50_000
    stream = listening(client.reach(owner))
    with Observer(redis_server, redis_prefix) as seen:
        for _ in range(LARGE // len(piece)):
            owner.child.streams[0].say(piece)
        for number in range(10):
            assert client.ask(owner, call(f"quick{number}")) == f"quick{number}"
        backlog = owner.child.streams[0].exchange.backlog
        assert backlog > LARGE // 2, "the owner's server is not held up"
        for _ in range(LARGE // len(piece)):
            delivery = stream.receive(PATIENCE)
            assert delivery is not None
            assert delivery.data == piece
    assert seen.longest <= 2 * protocol.WINDOW + 8
    assert seen.largest <= 3 * WINDOW_BYTES


def test_a_slow_reader_of_large_messages_holds_its_server_up_too(scene: Scene) -> None:
    client, owner = scene.nodes
    size, count = 2 * protocol.WINDOW * protocol.PIECE, 8
    stream = listening(client.reach(owner))
    for number in range(count):
        owner.child.streams[0].say(b"%d" % number * size)
    eventually(lambda: owner.child.streams[0].exchange.backlog <= (count - 1) * size)
    arrived = [0]

    def is_still() -> bool:
        before, arrived[0] = arrived[0], stream.backlog
        time.sleep(0.05)
        return before == stream.backlog > 0

    eventually(is_still)
    unread = stream.backlog
    sizes = []
    for number in range(count):
        delivery = stream.receive(PATIENCE)
        assert delivery is not None
        sizes.append(len(delivery.data))
        assert delivery.data[:1] == b"%d" % number
    assert sizes == [size] * count
    assert unread <= 2 * size + protocol.WINDOW * protocol.PIECE, (
        f"{unread // 2**20} MB were unread"
    )


# --- owners and clients that leave ---------------------------------------------------------------


@pytest.fixture(params=["memory", "redis"])
def mailboxes(request: pytest.FixtureRequest) -> list[Mailboxes]:
    """Each kind of mailboxes, as two replicas have them."""
    if request.param == "memory":
        return [FickleMailboxes(15.0)] * 2
    redis_at: Callable[..., Connection] = request.getfixturevalue("redis_at")
    url = request.getfixturevalue("redis_url")
    prefix = request.getfixturevalue("redis_prefix")
    return [RedisMailboxes(redis_at(url), prefix, 1.5) for _ in range(2)]


@pytest.fixture
def pair(mailboxes: list[Mailboxes]) -> Iterator[Scene]:
    """Two replicas over each kind of mailboxes, of which nobody is new."""
    with Scene(*mailboxes) as made:
        yield made


def test_calls_of_an_owner_that_leaves_fail_soon(pair: Scene) -> None:
    client, owner = pair.nodes
    owner.child.scripts["wait"] = silent
    stream = listening(client.reach(owner))
    exchanges = [sent(client.reach(owner), [call("wait")], False, 60) for _ in range(3)]
    eventually(lambda: owner.child.executed["wait"] == 3)
    owner.relay.close()
    for exchange in exchanges:
        delivery = exchange.receive(PATIENCE)
        assert delivery is not None
        assert type(delivery.failure) is BackendLost
    eventually(lambda: stream.receive(0.05) is None and stream.is_over)
    assert stream.was_replaced is False


def test_what_is_sent_to_an_owner_that_left_was_not_reached(pair: Scene) -> None:
    client, owner = pair.nodes
    assert client.ask(owner, call("add")) == "add"
    owner.relay.close()
    with pytest.raises(BackendUnreached):
        sent(client.reach(owner), [call("again")], False, 60).receive(PATIENCE)
    with pytest.raises(BackendUnreached):
        client.reach(owner).notify(Notification("x"))
    with pytest.raises(BackendUnreached):
        listening(client.reach(owner))
    assert owner.child.executed == {"add": 1}


def test_what_a_client_that_leaves_had_open_is_closed_at_the_owner(pair: Scene) -> None:
    client, owner = pair.nodes
    owner.child.scripts["wait"] = silent
    listening(client.reach(owner))
    exchange = sent(client.reach(owner), [call("wait")], True, 60)
    hosted = eventually(lambda: owner.child.exchanges)[0]
    client.relay.close()
    assert hosted.was_left.wait(PATIENCE)
    assert owner.child.streams[0].was_left.wait(PATIENCE)
    eventually(lambda: owner.calls == 0)
    delivery = exchange.receive(PATIENCE)  # who waits here is told as well
    assert delivery is not None
    assert isinstance(delivery.failure, BackendLost)


def test_an_owner_closes_while_it_serves_and_leaves_nothing_open(pair: Scene) -> None:
    client, owner = pair.nodes
    owner.child.scripts["wait"] = silent
    exchange = sent(client.reach(owner), [call("wait")], True, 60)
    hosted = eventually(lambda: owner.child.exchanges)[0]
    owner.relay.close()
    owner.relay.close()
    assert hosted.was_left.wait(2)
    assert exchange.receive(PATIENCE) is not None


# --- what is left in a mailbox ------------------------------------------------------------------


class Removal:
    """Has something happen between the last look into a node's mailbox and its removal."""

    def __init__(self, mailboxes: list[Mailboxes], node: Node) -> None:
        self.before: Callable[[], object] = lambda: None
        self.after: Callable[[], object] = lambda: None
        self._own = node.replica.id
        self._accepted = 0
        self._remove = mailboxes[1].remove
        for one in set(mailboxes):
            one.post = partial(self._post, one.post)  # type: ignore[method-assign]
        mailboxes[1].remove = self._remove_late  # type: ignore[method-assign]

    def _post(
        self, post: Callable[[Sequence[Envelope]], list[bool]], envelopes: Sequence[Envelope]
    ) -> list[bool]:
        accepted = post(envelopes)
        pairs = zip(envelopes, accepted, strict=True)
        self._accepted += sum(ok and one.to == self._own for one, ok in pairs)
        return accepted

    def _remove_late(self, replica: str) -> list[bytes]:
        if replica != self._own:
            return self._remove(replica)
        self.before()
        left = self._remove(replica)
        self.after()
        return left

    def expect(self, act: Callable[[], object], envelopes: int = 1) -> None:
        """Does something that puts so many envelopes into the mailbox."""
        expected = self._accepted + envelopes
        act()
        eventually(lambda: self._accepted >= expected)


@pytest.fixture
def removal(mailboxes: list[Mailboxes], pair: Scene) -> Removal:
    """The removal of the owner's mailbox."""
    return Removal(mailboxes, pair.nodes[1])


def test_what_an_owner_that_leaves_has_not_read_is_refused_and_not_lost(
    pair: Scene, removal: Removal
) -> None:
    client, owner = pair.nodes
    assert client.ask(owner, call("add")) == "add"
    backend, pieces = client.reach(owner), 3 * protocol.WINDOW
    large = call("large", text="x" * (pieces * protocol.PIECE))
    asked: list[Exchange] = []

    with ThreadPoolExecutor(2) as pool:
        told: list[Future[object]] = []

        def come_late() -> None:
            removal.expect(lambda: asked.append(sent(backend, [call("late")], True, 60)))
            removal.expect(lambda: asked.append(sent(backend, [large], False, 60)), protocol.WINDOW)
            removal.expect(lambda: told.append(pool.submit(backend.notify, Notification("x"))))
            removal.expect(lambda: told.append(pool.submit(listening, backend)))

        removal.before = come_late
        owner.relay.close()
        assert len(asked + told) == 4
        for exchange in asked:
            with pytest.raises(BackendUnreached):
                exchange.receive(PATIENCE)
        assert [type(one.exception(PATIENCE)) for one in told] == [BackendUnreached] * 2
    assert owner.child.executed == {"add": 1}
    assert (owner.child.told, owner.child.streams) == ([], [])
    eventually(lambda: client.calls == 0)


def test_who_sees_that_the_mailbox_has_gone_waits_for_what_is_refused(
    pair: Scene, mailboxes: list[Mailboxes], removal: Removal
) -> None:
    client, owner = pair.nodes
    asked: list[Exchange] = []
    has_looked, may_look_again = threading.Event(), threading.Event()
    are_open = mailboxes[0].are_open

    def look(replicas: Sequence[str]) -> list[bool]:
        found = are_open(replicas)
        if not all(found) and has_looked.is_set():
            may_look_again.wait(PATIENCE)
        if not all(found):
            has_looked.set()
        return found

    mailboxes[0].are_open = look  # type: ignore[method-assign]
    removal.before = lambda: removal.expect(
        lambda: asked.append(sent(client.reach(owner), [call("late")], False, 60))
    )
    removal.after = lambda: has_looked.wait(PATIENCE)
    owner.relay.close()
    try:
        with pytest.raises(BackendUnreached):
            asked[0].receive(PATIENCE)
    finally:
        may_look_again.set()


def test_what_waits_behind_a_slow_child_is_refused_when_its_owner_leaves(pair: Scene) -> None:
    client, owner = pair.nodes
    free = threading.Event()
    owner.child.on_tell = lambda: free.wait(PATIENCE)
    backend = client.reach(owner)
    with ThreadPoolExecutor(2) as pool:
        begun = pool.submit(backend.notify, Notification("begun"))
        eventually(lambda: owner.child.told)
        waiting = pool.submit(backend.notify, Notification("waits"))
        eventually(lambda: owner.calls == 2)
        owner.relay.close()
        assert type(waiting.exception(PATIENCE)) is BackendUnreached
        assert type(begun.exception(PATIENCE)) is BackendLost
        free.set()
    assert [message.method for message in owner.child.told] == ["begun"]  # type: ignore[union-attr]


def test_an_answer_that_a_client_that_leaves_has_not_read_arrives(
    mailboxes: list[Mailboxes], pair: Scene
) -> None:
    owner, client = pair.nodes
    owner.child.scripts["wait"] = silent
    exchange = sent(client.reach(owner), [call("wait")], False, 60)
    hosted = eventually(lambda: owner.child.exchanges)[0]
    removal = Removal(mailboxes, client)
    removal.before = lambda: removal.expect(lambda: hosted.answer("late"))
    client.relay.close()
    assert result_of(exchange.receive(PATIENCE)) == "late"


# --- stores that are away ------------------------------------------------------------------------


@threads_end
@pytest.mark.parametrize("name", ["mcp-relay", "mcp-relay-sender"])
@pytest.mark.parametrize("is_owner", [True, False])
def test_no_call_waits_for_a_thread_that_has_ended(pair: Scene, is_owner: bool, name: str) -> None:
    client, owner = pair.nodes
    owner.child.scripts["wait"] = silent
    with closing(sent(client.reach(owner), [call("wait")], False, 60)) as exchange:
        eventually(lambda: owner.child.executed["wait"])
        worker = (owner if is_owner else client).worker(name)
        end_worker(worker)
        answer = exchange.receive(PATIENCE)
    assert answer is not None, "nothing came"
    assert isinstance(answer.failure, BackendLost)
    assert not is_answered(client, owner)  # nor does what is begun now wait
    worker.start()
    eventually(lambda: is_answered(client, owner), 3 * PATIENCE)


def is_answered(client: Node, owner: Node) -> bool:
    """Whether a call is answered, which none waits for longer than a look or two."""
    before = time.monotonic()
    try:
        with closing(sent(client.reach(owner), [call("echo")], False, 60)) as exchange:
            answer = exchange.receive(PATIENCE)
    except BackendError:
        answer = None
    assert time.monotonic() - before < PATIENCE
    return answer is not None and answer.failure is None


def test_a_relay_cannot_begin_without_its_store_and_can_when_it_is_back() -> None:
    mailboxes = FickleMailboxes(15.0)
    mailboxes.is_away = True
    with Scene() as scene:
        scene.nodes.append(node := Node(mailboxes))
        with pytest.raises(StorageUnavailable):
            node.relay.start()
        with pytest.raises(StorageUnavailable):
            node.relay.is_gone(node.replica.id)
        mailboxes.is_away = False
        node.relay.start()
        assert mailboxes.is_open(node.replica.id)


def test_a_call_survives_a_short_absence_of_the_store() -> None:
    mailboxes = FickleMailboxes(15.0)
    with Scene(mailboxes, mailboxes) as scene:
        client, owner = scene.nodes
        owner.child.scripts["wait"] = silent
        exchange = sent(client.reach(owner), [call("wait")], False, 60)
        hosted: ScriptedCall = eventually(lambda: owner.child.exchanges)[0]
        mailboxes.is_away = True
        hosted.answer("late")
        assert exchange.receive(0.6) is None
        mailboxes.is_away = False
        assert result_of(exchange.receive(PATIENCE)) == "late"


def test_a_lapse_is_reported_and_loses_no_call_silently() -> None:
    mailboxes = FickleMailboxes(1.0)
    with Scene(mailboxes, mailboxes) as scene:
        client, owner = scene.nodes
        owner.child.scripts["wait"] = silent
        exchange = sent(client.reach(owner), [call("wait")], False, 60)
        hosted: ScriptedCall = eventually(lambda: owner.child.exchanges)[0]
        mailboxes.is_away = True
        eventually(lambda: not client.relay.is_held)
        hosted.answer("in the outbox")  # and there it is given up, or not
        mailboxes.is_away = False
        assert client.lapsed.wait(PATIENCE)
        assert owner.lapsed.wait(PATIENCE)
        assert exchange.receive(PATIENCE) is not None
        eventually(lambda: client.relay.is_held)
        assert client.ask(owner, call("add")) == "add"


def test_an_answer_that_was_in_a_mailbox_that_lapsed_is_missed_and_not_waited_for() -> None:
    mailboxes = LocalMailboxes(1.0)
    with Scene(mailboxes, mailboxes) as scene:
        client, owner = scene.nodes
        owner.child.scripts["wait"] = silent
        exchange = sent(client.reach(owner), [call("wait")], True, 60)
        hosted: ScriptedCall = eventually(lambda: owner.child.exchanges)[0]
        eventually(lambda: _lose_a_letter(mailboxes, client, hosted))
        failed = exchange.receive(PATIENCE)
        while failed is not None and failed.failure is None:
            failed = exchange.receive(PATIENCE)
        assert failed is not None, "nobody noticed that something was lost"
        assert isinstance(failed.failure, BackendLost)


def _lose_a_letter(mailboxes: LocalMailboxes, client: Node, hosted: ScriptedCall) -> bool:
    """Lets something be said, and has it vanish with its mailbox unless it was read before."""
    hosted.say(b"something")
    until = time.monotonic() + 0.2
    while time.monotonic() < until:
        frames = map(protocol.decode_frame, filter(None, mailboxes.collect(client.replica.id, 0)))
        if any(frame.kind == Kind.PIECE for frame in frames):  # and no answer to a probe
            mailboxes.remove(client.replica.id)
            return True
    return False


def test_a_store_that_stays_away_fails_calls_within_a_lease_or_so(
    own_redis: Callable[..., RedisServer], redis_at: Callable[..., Connection]
) -> None:
    server = own_redis()
    nodes = [RedisMailboxes(redis_at(server.url), "p:", 1.0) for _ in range(2)]
    with Scene(*nodes) as scene:
        client, owner = scene.nodes
        assert client.ask(owner, call("add")) == "add"
        server.stop()
        began = time.monotonic()
        exchange = sent(client.reach(owner), [call("again")], False, 60)
        delivery = exchange.receive(PATIENCE)
        assert time.monotonic() - began < 5
        assert delivery is not None
        assert isinstance(delivery.failure, BackendLost)
        server.start()
        eventually(lambda: not _is_gone(client, owner))
        assert client.ask(owner, call("later")) == "later"


def _is_gone(client: Node, owner: Node) -> bool:
    try:
        return client.relay.is_gone(owner.replica.id)
    except StorageUnavailable:
        return True


def test_a_mailbox_that_somebody_deleted_is_opened_again(
    redis_server: RedisServer, redis_prefix: str, redis_at: Callable[..., Connection]
) -> None:
    connection = redis_at(redis_server.url)
    nodes = [RedisMailboxes(connection, redis_prefix, 1.0) for _ in range(2)]
    with Scene(*nodes) as scene, redis.Redis.from_url(redis_server.url) as admin:
        client, owner = scene.nodes
        key = f"{redis_prefix}mailbox:{owner.replica.id}"
        admin.delete(key)
        assert owner.lapsed.wait(PATIENCE)
        assert admin.pttl(key) > 0
        assert client.ask(owner, call("add")) == "add"


class Looked(FickleMailboxes):
    """Mailboxes that note which of them were looked at, and how many together."""

    def __init__(self) -> None:
        super().__init__(60.0)
        self.looked_at: set[str] = set()
        self.together = 0

    def are_open(self, replicas: Sequence[str]) -> list[bool]:
        self.looked_at.update(replicas)
        self.together = max(self.together, len(replicas))
        return super().are_open(replicas)


def test_many_replicas_are_looked_at_together_and_by_turns() -> None:
    mailboxes = Looked()
    node = Node(mailboxes)
    names = [f"replica-{number:03}" for number in range(150)]
    with closing(node.relay):
        for name in names:
            mailboxes.renew(name)
        exchanges = [
            sent(node.relay.backend(name, "child"), [call("silent")], False, 60) for name in names
        ]
        eventually(lambda: mailboxes.looked_at.issuperset(names), PATIENCE)
        assert 10 < mailboxes.together <= 65  # one is looked at a second time
        mailboxes.remove("replica-077")
        delivery = exchanges[77].receive(PATIENCE)
        assert delivery is not None
        assert type(delivery.failure) is BackendLost
        assert [one.poll() for one in exchanges if one is not exchanges[77]] == [None] * 149

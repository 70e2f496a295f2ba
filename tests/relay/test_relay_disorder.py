"""Relays when something is slow, comes twice, too late, or cannot be read."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from mcp_proxy.relay import protocol
from mcp_proxy.relay.protocol import Frame, Kind
from mcp_proxy.storage.mailboxes import Envelope, LocalMailboxes
from mcp_proxy.wire.jsonrpc import Notification
from tests.relay.scene import PATIENCE, Node, Scene
from tests.relay.scripted import ScriptedCall, call, silent
from tests.storage.offices import FickleMailboxes
from tests.support.exchanges import listening, received, sent
from tests.support.waiting import eventually

# --- nobody is held up ---------------------------------------------------------------------------


def test_a_slow_reader_holds_up_its_own_exchange_only(client: Node, owner: Node) -> None:
    slow = listening(client.reach(owner))
    for number in range(protocol.WINDOW * 3):
        owner.child.streams[0].say(b"%d" % number)
    for number in range(20):
        assert client.ask(owner, call(f"quick{number}")) == f"quick{number}"
    assert [d.data for d in received(slow, protocol.WINDOW * 3)] == [
        b"%d" % number for number in range(protocol.WINDOW * 3)
    ]


def test_a_child_that_does_not_read_holds_up_itself_only(client: Node, owner: Node) -> None:
    free = threading.Event()
    owner.child.on_tell = lambda: free.wait(PATIENCE)
    owner.children["other"] = type(owner.child)()
    backend = client.reach(owner)
    telling = threading.Thread(target=backend.notify, args=(Notification("x"),))
    telling.start()
    eventually(lambda: owner.child.told)
    assert client.ask(owner, call("quick"), "other") == "quick"
    free.set()
    telling.join(PATIENCE)
    assert not telling.is_alive()


def test_giving_up_a_call_of_a_child_that_does_not_read_costs_nobody_the_lease() -> None:
    """A bridge tells its child that a call is given up, and waits for it to read that."""
    free, is_stuck = threading.Event(), threading.Event()
    mailboxes = LocalMailboxes(0.6)
    with Scene(mailboxes, mailboxes) as scene:
        client, owner = scene.nodes
        owner.children["other"] = type(owner.child)()
        owner.child.scripts["wait"] = silent
        owner.child.on_expire = lambda: (is_stuck.set(), free.wait(PATIENCE))
        sent(client.reach(owner), [call("wait")], False, 0.1)
        assert is_stuck.wait(PATIENCE)
        until = time.monotonic() + 3 * mailboxes.lease
        try:
            while time.monotonic() < until:
                assert owner.relay.is_held
                assert client.ask(owner, call("quick"), "other") == "quick"
        finally:
            free.set()


# --- envelopes that come twice, late or at the wrong time -----------------------------------------


class Doubling(LocalMailboxes):
    """Every envelope arrives twice."""

    def post(self, envelopes):  # type: ignore[no-untyped-def]
        """The same batch once more, as when the answer to the first was lost."""
        super().post(envelopes)
        return super().post(envelopes)


def test_letters_that_arrive_twice_are_executed_and_delivered_once() -> None:
    def talk(exchange: ScriptedCall, requests: object) -> None:
        for number in range(100):
            exchange.say(b"%d" % number)
        exchange.answer("done")

    with Scene(*[Doubling()] * 2) as scene:
        client, owner = scene.nodes
        owner.child.scripts["talk"] = talk
        exchange = sent(client.reach(owner), [call("talk")], True, 5)
        assert [d.data for d in received(exchange, 101)[:-1]] == [b"%d" % n for n in range(100)]
        client.reach(owner).notify(Notification("x"))
        for number in range(10):
            assert client.ask(owner, call(f"c{number}")) == f"c{number}"
        assert len(owner.child.told) == 1
        assert set(owner.child.executed.values()) == {1}
        eventually(lambda: owner.calls == 0)
        eventually(lambda: client.calls == 0, 1.5)


def test_what_waits_for_a_child_that_does_not_read_is_not_too_late() -> None:
    lease, free = 0.6, threading.Event()
    with Scene(*[FickleMailboxes(lease)] * 2) as scene:
        client, owner = scene.nodes
        owner.child.on_tell = lambda: free.wait(PATIENCE)
        backend = client.reach(owner)
        with ThreadPoolExecutor(2) as pool:
            told = [pool.submit(backend.notify, Notification(name)) for name in ("first", "next")]
            late = time.monotonic() + 3 * lease
            eventually(lambda: time.monotonic() > late)
            free.set()
            assert [done.result(PATIENCE) for done in told] == [None, None]
        assert len(owner.child.told) == 2


def test_an_answer_that_comes_after_its_client_left_leaves_nothing_behind(
    client: Node, owner: Node, caplog: pytest.LogCaptureFixture
) -> None:
    free = threading.Event()
    owner.child.scripts["wait"] = silent
    owner.child.on_tell = lambda: free.wait(PATIENCE)
    backend = client.reach(owner)
    exchange = sent(backend, [call("wait")], False, 5)
    hosted = eventually(lambda: owner.child.exchanges)[0]
    telling = threading.Thread(target=backend.notify, args=(Notification("x"),))
    telling.start()
    eventually(lambda: owner.child.told)
    exchange.close()  # its owner does not hear of it yet: its lane is held up
    eventually(lambda: client.calls == 1)
    hosted.answer("too late")
    free.set()
    telling.join(PATIENCE)
    eventually(lambda: hosted.was_left.is_set() or hosted.exchange.is_over)
    assert client.ask(owner, call("quick")) == "quick"
    eventually(lambda: owner.calls == 0)
    eventually(lambda: client.calls == 0, 1.5)
    assert "cannot be read" not in caplog.text


@pytest.mark.parametrize("inside", [b"", b"\xc1", b"\x91\xa4Some", b"\x91\xb2SendReque\xffts"])
def test_a_message_that_is_none_costs_a_line_of_the_log(
    inside: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    mailboxes = LocalMailboxes()
    with Scene(mailboxes, mailboxes) as scene:
        asking, asked = scene.nodes
        frame = protocol.Frame("c", asking.replica.id, protocol.Kind.PIECE, 1, False, inside)
        mailboxes.post([Envelope(asked.replica.id, protocol.encode(frame))])
        eventually(lambda: "was not understood" in caplog.text)
        assert asking.ask(asked, call("quick")) == "quick"
        eventually(lambda: asked.calls == 0)
    assert "Traceback" not in caplog.text


class Hesitant(protocol.Channel):
    """A channel whose message takes its time to be cut into pieces, as a large one does."""

    until: threading.Event

    def put(self, message: bytes) -> None:
        self.until.wait(2)
        super().put(message)


class Probed(LocalMailboxes):
    """Mailboxes that say when a probe was sent."""

    def __init__(self, lease: float) -> None:
        super().__init__(lease)
        self.saw_probe = threading.Event()

    def post(self, envelopes):  # type: ignore[no-untyped-def]
        """Posts, and looks for a probe."""
        accepted = super().post(envelopes)
        if any(d and protocol.decode_frame(d).kind == Kind.PROBE for _, d in envelopes):
            self.saw_probe.set()
        return accepted


def test_a_probe_does_not_overtake_the_call_that_it_is_about(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mailboxes = Probed(0.5)
    with Scene(mailboxes, mailboxes) as scene:
        client, owner = scene.nodes
        monkeypatch.setattr("mcp_proxy.relay.calls.Channel", Hesitant)
        monkeypatch.setattr(Hesitant, "until", mailboxes.saw_probe, raising=False)
        assert client.ask(owner, call("add")) == "add"
        assert owner.child.executed == {"add": 1}


@pytest.mark.parametrize(
    "envelope",
    [b"\xc1", b"no frame", b"\x00" * 100, b"\x96\xa1c"],
    ids=["invalid", "text", "zeros", "cut off"],
)
def test_a_letter_that_nobody_can_read_harms_nothing(envelope: bytes) -> None:
    mailboxes = LocalMailboxes()
    with Scene(mailboxes, mailboxes) as scene:
        client, owner = scene.nodes
        odd = Frame("c", client.replica.id, Kind.PIECE, 1, False, envelope)
        mailboxes.post(
            [Envelope(owner.replica.id, d) for d in (envelope, protocol.encode(odd), b"")]
        )
        assert client.ask(owner, call("add")) == "add"
        eventually(lambda: owner.calls == 0, 1.5)


@pytest.mark.parametrize("line", [b'{"jsonrpc":"2.0","method":"x"}', b"[]", b"nonsense"])
def test_a_line_that_is_no_request_is_refused_without_a_traceback(
    line: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    mailboxes = LocalMailboxes()
    with Scene(mailboxes, mailboxes) as scene:
        asking, asked = scene.nodes
        (child,) = asked.children
        message = protocol.encode(protocol.SendRequests(child, [line], False, 5))
        frame = protocol.Frame("c", asking.replica.id, protocol.Kind.PIECE, 1, False, message)
        mailboxes.post([Envelope(asked.replica.id, protocol.encode(frame))])
        assert asking.ask(asked, call("quick")) == "quick"
        eventually(lambda: asked.calls == 0)
    assert "Traceback" not in caplog.text

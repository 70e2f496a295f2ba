"""The sender: envelopes leave in order, wait while they must, and are given up when they may be."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence

import pytest

from mcp_proxy.errors import StorageUnavailable
from mcp_proxy.relay import protocol
from mcp_proxy.relay.protocol import Channel, Delivered, Frame, Kind
from mcp_proxy.relay.sender import Call, Sender
from mcp_proxy.storage.mailboxes import Envelope
from tests.storage.offices import FickleMailboxes
from tests.support.waiting import eventually

#: Long enough that nothing is given up by accident, and short enough to wait for it.
LEASE = 0.6
LONG = 60.0


class Talk(Call):
    """Sends what it is given, and remembers how it was lost."""

    def __init__(self, name: str, peer: str) -> None:
        self.channel = Channel(name, "own", peer)
        self.lost: list[tuple[str, bool]] = []

    def outgoing(self) -> list[Frame]:
        return self.channel.outgoing()

    def on_message(self, message: bytes, is_fresh: Callable[[], bool]) -> None:
        raise AssertionError("nothing is received here")

    def on_loss(self, sentence: str, is_gone: bool = False) -> None:
        self.lost.append((sentence, self.channel.delivered is Delivered.NO))


class Judge:
    """Says of a replica whether it is gone, or that nobody can know yet."""

    def __init__(self) -> None:
        self.verdict: bool | None = None
        self.asked: list[str] = []

    def __call__(self, replica: str) -> bool:
        self.asked.append(replica)
        if self.verdict is None:
            raise StorageUnavailable
        return self.verdict


class Scene:
    """A sender that runs, with its mailboxes and the judge it asks."""

    def __init__(self, lease: float) -> None:
        self.mailboxes = FickleMailboxes(lease)
        self.judge = Judge()
        self.sender = Sender(self.mailboxes, self.judge)
        self.sender.start()

    def talk(self, name: str, peer: str, *texts: bytes) -> Talk:
        """A call that says something."""
        talk = Talk(name, peer)
        self.say(talk, *texts)
        return talk

    def say(self, talk: Talk, *texts: bytes) -> None:
        """Has a call say more."""
        for text in texts:
            talk.channel.put(text)
        self.sender.put(talk)

    def read(self, replica: str, count: int) -> list[bytes]:
        """What arrived at a replica, in order."""
        found: list[bytes] = []
        eventually(lambda: len(self._collect(replica, found)) >= count, 2)
        return found

    def _collect(self, replica: str, found: list[bytes]) -> list[bytes]:
        envelopes = self.mailboxes.collect(replica, 0.05)
        found += [protocol.decode_frame(envelope).data for envelope in envelopes]
        return found


@pytest.fixture
def make_scene() -> Iterator[Callable[[float], Scene]]:
    """Makes scenes whose senders are stopped when the test is over."""
    scenes: list[Scene] = []

    def make(lease: float) -> Scene:
        scenes.append(Scene(lease))
        return scenes[-1]

    yield make
    for scene in scenes:
        scene.sender.stop(5)


@pytest.fixture
def scene(make_scene: Callable[[float], Scene]) -> Scene:
    """A sender that has all the time."""
    return make_scene(LONG)


def test_letters_arrive_in_order(scene: Scene) -> None:
    scene.mailboxes.renew("b")
    talk = scene.talk("c", "b", *[b"%d" % number for number in range(50)])
    assert scene.read("b", 50) == [b"%d" % number for number in range(50)]
    assert talk.lost == []


def test_many_calls_share_a_round_trip(scene: Scene) -> None:
    scene.mailboxes.renew("b")
    scene.mailboxes.is_away = True
    for number in range(40):
        scene.talk(str(number), "b", b"%d" % number)
    eventually(lambda: scene.mailboxes.attempts)
    scene.mailboxes.is_away = False
    attempts = scene.mailboxes.attempts
    assert scene.read("b", 40) == [b"%d" % number for number in range(40)]
    assert scene.mailboxes.attempts - attempts < 10


def test_letters_wait_while_the_store_is_away_and_go_in_order_when_it_is_back(
    scene: Scene,
) -> None:
    scene.mailboxes.renew("b")
    scene.mailboxes.is_away = True
    first = scene.talk("c", "b", b"1", b"2")
    eventually(lambda: scene.mailboxes.attempts >= 2)
    second = scene.talk("d", "b", b"3")
    scene.say(first, b"4")
    scene.mailboxes.is_away = False
    assert scene.read("b", 4) == [b"1", b"2", b"3", b"4"]
    assert (first.lost, second.lost) == ([], [])


def test_letters_wait_while_it_is_not_certain_that_a_replica_is_gone(scene: Scene) -> None:
    talk = scene.talk("c", "b", b"1", b"2")
    eventually(lambda: len(scene.judge.asked) >= 2)
    assert talk.lost == []
    scene.mailboxes.renew("b")
    assert scene.read("b", 2) == [b"1", b"2"]


def test_a_replica_that_is_gone_was_not_reached(scene: Scene) -> None:
    scene.judge.verdict = True
    talk = scene.talk("c", "b", b"1", b"2")
    (_, is_unreached) = eventually(lambda: talk.lost)[0]
    assert is_unreached
    assert scene.judge.asked == ["b"]


def test_a_call_that_had_reached_a_replica_is_not_the_senders_to_decide(scene: Scene) -> None:
    """It may have been refused by a replica that left in order: the lease's thread looks."""
    scene.mailboxes.renew("b")
    talk = scene.talk("c", "b", b"1")
    assert scene.read("b", 1) == [b"1"]
    scene.judge.verdict = True
    scene.mailboxes.remove("b")
    scene.say(talk, b"2")
    fresh = scene.talk("d", "b", b"3")
    assert [is_unreached for _, is_unreached in eventually(lambda: fresh.lost)] == [True]
    assert talk.lost == []


def test_after_a_lease_without_a_mailbox_letters_are_given_up(
    make_scene: Callable[[float], Scene],
) -> None:
    scene = make_scene(LEASE)
    began = time.monotonic()
    talk = scene.talk("c", "b", b"1")
    (sentence, is_unreached) = eventually(lambda: talk.lost)[0]
    assert LEASE <= time.monotonic() - began < LEASE + 2
    assert is_unreached
    assert "cannot be reached" in sentence


def test_after_a_lease_without_the_store_letters_are_given_up(
    make_scene: Callable[[float], Scene],
) -> None:
    scene = make_scene(LEASE)
    scene.mailboxes.renew("b")
    scene.mailboxes.is_away = True
    talks = [scene.talk(str(number), f"b{number % 2}", b"1") for number in range(4)]
    for talk in talks:
        assert [is_unreached for _, is_unreached in eventually(lambda t=talk: t.lost)] == [False]
    scene.mailboxes.is_away = False
    scene.mailboxes.renew("b")
    scene.talk("later", "b", b"2")
    assert scene.read("b", 1) == [b"2"]


def test_a_letter_that_may_have_arrived_is_lost_and_not_unreached(scene: Scene) -> None:
    """The store took it and its answer was lost; the owner read it, ran it and ended."""
    scene.mailboxes.renew("b")
    scene.mailboxes.loses_answers = True
    talk = scene.talk("c", "b", b"1")
    assert scene.read("b", 1) == [b"1"]
    scene.judge.verdict = True
    scene.mailboxes.remove("b")
    scene.mailboxes.loses_answers = False
    assert [is_unreached for _, is_unreached in eventually(lambda: talk.lost)] == [False]


class ShortLived(FickleMailboxes):
    """The owner reads its first envelope, and leaves before the second of the batch comes."""

    def post(self, envelopes: Sequence[Envelope]) -> list[bool]:
        accepted = super().post(envelopes[:1])
        if accepted == [True]:
            self.remove(envelopes[0].to)
        return accepted + (super().post(envelopes[1:]) if envelopes[1:] else [])


def test_a_letter_that_was_accepted_before_the_mailbox_went_is_not_unreached() -> None:
    judge, mailboxes = Judge(), ShortLived(LONG)
    judge.verdict = True
    mailboxes.renew("b")
    sender = Sender(mailboxes, judge)
    read, unread = Talk("c", "b"), Talk("d", "b")
    for talk in (read, unread):
        talk.channel.put(b"1")
        sender.put(talk)
    sender.send_once(1)
    assert [frame.channel for frame in mailboxes.posted] == ["c"]
    assert [is_unreached for _, is_unreached in unread.lost] == [True]
    assert read.lost == []


def test_a_replica_that_is_not_there_holds_nobody_up(scene: Scene) -> None:
    scene.mailboxes.renew("b")
    waiting = scene.talk("c", "absent", b"1")
    for number in range(5):
        scene.talk(str(number), "b", b"%d" % number)
        assert scene.read("b", 1) == [b"%d" % number]
    assert waiting.lost == []


def test_a_large_message_goes_in_pieces_within_the_window(scene: Scene) -> None:
    scene.mailboxes.renew("b")
    scene.talk("c", "b", b"x" * (3 * protocol.WINDOW * protocol.PIECE))
    eventually(lambda: len(scene.mailboxes.posted) == protocol.WINDOW)
    assert {frame.kind for frame in scene.mailboxes.posted} == {Kind.PIECE}
    assert scene.read("b", protocol.WINDOW) == [b"x" * protocol.PIECE] * protocol.WINDOW
    assert len(scene.mailboxes.posted) == protocol.WINDOW


class Broken(Talk):
    """A call that fails when it is asked what it has to say."""

    def outgoing(self) -> list[Frame]:
        raise RuntimeError("this call is broken")


def test_a_call_that_fails_does_not_keep_others_from_being_sent(scene: Scene) -> None:
    scene.mailboxes.renew("b")
    sender = Sender(scene.mailboxes, scene.judge)
    broken, sound = Broken("c", "b"), Talk("d", "b")
    sound.channel.put(b"1")
    sender.put(broken)
    sender.put(sound)
    sender.start()
    assert scene.read("b", 1) == [b"1"]
    sender.stop(5)


def test_the_sender_goes_on_after_a_call_failed(scene: Scene) -> None:
    scene.mailboxes.renew("b")
    scene.sender.put(Broken("c", "b"))
    scene.talk("d", "b", b"1")
    scene.talk("e", "b", b"2")
    assert scene.read("b", 1)[-1] == b"2"


def test_stop_sends_what_can_be_sent_at_once(scene: Scene) -> None:
    scene.mailboxes.renew("b")
    for number in range(20):
        scene.talk(str(number), "b", b"%d" % number)
    scene.sender.stop(5)
    assert scene.read("b", 20) == [b"%d" % number for number in range(20)]


class Slow(FickleMailboxes):
    """Mailboxes whose next round trip takes as long as a test wants."""

    def __init__(self, lease: float) -> None:
        super().__init__(lease)
        self.is_under_way = threading.Event()
        self.may_go_on = threading.Event()

    def post(self, envelopes: Sequence[Envelope]) -> list[bool]:
        self.is_under_way.set()
        assert self.may_go_on.wait(20)
        return super().post(envelopes)


def test_stop_sends_what_was_said_during_the_last_round_trip() -> None:
    mailboxes = Slow(LONG)
    mailboxes.renew("b")
    sender = Sender(mailboxes, Judge())
    sender.start()
    first, last = Talk("c", "b"), Talk("d", "b")
    for talk in (first, last):
        talk.channel.put(b"1")
    sender.put(first)
    assert mailboxes.is_under_way.wait(5)
    sender.put(last)
    stopping = threading.Thread(target=sender.stop, args=(10,))
    stopping.start()
    eventually(lambda: sender.is_stopping)
    mailboxes.may_go_on.set()
    stopping.join(10)
    assert [frame.channel for frame in mailboxes.posted] == ["c", "d"]


def test_stop_does_not_wait_for_a_store_that_is_away(scene: Scene) -> None:
    scene.mailboxes.is_away = True
    scene.talk("c", "b", b"1")
    eventually(lambda: scene.mailboxes.attempts)
    began = time.monotonic()
    scene.sender.stop(5)
    assert time.monotonic() - began < 2


def test_a_sender_that_never_started_can_be_stopped() -> None:
    Sender(FickleMailboxes(LONG), Judge()).stop(5)


class Noting(FickleMailboxes):
    """Mailboxes that note which thread posts; a test may hold the first post up."""

    def __init__(self) -> None:
        super().__init__(LONG)
        self.by: list[threading.Thread] = []
        self.is_under_way = threading.Event()
        self.may_go_on = threading.Event()
        self.may_go_on.set()

    def post(self, envelopes: Sequence[Envelope]) -> list[bool]:
        self.by.append(threading.current_thread())
        self.is_under_way.set()
        assert self.may_go_on.wait(20)
        return super().post(envelopes)


@pytest.fixture
def noting() -> Iterator[tuple[Noting, Sender]]:
    """Mailboxes that note who posts, and a sender that runs."""
    mailboxes = Noting()
    mailboxes.renew("b")
    sender = Sender(mailboxes, Judge())
    sender.start()
    yield mailboxes, sender
    mailboxes.may_go_on.set()
    sender.stop(5)


def test_a_call_that_is_alone_is_sent_by_the_thread_that_has_it(
    noting: tuple[Noting, Sender],
) -> None:
    mailboxes, sender = noting
    talk = Talk("c", "b")
    talk.channel.put(b"1")
    sender.send(talk)
    assert [frame.data for frame in mailboxes.posted] == [b"1"]
    assert mailboxes.by == [threading.current_thread()]
    assert talk.channel.delivered is Delivered.YES


def test_calls_that_come_while_one_is_sent_leave_together_and_wait_for_nobody(
    noting: tuple[Noting, Sender],
) -> None:
    mailboxes, sender = noting
    mailboxes.may_go_on.clear()
    talks = [Talk(str(number), "b") for number in range(5)]
    for talk in talks:
        talk.channel.put(b"1")
    first = threading.Thread(target=sender.send, args=talks[:1])
    first.start()
    assert mailboxes.is_under_way.wait(5)
    for talk in talks[1:]:
        sender.send(talk)
    mailboxes.may_go_on.set()
    eventually(lambda: len(mailboxes.posted) == 5)
    assert [frame.channel for frame in mailboxes.posted] == ["0", "1", "2", "3", "4"]
    assert threading.current_thread() not in mailboxes.by
    first.join(5)


def test_what_a_thread_could_not_send_itself_is_sent_later(
    noting: tuple[Noting, Sender],
) -> None:
    mailboxes, sender = noting
    mailboxes.is_away = True
    talk = Talk("c", "b")
    talk.channel.put(b"1")
    sender.send(talk)
    talk.channel.put(b"2")
    sender.send(talk)
    assert mailboxes.by.count(threading.current_thread()) == 1
    mailboxes.is_away = False
    eventually(lambda: [frame.data for frame in mailboxes.posted] == [b"1", b"2"])
    assert talk.lost == []

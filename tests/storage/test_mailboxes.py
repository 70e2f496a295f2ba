"""What every kind of mailboxes promises, tried on memory and on Redis alike."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

from mcp_proxy.storage.mailboxes import Envelope, Mailboxes
from tests.storage.offices import LEASE, Office
from tests.support.threads import run_together

VALUES = {
    "nothing": b"",
    "a zero": b"\0",
    "every byte": bytes(range(256)),
    "no text": b"\xff\xfe\x80",
    "lines": b"a\r\nb\n",
    "text": "é 😀".encode(),
    "large": b"x\xff" * 500_000,
}


def collect_all(mailboxes: Mailboxes, replica: str, count: int) -> list[bytes]:
    """The next `count` envelopes, or fewer where no more come."""
    found: list[bytes] = []
    while len(found) < count:
        envelopes = mailboxes.collect(replica, 5)
        if not envelopes:
            break
        found += envelopes
    return found


def is_empty(mailboxes: Mailboxes, replica: str) -> bool:
    """Whether nothing (more) can be collected."""
    return mailboxes.collect(replica, 0.01) == []


class TestLife:
    """A mailbox is there from its first renewal until nobody has renewed it for a lease."""

    def test_the_first_renewal_opens_and_the_others_prolong(self, mailboxes: Mailboxes) -> None:
        assert mailboxes.is_open("a") is False
        assert mailboxes.renew("a") is False
        assert mailboxes.is_open("a") is True
        assert mailboxes.renew("a") is True
        assert mailboxes.is_open("b") is False
        mailboxes.renew("c")
        assert mailboxes.are_open(["c", "b", "a"]) == [True, False, True]

    def test_it_lapses_when_it_is_not_renewed(self, office: Office) -> None:
        office.mailboxes.renew("a")
        office.pass_time(LEASE - 5)
        assert office.mailboxes.is_open("a")
        office.pass_time(6)
        assert not office.mailboxes.is_open("a")
        assert office.mailboxes.renew("a") is False

    def test_a_renewal_starts_the_whole_lease_anew(self, office: Office) -> None:
        office.mailboxes.renew("a")
        for _ in range(3):
            office.pass_time(LEASE * 0.8)
            assert office.mailboxes.renew("a") is True
        office.pass_time(LEASE + 1)
        assert not office.mailboxes.is_open("a")

    @pytest.mark.parametrize("use", ["post", "collect", "is_open"])
    def test_nothing_but_a_renewal_prolongs_it(self, office: Office, use: str) -> None:
        office.mailboxes.renew("a")
        office.pass_time(LEASE * 0.8)
        if use == "post":
            assert office.mailboxes.post([Envelope("a", b"1")]) == [True]
        elif use == "collect":
            office.mailboxes.post([Envelope("a", b"1")])
            assert office.mailboxes.collect("a", 1) == [b"1"]
        else:
            assert office.mailboxes.is_open("a")
        office.pass_time(LEASE * 0.3)
        assert not office.mailboxes.is_open("a")

    def test_a_mailbox_that_expired_has_lost_its_letters(self, office: Office) -> None:
        office.mailboxes.renew("a")
        assert office.mailboxes.post([Envelope("a", b"old")]) == [True]
        office.pass_time(LEASE + 1)
        office.mailboxes.renew("a")
        assert is_empty(office.mailboxes, "a")
        office.mailboxes.post([Envelope("a", b"new")])
        assert office.mailboxes.collect("a", 5) == [b"new"]

    def test_remove_ends_it_with_its_letters(self, mailboxes: Mailboxes) -> None:
        mailboxes.renew("a")
        mailboxes.renew("b")
        mailboxes.post([Envelope("a", b"1"), Envelope("b", b"2")])
        assert mailboxes.remove("a") == [b"1"]
        assert not mailboxes.is_open("a")
        assert mailboxes.is_open("b")
        assert mailboxes.collect("b", 5) == [b"2"]
        assert mailboxes.post([Envelope("a", b"2")]) == [False]
        assert mailboxes.renew("a") is False
        assert is_empty(mailboxes, "a")

    def test_remove_may_be_repeated(self, mailboxes: Mailboxes) -> None:
        assert mailboxes.remove("a") == []
        mailboxes.renew("a")
        mailboxes.post([Envelope("a", b"1")])
        assert mailboxes.remove("a") == [b"1"]
        assert mailboxes.remove("a") == []
        assert not mailboxes.is_open("a")

    def test_remove_returns_what_nobody_has_read(self, mailboxes: Mailboxes) -> None:
        mailboxes.renew("a")
        mailboxes.post([Envelope("a", b"read"), Envelope("a", b"read, too")])
        assert collect_all(mailboxes, "a", 2) == [b"read", b"read, too"]
        mailboxes.post([Envelope("a", data) for data in VALUES.values()])
        assert mailboxes.remove("a") == list(VALUES.values())

    def test_remove_returns_nothing_of_a_mailbox_that_expired(self, office: Office) -> None:
        office.mailboxes.renew("a")
        office.mailboxes.post([Envelope("a", b"old")])
        office.pass_time(LEASE + 1)
        assert office.mailboxes.remove("a") == []

    def test_what_comes_as_it_is_removed_is_returned_or_refused(self, mailboxes: Mailboxes) -> None:
        mailboxes.renew("a")
        has_begun = threading.Event()

        def posting(sender: int) -> Callable[[], list[bytes]]:
            def post() -> list[bytes]:
                accepted = []
                for number in range(100_000):
                    data = b"%d/%d" % (sender, number)
                    if mailboxes.post([Envelope("a", data)]) == [False]:
                        return accepted
                    accepted.append(data)
                    if number == 10:
                        has_begun.set()
                raise AssertionError("the mailbox stayed")

            return post

        def remove() -> list[bytes]:
            read = mailboxes.collect("a", 5)
            assert has_begun.wait(10)
            return read + mailboxes.remove("a")

        *accepted, found = run_together([*map(posting, range(4)), remove])
        assert sorted(found) == sorted(data for one in accepted for data in one)

    def test_the_store_is_up_for_longer_and_longer(self, mailboxes: Mailboxes) -> None:
        uptime = mailboxes.uptime()
        assert uptime >= 0
        assert mailboxes.uptime() >= uptime

    def test_close_leaves_mailboxes_where_they_are(self, mailboxes: Mailboxes) -> None:
        mailboxes.renew("a")
        mailboxes.close()
        mailboxes.close()
        assert mailboxes.is_open("a")

    def test_it_says_what_it_is(self, mailboxes: Mailboxes) -> None:
        assert type(mailboxes).__name__ in repr(mailboxes)


class TestLetters:
    """What is accepted arrives, once and in order; what cannot arrive is refused."""

    @pytest.mark.parametrize("data", VALUES.values(), ids=VALUES.keys())
    def test_a_letter_is_the_bytes_that_were_sent(self, mailboxes: Mailboxes, data: bytes) -> None:
        mailboxes.renew("a")
        assert mailboxes.post([Envelope("a", data)]) == [True]
        assert mailboxes.collect("a", 5) == [data]
        assert is_empty(mailboxes, "a")

    def test_every_value_travels_in_a_batch_too(self, mailboxes: Mailboxes) -> None:
        mailboxes.renew("a")
        envelopes = [Envelope("a", data) for data in VALUES.values()]
        assert mailboxes.post(envelopes) == [True] * len(envelopes)
        assert collect_all(mailboxes, "a", len(envelopes)) == list(VALUES.values())

    def test_a_letter_to_nobody_is_refused_and_opens_nothing(self, mailboxes: Mailboxes) -> None:
        assert mailboxes.post([Envelope("a", b"1")]) == [False]
        assert not mailboxes.is_open("a")
        mailboxes.renew("a")
        assert is_empty(mailboxes, "a")

    def test_an_empty_batch_is_harmless(self, mailboxes: Mailboxes) -> None:
        assert mailboxes.post([]) == []

    def test_in_a_batch_each_letter_is_answered_for(self, mailboxes: Mailboxes) -> None:
        mailboxes.renew("a")
        mailboxes.renew("c")
        envelopes = [
            Envelope(to, to.encode() + b"%d" % n) for n in (1, 2) for to in ("a", "b", "c")
        ]
        assert mailboxes.post(envelopes) == [True, False, True, True, False, True]
        assert collect_all(mailboxes, "a", 2) == [b"a1", b"a2"]
        assert collect_all(mailboxes, "c", 2) == [b"c1", b"c2"]
        assert not mailboxes.is_open("b")

    def test_the_oldest_letter_comes_first(self, mailboxes: Mailboxes) -> None:
        mailboxes.renew("a")
        sent = [b"%d" % number for number in range(1000)]
        for start in range(0, 1000, 100):
            mailboxes.post([Envelope("a", data) for data in sent[start : start + 100]])
        assert collect_all(mailboxes, "a", 1000) == sent
        assert is_empty(mailboxes, "a")

    def test_letters_that_come_between_two_looks_wait(self, mailboxes: Mailboxes) -> None:
        mailboxes.renew("a")
        for number in range(20):
            mailboxes.post([Envelope("a", b"%d" % number)])
            assert mailboxes.collect("a", 5) == [b"%d" % number]
        assert is_empty(mailboxes, "a")

    def test_each_reads_its_own_mailbox(self, mailboxes: Mailboxes) -> None:
        mailboxes.renew("a")
        mailboxes.renew("b")
        mailboxes.post([Envelope("a", b"for a"), Envelope("b", b"for b")])
        assert mailboxes.collect("b", 5) == [b"for b"]
        assert mailboxes.collect("a", 5) == [b"for a"]

    def test_nothing_is_lost_read_twice_or_out_of_order_among_many_threads(
        self, mailboxes: Mailboxes
    ) -> None:
        senders, each = 8, 150
        mailboxes.renew("a")

        def posting(sender: int) -> Callable[[], list[bytes]]:
            def post() -> list[bytes]:
                for number in range(0, each, 3):
                    envelopes = [Envelope("a", b"%d/%d" % (sender, number + n)) for n in range(3)]
                    assert mailboxes.post(envelopes) == [True] * 3
                return []

            return post

        read = run_together(
            [*map(posting, range(senders)), lambda: collect_all(mailboxes, "a", senders * each)]
        )[-1]
        for sender in range(senders):
            own = [data for data in read if data.startswith(b"%d/" % sender)]
            assert own == [b"%d/%d" % (sender, number) for number in range(each)]
        assert is_empty(mailboxes, "a")


class TestCollecting:
    """`collect` waits for the first envelope and no longer."""

    def test_it_waits_for_its_time_and_returns_nothing(self, mailboxes: Mailboxes) -> None:
        mailboxes.renew("a")
        began = time.monotonic()
        assert mailboxes.collect("a", 0.2) == []
        assert 0.15 < time.monotonic() - began < 5

    def test_a_mailbox_that_is_not_there_holds_nothing(self, mailboxes: Mailboxes) -> None:
        assert mailboxes.collect("a", 0.05) == []
        assert not mailboxes.is_open("a")

    def test_it_returns_at_once_when_a_letter_arrives(self, mailboxes: Mailboxes) -> None:
        mailboxes.renew("a")
        mailboxes.collect("a", 0.01)
        arrived: list[list[bytes]] = []

        def collect() -> None:
            arrived.append(mailboxes.collect("a", 60))

        reader = threading.Thread(target=collect)
        reader.start()
        reader.join(0.2)
        assert reader.is_alive(), "collect did not wait"
        mailboxes.post([Envelope("a", b"1")])
        reader.join(10)
        assert arrived == [[b"1"]]

    def test_a_mailbox_that_opens_meanwhile_is_seen(self, mailboxes: Mailboxes) -> None:
        reader_waits = threading.Event()
        found: list[bytes] = []

        def collect() -> None:
            reader_waits.set()
            found.extend(collect_until_something(mailboxes))

        reader = threading.Thread(target=collect)
        reader.start()
        assert reader_waits.wait(5)
        mailboxes.renew("a")
        mailboxes.post([Envelope("a", b"1")])
        reader.join(10)
        assert found == [b"1"]


def collect_until_something(mailboxes: Mailboxes) -> list[bytes]:
    """The first envelopes that come within ten seconds."""
    until = time.monotonic() + 10
    while time.monotonic() < until:
        if envelopes := mailboxes.collect("a", 1):
            return envelopes
    return []

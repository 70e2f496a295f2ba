"""The keys of an issuer, kept up to date in the background.

No request fetches them: a thread does, and requests take what it has found. So the keys that are
known serve on for as long as their server hangs or is away, and nobody waits for it. Only a token
whose key is not known is worth a wait, a short one: its key may be a new one.
"""

from __future__ import annotations

import logging
import threading
import time

from jwt import PyJWK

from mcp_proxy.auth.issuer import Issuer, IssuerError
from mcp_proxy.auth.key_set import KeySet
from mcp_proxy.background import Periodic, Workers
from mcp_proxy.errors import KeysUnavailable

log = logging.getLogger(__name__)

# Seconds between two looks at the issuer, and between those while it cannot be read: without any
# key all tokens are refused.
_INTERVAL = 300.0
_RETRY = 30.0
_RETRY_WITHOUT_KEYS = 5.0

# Seconds between two fetches that tokens of unknown keys cause: anybody can write such a token.
_COOL_DOWN = 30.0

# Seconds for which requests wait for such a fetch, all of them together.
_LONGEST_WAIT = 5.0

# Seconds between two lines of the log about one outage.
_QUIET = 60.0


class SigningKeys(Periodic):
    """The keys of one issuer. Thread-safe; the thread starts with the first question.

    At most `max_waiting` requests wait for a fetch, so that others have threads meanwhile.
    """

    is_essential = False

    def __init__(
        self, issuer: Issuer, workers: Workers | None = None, max_waiting: int = 16
    ) -> None:
        super().__init__("mcp-signing-keys", _INTERVAL, self._fetch, workers)
        self._issuer = issuer
        self._max_waiting = max_waiting
        self._told = float("-inf")  # when the log last told of a failure (monotonic); the thread's
        self._news = threading.Condition()  # guards and announces what follows
        self._keys: KeySet | None = None
        self._failure: str | None = None  # of the latest fetch
        self._begun = 0  # fetches that were begun, and that are over
        self._over = 0
        self._wanted = 1  # the fetch that is waited for, and until when (monotonic)
        self._until: float | None = None
        self._waiting = 0
        self._caused = float("-inf")  # when a token last caused a fetch (monotonic)

    def prepare(self) -> None:
        if self._pid is not None:  # after a fork
            self._news, self._waiting = threading.Condition(), 0
        self._woken.set()  # the first fetch is at once

    @property
    def current(self) -> KeySet | None:
        """The keys that are known, None as long as there have never been any."""
        return self._keys

    def reason(self) -> str | None:
        """Why no token can be checked, None if some can; before the first fetch is over, too."""
        if self._keys is not None:
            return None
        return f"no keys of {self._issuer.url} yet: {self._failure or 'they are being fetched'}"

    def matching(
        self, name: str | None, algorithm: str, may_wait: bool = True
    ) -> tuple[PyJWK, ...]:
        """The keys that a token of this `kid` and algorithm can be signed with, maybe none.

        Where none is known it waits a few seconds, if it may. Raises KeysUnavailable where that may
        be because the issuer cannot be read.
        """
        self.start()
        keys = self._keys
        found = keys.matching(name, algorithm) if keys is not None else ()
        if found:
            return found
        is_answered = self._wait_for_news(may_wait)
        keys = self._keys
        found = keys.matching(name, algorithm) if keys is not None else ()
        if not found and (keys is None or not is_answered):
            raise KeysUnavailable
        return found

    def _wait_for_news(self, may_wait: bool) -> bool:
        """Waits for the fetch that a token has caused, this one or an earlier one.

        Returns whether the issuer has answered.
        """
        with self._news:
            now = time.monotonic()
            if self._keys is not None and now - self._caused >= _COOL_DOWN:
                self._caused = now
                self._wanted, self._until = self._begun + 1, None
                self.wake()
            if self._until is None:
                self._until = now + _LONGEST_WAIT
            may_wait = may_wait and self._waiting < self._max_waiting
            if may_wait and self._over < self._wanted:
                self._waiting += 1
                try:
                    self._news.wait_for(lambda: self._over >= self._wanted, self._until - now)
                finally:
                    self._waiting -= 1
            return self._over >= self._wanted and self._failure is None

    def _fetch(self) -> None:
        """One look at the issuer, in the thread."""
        with self._news:
            self._begun += 1
        keys, failure = None, None
        try:
            keys = self._issuer.keys()
        except IssuerError as error:
            failure = str(error)
        had_failed = self._failure is not None
        with self._news:
            if keys is not None and keys != self._keys:
                self._keys = keys
            self._failure = failure
            self._over = self._begun
            self._news.notify_all()
        if failure is None:
            self.interval = _INTERVAL
            if had_failed:
                log.info("the keys of %s can be read again", self._issuer.url)
                self._told = float("-inf")
        else:
            self.interval = _RETRY_WITHOUT_KEYS if self._keys is None else _RETRY
            self._log_failure(failure)

    def _log_failure(self, failure: str) -> None:
        """Logs a failed fetch, once a minute at most."""
        if time.monotonic() - self._told < _QUIET:
            return
        self._told = time.monotonic()
        if self._keys is None:
            log.error(
                "every token is refused with 503: the keys of %s cannot be had, and are asked for "
                "every %g seconds: %s",
                self._issuer.url,
                _RETRY_WITHOUT_KEYS,
                failure,
            )
        else:
            log.warning(
                "the keys of %s cannot be read; those that are known serve on: %s",
                self._issuer.url,
                failure,
            )

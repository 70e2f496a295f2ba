"""What `check` shows: no secret of the configuration, and nothing that a terminal acts on.

A server may repeat what it was given, in its answers, on stderr, and so in log lines about it.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from urllib.parse import parse_qsl, quote, urlsplit

from mcp_proxy.config import ProxyConfig
from mcp_proxy.edge.logs import visible
from mcp_proxy.redis.client import passwords_in
from mcp_proxy.servers import HttpServer, ServerGroup, UnservedServer
from mcp_proxy.shown_commands import shown_arguments

# A shorter value is no secret worth the name, and would be found everywhere.
_SHORTEST_SECRET = 6


class Mask:
    """Hides the secrets of a configuration in a text."""

    def __init__(self, config: ProxyConfig) -> None:
        found = {form for secret in _secrets(config) for form in _forms(secret)}
        self._secrets = sorted(found, key=len, reverse=True)

    def __call__(self, text: str) -> str:
        """The text in one line, with `***` for each secret and no control characters."""
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return visible(text)


@contextmanager
def masked_log(mask: Mask) -> Iterator[None]:
    """Warnings of this process go to stderr through `mask`, at any place in the tree of loggers."""
    handler = logging.StreamHandler()
    handler.setLevel(logging.WARNING)
    handler.setFormatter(_MaskedFormatter(mask))
    logging.getLogger().addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)


class _MaskedFormatter(logging.Formatter):
    """The message in one line; a traceback has lines of its own."""

    def __init__(self, mask: Mask) -> None:
        super().__init__()
        self._mask = mask

    def format(self, record: logging.LogRecord) -> str:
        return "\n".join(map(self._mask, super().format(record).split("\n")))

    def formatMessage(self, record: logging.LogRecord) -> str:
        return self._mask(super().formatMessage(record))


def _secrets(config: ProxyConfig) -> list[str]:
    """What must not be printed: each value that may be a secret, and its words."""
    urls = [*config.target_url, *config.allowed_backends]
    headers = [*config.forward_headers]
    told: list[str] = []
    for server in config.listed():
        if isinstance(server, UnservedServer | ServerGroup):
            continue
        told += server.secrets
        if isinstance(server, HttpServer):
            urls += server.urls
            headers += server.headers
        else:
            told += server.env.values()
            told += _hidden_in(server.argv)
    told += [header.partition(":")[2].strip() for header in headers]
    told += [value for url in urls for _, value in parse_qsl(urlsplit(url).query)]
    for url in filter(None, (config.redis_url, config.backend_proxy)):
        told += passwords_in(url)
    told += [word for value in told for word in value.split()]
    return [secret for secret in told if len(secret) >= _SHORTEST_SECRET]


def _forms(secret: str) -> set[str]:
    """A secret as it is, in JSON, and in a URL."""
    in_json = [json.dumps(secret, ensure_ascii=is_ascii)[1:-1] for is_ascii in (True, False)]
    return {secret, *in_json, quote(secret, safe="", errors="replace")}


def _hidden_in(argv: Sequence[str]) -> Iterator[str]:
    """The words of a command that are not shown."""
    for argument, shown in zip(argv, shown_arguments(argv), strict=True):
        yield from (word for word in re.split(r"[\s\"'=:,;&?@]+", argument) if word not in shown)

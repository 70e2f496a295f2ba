"""When a request is whole, whatever the pieces in which it comes."""

from __future__ import annotations

import pytest

from mcp_proxy.server.arriving import LARGEST_BODY, ArrivingRequest, Shape

_HEAD = b"POST /mcp HTTP/1.1\r\nHost: a\r\n"

WHOLE = [
    b"GET / HTTP/1.1\r\nHost: a\r\n\r\n",
    b"GET / HTTP/1.0\r\n\r\n",
    _HEAD + b"Content-Length: 0\r\n\r\n",
    _HEAD + b"content-length:3 \r\n\r\nabc",
    _HEAD + b"Content-Length: 4\r\n\r\n\r\n\r\n",
    _HEAD + b"Transfer-Encoding: Chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
    _HEAD + b"Transfer-Encoding: chunked\r\n\r\n3;a=b\r\n\r\n0\r\n1\r\nx\r\n0\r\nT: 1\r\n\r\n",
]

OTHER = [
    b"GET / HTTP/1.1\nHost: a\n\n",
    b"\r\nGET / HTTP/1.1\r\n\r\n",
    _HEAD + b"Content-Length: 1\r\nContent-Length: 1\r\n\r\n",
    _HEAD + b"Content-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
    _HEAD + b"Content-Length: +1\r\n\r\n",
    _HEAD + b"Content-Length: %d\r\n\r\n" % (LARGEST_BODY + 1),
    _HEAD + b"Transfer-Encoding: gzip, chunked\r\n\r\n",
    _HEAD + b"Transfer-Encoding: chunked\r\n\r\nxyz\r\n",
    _HEAD + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n" % (LARGEST_BODY + 1),
    _HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + b"0" * 5000,
    _HEAD + b"Transfer-Encoding: chunked\r\n\r\n0\r\n" + b"0" * 5000,
]


def request(data: bytes, step: int) -> ArrivingRequest:
    arriving = ArrivingRequest(1000)
    for at in range(0, len(data), step):
        arriving.add(data[at : at + step])
    return arriving


@pytest.mark.parametrize("data", WHOLE)
def test_a_request_is_whole_with_its_last_byte(data: bytes) -> None:
    for step in (1, 2, 3, 7, len(data)):
        assert request(data, step).shape is Shape.WHOLE
        assert request(data[:-1], step).shape in (Shape.HEAD, Shape.BODY)
    assert request(data + b"GET /", len(data) + 5).shape is Shape.WHOLE


@pytest.mark.parametrize("data", OTHER)
def test_any_other_shape_is_seen_as_such(data: bytes) -> None:
    for step in (1, 2, len(data)):
        assert request(data, step).shape is Shape.OTHER


@pytest.mark.parametrize("end", [b"", b"\r\n\r\n"])
def test_a_head_has_its_limit(end: bytes) -> None:
    data = _HEAD + b"A: " + b"x" * 1000 + end
    for step in (1, 100, len(data)):
        assert request(data, step).shape is Shape.TOO_LONG


def test_an_expectation_is_seen() -> None:
    data = _HEAD + b"Expect: 100-continue\r\nContent-Length: 3\r\n\r\n"
    arriving = request(data, 5)
    assert (arriving.shape, arriving.expects_continue, arriving.body_bytes) == (Shape.BODY, True, 0)

"""What came out: a table, a JSON document and a chart."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from statistics import median

import msgspec
from load import Measurement

_OURS = "#2563a8"
_PEER = "#c2713a"
_BARE = "#9aa3ad"

_BAR = 16
_GAP = 7
_LEFT = 260
_WIDTH = 860
_HEADING = 34


class Row(msgspec.Struct):
    """All rounds of one contender in one mode; `ratio` is to the best peer in the same mode."""

    name: str
    title: str
    is_peer: bool
    sessions: str
    rounds: list[Measurement] = []
    ratio: float | None = None

    @property
    def rate(self) -> float:
        """Calls per second, the median of the rounds."""
        return median(one.rate for one in self.rounds)

    @property
    def slowest(self) -> float:
        """The round with the lowest rate."""
        return min(one.rate for one in self.rounds)

    @property
    def fastest(self) -> float:
        """The round with the highest rate."""
        return max(one.rate for one in self.rounds)

    @property
    def p50(self) -> float:
        """Milliseconds, the median of the rounds."""
        return median(one.p50 for one in self.rounds)

    @property
    def p99(self) -> float:
        """Milliseconds, the median of the rounds."""
        return median(one.p99 for one in self.rounds)

    @property
    def load(self) -> float:
        """The share of a CPU that the load took, the highest of the rounds."""
        return max(one.load for one in self.rounds)

    @property
    def reconnects(self) -> int:
        """Connections that the server closed, in all rounds."""
        return sum(one.reconnects for one in self.rounds)


def compare(rows: Sequence[Row]) -> None:
    """Sets each row's ratio to the best peer in its mode, where there is one."""
    for row in rows:
        peers = [other.rate for other in rows if other.is_peer and other.sessions == row.sessions]
        row.ratio = row.rate / max(peers) if peers else None


_TABLE = "{:<38} {:<9} {:>8} {:>15} {:>8} {:>8} {:>9} {:>6} {:>10}"


def table(rows: Sequence[Row]) -> str:
    """The rows as text, fastest first within each mode."""
    headings = ("", "sessions", "calls/s", "min-max", "p50 ms", "p99 ms", "best peer", "load")
    lines = [_TABLE.format(*headings, "reconnects")]
    for row in ordered(rows):
        lines.append(
            _TABLE.format(
                row.title,
                row.sessions,
                f"{row.rate:,.0f}",
                f"{row.slowest:,.0f}-{row.fastest:,.0f}",
                f"{row.p50:.2f}",
                f"{row.p99:.2f}",
                "" if row.ratio is None else f"x {row.ratio:.2f}",
                f"{row.load:.0%}",
                row.reconnects,
            )
        )
    return "\n".join(lines)


def ordered(rows: Sequence[Row]) -> list[Row]:
    """By mode, as they came, then the fastest first."""
    modes = list(dict.fromkeys(row.sessions for row in rows))
    return sorted(rows, key=lambda row: (modes.index(row.sessions), -row.rate))


# --- the chart ------------------------------------------------------------------------------------


def chart(rows: Sequence[Row]) -> str:
    """Bars of calls per second, each with a line from its slowest to its fastest round."""
    scale = (_WIDTH - _LEFT - 90) / max(row.fastest for row in rows)
    parts: list[str] = []
    y, mode = 0, ""
    for row in ordered(rows):
        if row.sessions != mode:
            mode = row.sessions
            y += _HEADING
            parts.append(_text(10, y - 8, f"calls per second, {mode}", weight="bold"))
        parts += _bar(row, y, scale)
        y += _BAR + _GAP
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {y + 10}" '
        'font-family="system-ui, sans-serif" font-size="12">'
    )
    ground = f'<rect width="{_WIDTH}" height="{y + 10}" fill="#ffffff"/>'
    return "\n".join([head, ground, *parts, "</svg>", ""])


def _bar(row: Row, y: int, scale: float) -> list[str]:
    color = _PEER if row.is_peer else _OURS if row.name.startswith("ours") else _BARE
    middle, length = y + _BAR / 2, row.rate * scale
    low, high = _LEFT + row.slowest * scale, _LEFT + row.fastest * scale
    return [
        _text(_LEFT - 8, middle + 4, row.title, anchor="end"),
        f'<rect x="{_LEFT}" y="{y}" width="{length:.1f}" height="{_BAR}" fill="{color}"/>',
        f'<path d="M{low:.1f} {middle}H{high:.1f}" stroke="#222222"/>',
        _text(high + 6, middle + 4, f"{row.rate:,.0f}"),
    ]


def _text(x: float, y: float, words: str, anchor: str = "start", weight: str = "normal") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-weight="{weight}" '
        f'fill="#222222">{escape(words)}</text>'
    )

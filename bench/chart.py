"""The chart of a benchmark, as SVG: a bar for each row, a panel for each group."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from measuring import Row

_COLORS = {"ours": "#2563a8", "peer": "#c2713a", "bound": "#9aa3ad"}

_BAR, _GAP, _HEADING = 16, 7, 34
_LEFT, _WIDTH, _RIGHT = 330, 930, 90


def chart(panels: Mapping[str, Sequence[Row]]) -> str:
    """Bars of the medians of each row's first quantity, with a line from lowest to highest."""
    parts: list[str] = []
    y = 0
    for group, rows in panels.items():
        y += _HEADING
        parts.append(_text(10, y - 8, f"{rows[0].first}, {group}", weight="bold"))
        quantity = rows[0].first
        highest = max(max(row.figures[quantity]) for row in rows)
        scale = (_WIDTH - _LEFT - _RIGHT) / (highest or 1)
        for row in rows:
            parts += _bar(row, quantity, y, scale)
            y += _BAR + _GAP
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {y + 10}" '
        'font-family="system-ui, sans-serif" font-size="12">'
    )
    ground = f'<rect width="{_WIDTH}" height="{y + 10}" fill="#ffffff"/>'
    return "\n".join([head, ground, *parts, "</svg>", ""])


def _bar(row: Row, quantity: str, y: int, scale: float) -> list[str]:
    values, value = row.figures[quantity], row.median(quantity)
    middle, length = y + _BAR / 2, max(0.0, value * scale)
    low, high = (max(0.0, _LEFT + end(values) * scale) for end in (min, max))
    return [
        _text(_LEFT - 8, middle + 4, row.title, anchor="end"),
        f'<rect x="{_LEFT}" y="{y}" width="{length:.1f}" height="{_BAR}" '
        f'fill="{_COLORS[row.kind]}"/>',
        f'<path d="M{low:.1f} {middle}H{high:.1f}" stroke="#222222"/>',
        _text(high + 6, middle + 4, f"{value:,.0f}" if abs(value) >= 100 else f"{value:.2f}"),
    ]


def _text(x: float, y: float, words: str, anchor: str = "start", weight: str = "normal") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-weight="{weight}" '
        f'fill="#222222">{escape(words)}</text>'
    )

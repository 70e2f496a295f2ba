"""The frame of every benchmark: its options, what it shows while it runs, what it leaves.

A benchmark measures alternatives in rounds, one after the other in each round, so that two figures
of the same round were taken under the same conditions. `Row` has the figures of one alternative,
`Finding` compares two of them round by round.
"""

from __future__ import annotations

import argparse
import os
import platform
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Literal, TypeVar

import msgspec
from chart import chart
from machine import usage

HERE = Path(__file__).resolve().parent

#: Where results go, unless somebody says otherwise.
RESULTS = HERE / "results"

#: How long the machine is looked at before a measurement, and how busy counts as idle.
LOOK = 0.2
CALM = 0.1


class Wrong(Exception):
    """An answer that is not the right one. Voids the run."""


# --- what comes out ------------------------------------------------------------------------------


class Row(msgspec.Struct):
    """The figures of one alternative: for each quantity, its unit included, a value a round.

    Rows of one `group` are alternatives to each other. The first quantity is the one of the chart.
    `missing` says why there are no figures of a quantity that others have.
    """

    group: str
    name: str
    title: str
    kind: Literal["ours", "peer", "bound"] = "ours"
    figures: dict[str, list[float]] = {}
    missing: dict[str, str] = {}

    def add(self, figures: Mapping[str, float]) -> None:
        """The figures of one more round."""
        for quantity, value in figures.items():
            self.figures.setdefault(quantity, []).append(round(value, 4))

    def median(self, quantity: str) -> float:
        """The median of the rounds."""
        return median(self.figures[quantity])

    @property
    def first(self) -> str:
        """The quantity that matters most."""
        return next(iter(self.figures))


class Finding(msgspec.Struct):
    """What the run shows, a value a round; a ratio where it has no unit.

    `at_least` or `at_most` is what is wanted of it, if anything is.
    """

    what: str
    values: list[float]
    unit: str = ""
    at_least: float | None = None
    at_most: float | None = None

    @property
    def value(self) -> float:
        """The median of the rounds."""
        return median(self.values)

    @property
    def shown(self) -> str:
        """The median, and the lowest and the highest of the rounds."""
        spread = f" ({number(min(self.values))} to {number(max(self.values))})"
        return f"{number(self.value)} {self.unit}".rstrip() + (spread if self.values[1:] else "")

    @property
    def wanted(self) -> str:
        """What is wanted."""
        if self.at_least is not None:
            return f"at least {number(self.at_least)}"
        return "" if self.at_most is None else f"at most {number(self.at_most)}"

    @property
    def verdict(self) -> str:
        """Whether it is what is wanted."""
        if not self.wanted:
            return ""
        low = self.at_least is not None and self.value < self.at_least
        high = self.at_most is not None and self.value > self.at_most
        return "missed" if low or high else "reached"


class Document(msgspec.Struct):
    """What is written. `others` is the share of the CPUs that something else used, at the worst."""

    benchmark: str
    title: str
    date: str
    machine: str
    python: str
    conditions: dict[str, str]
    seconds: float
    others: float
    rows: list[Row]
    findings: list[Finding]


def number(value: float) -> str:
    """A figure with about three digits."""
    size = abs(value)
    return f"{value:,.0f}" if size >= 100 else f"{value:.1f}" if size >= 10 else f"{value:.2f}"


def compared(row: Row, base: Row, quantity: str | None = None) -> list[float]:
    """The ratio of two rows, round by round."""
    name = quantity or row.first
    pairs = zip(row.figures[name], base.figures[name], strict=True)
    return [value / other if other else 0.0 for value, other in pairs]


def differences(row: Row, base: Row, quantity: str | None = None) -> list[float]:
    """The difference of two rows, round by round."""
    name = quantity or row.first
    return [v - o for v, o in zip(row.figures[name], base.figures[name], strict=True)]


def groups(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows of each group that has figures, as they came."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        if row.figures:
            found.setdefault(row.group, []).append(row)
    return found


def table(rows: Sequence[Row], findings: Sequence[Finding]) -> str:
    """All figures as text: medians, and the spread of the first quantity."""
    lines: list[str] = []
    for group, members in groups(rows).items():
        quantities = list(dict.fromkeys(name for row in members for name in row.figures))
        lines += ["", f"{group:<52}" + "".join(f"{name:>20}" for name in quantities)]
        for row in members:
            cells = [spread(row, name) for name in quantities]
            lines.append(f"  {row.title:<50}" + "".join(f"{cell:>20}" for cell in cells))
        lines += reasons(members)
    lines += [""] if findings else []
    for one in findings:
        wanted = f"; wanted {one.wanted}: {one.verdict}" if one.wanted else ""
        lines.append(f"{one.what}: {one.shown}{wanted}")
    return "\n".join(lines)


def spread(row: Row, quantity: str) -> str:
    """A median; with the lowest and the highest of the rounds where it is the first quantity."""
    if quantity not in row.figures:
        return "-" if quantity in row.missing else ""
    values = row.figures[quantity]
    shown = number(median(values))
    if quantity == row.first and values[1:]:
        shown += f" ({number(min(values))}-{number(max(values))})"
    return shown


def reasons(rows: Sequence[Row]) -> list[str]:
    """Why figures are missing, a sentence for each."""
    return [f"{row.title}, {name}: {why}." for row in rows for name, why in row.missing.items()]


# --- the run -------------------------------------------------------------------------------------


class Options(argparse.Namespace):
    """What every benchmark is told."""

    name: str
    rounds: int
    seconds: float
    quick: bool
    json: Path | None


GivenOptions = TypeVar("GivenOptions", bound=Options)


def options_parser(
    name: str, what: str | None, rounds: int, seconds: float
) -> argparse.ArgumentParser:
    """The options that all have; the first line of `what` is for the help."""
    about = (what or "").partition("\n")[0]
    it = argparse.ArgumentParser(prog=f"bench/{name}", description=about)
    it.add_argument("--rounds", type=int, default=rounds, metavar="N", help="(%(default)s)")
    it.add_argument(
        "--seconds", type=float, default=seconds, metavar="S", help="a measurement (%(default)s)"
    )
    it.add_argument("--quick", action="store_true", help="one short round: whether it works")
    it.add_argument("--json", type=Path, metavar="FILE", help="(bench/results/NAME.json)")
    it.set_defaults(name=name)
    return it


class Run:
    """A benchmark while it runs: says what is measured and how long that will take."""

    def __init__(self, title: str, options: Options, steps: int, seconds: float) -> None:
        self.title = title
        self.options = options
        self.others = 0.0
        self._steps = steps
        self._done = 0
        self._began = time.monotonic()
        self._seconds = steps * (seconds + LOOK)
        self.show(f"{title}: {steps} measurements, about {_minutes(self._seconds)}")

    def step(self, line: str) -> None:
        """The next measurement begins; looks how busy the machine is without it."""
        self.others = max(self.others, usage(LOOK))
        passed = time.monotonic() - self._began
        share = self._done / self._steps
        left = passed / share - passed if share > 0.1 else self._seconds - passed
        self._done += 1
        self.show(f"{self._done}/{self._steps}, {_minutes(max(0.0, left))} left: {line}")

    def finish(
        self, rows: Sequence[Row], findings: Sequence[Finding], **conditions: object
    ) -> Document:
        """Everything that is written."""
        if sys.stderr.isatty():
            print("\r\033[K", end="", file=sys.stderr, flush=True)
        return Document(
            benchmark=self.options.name,
            title=self.title,
            date=time.strftime("%Y-%m-%d"),
            machine=f"{_processor()}, {len(os.sched_getaffinity(0))} cores",
            python=platform.python_version(),
            conditions={name: str(value) for name, value in conditions.items()},
            seconds=round(time.monotonic() - self._began),
            others=round(self.others, 3),
            rows=[row for row in rows if row.figures],
            findings=[one for one in findings if one.values],
        )

    def show(self, line: str) -> None:
        """Progress, on a terminal in one line."""
        if sys.stderr.isatty():
            print(f"\r\033[K{line[:100]}", end="", file=sys.stderr, flush=True)
        else:
            print(line, file=sys.stderr, flush=True)


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"


def _processor() -> str:
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        models = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    return models[0] if models else platform.machine()


def carry_out(
    benchmark: Callable[[GivenOptions], Document],
    parser: argparse.ArgumentParser,
    options: GivenOptions,
) -> int:
    """Measures, prints, writes JSON and a chart; a wrong answer, or none, voids it all.

    A SIGTERM ends what the benchmark has started, too.
    """
    signal.signal(signal.SIGTERM, lambda signum, frame: sys.exit(128 + signum))
    parser.parse_args(namespace=options)
    if options.quick:
        options.rounds, options.seconds = 1, min(options.seconds, 0.5)
    try:
        document = benchmark(options)
    except (Wrong, OSError) as error:
        print(f"\nvoid: {error}", file=sys.stderr)
        return 1
    print(table(document.rows, document.findings))
    if document.others > CALM:
        print(f"Something else used up to {document.others:.0%} of the CPUs: do not trust this.")
    path = options.json or RESULTS / f"{options.name}{'-quick' * options.quick}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(msgspec.json.format(msgspec.json.encode(document), indent=2) + b"\n")
    path.with_suffix(".svg").write_text(chart(groups(document.rows)), encoding="utf-8")
    return 0

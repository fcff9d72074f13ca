"""The figures in tables of docs/results.md, memory.md and experts.md are those of the files that their sections name.

All figures of a row with three digits or more must stand in one measured row of a file, rounded as they are printed.
Columns that are worked out from others are listed here and left out.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
#: Each with the fewest rows that it has.
PAGES = {"results.md": 50, "memory.md": 50, "experts.md": 14}

#: Printed units: as measured, per cent, thousandths, and bytes as GiB, MiB and MB.
UNITS = (1, 100, 1e-3, 2**-30, 2**-20, 1e-6)
#: Columns worked out from others, or not ours.
DERIVED = re.compile(
    r"steps|seconds on the GPU|layer passes forward|of its end-to-end row|of `continued`"
    r"|B x step / end to end|released code.*|times faster|aim, ms|\d+ steps per switch|against all resident.*|50"
)
#: Tables whose cells are runs of their own: those with one of these columns.
RUNS = re.compile(r"\d+ epochs|calls|guidance.*")
#: Figures of another row: the teacher is the network of twelve layers.
ELSEWHERE = {("end to end (the teacher)", "11.4")}


def _figures(cell: str) -> list[str]:
    cell = re.sub(r"\(aim [^)]*\)", "", cell)
    found = re.findall(r"(?<![\w.^-])\d[\d,]*(?:\.\d+)?(?![\w])", cell)
    return [figure for figure in found if len(re.sub(r"[,.]", "", figure).lstrip("0")) >= 3]


def _numbers(value: Any) -> Iterator[float]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for part in value:
            yield from _numbers(part)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield value


def _measured(value: Any) -> Iterator[list[float]]:
    """Yield the numbers of every object of a file, those inside it among them."""
    if isinstance(value, dict):
        yield list(_numbers(value))
    for part in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _measured(part)


def _stands(figure: str, numbers: list[float]) -> bool:
    within = 0.5005 * 10 ** -len(figure.partition(".")[2])
    printed = float(figure.replace(",", ""))
    return any(abs(number * unit - printed) <= within for number in numbers for unit in UNITS)


@functools.cache
def _objects(file: str) -> list[list[float]]:
    every = _measured(json.loads((ROOT / "benchmarks" / "results" / file).read_text()))
    return [numbers for numbers in every if 2 <= len(numbers) < 200]


def _rows(page: str) -> Iterator[tuple[str, tuple[str, ...], list[list[str]]]]:
    """Yield (name, files of the section, groups of figures that were measured together) of every row of a table."""
    for section in re.split(r"(?m)^(?=##+ )", (ROOT / "docs" / page).read_text()):
        files = tuple(sorted(set(re.findall(r"benchmarks/results/(\w+\.json)", section))))
        header: list[str] = []
        for line in section.splitlines() if files else ():
            name, *cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] or [""]
            if not line.startswith("|"):
                header = []
            elif not header:
                header = [name, *cells]
            elif not name.startswith(("---", "paper", "aim")):
                kept = [cell for cell, column in zip(cells, header[1:], strict=True) if not DERIVED.fullmatch(column)]
                found = [[f for f in _figures(cell) if (name, f) not in ELSEWHERE] for cell in kept]
                apart = any(RUNS.fullmatch(column) for column in header)
                yield name, files, found if apart else [[figure for group in found for figure in group]]


def _missing(figures: list[str], files: tuple[str, ...]) -> list[str]:
    """Return those of the figures that do not stand in the measured row that has most of them."""
    fewest = figures
    for numbers in (numbers for file in files for numbers in _objects(file)):
        missing = [figure for figure in figures if not _stands(figure, numbers)]
        fewest = min(fewest, missing, key=len)
        if not fewest:
            break
    return fewest


@pytest.mark.parametrize("page", PAGES)
def test_a_rows_figures_were_measured_together(page: str) -> None:
    rows = list(_rows(page))
    assert len(rows) >= PAGES[page]
    wrong = [(name, missing) for name, files, groups in rows for group in groups if (missing := _missing(group, files))]
    assert not wrong


def test_a_slip_would_be_found() -> None:
    files = ("memory.json",)
    assert not _missing(["19.74", "81.2", "74.7"], files)
    assert _missing(["19.47", "81.2", "74.7"], files) == ["19.47"]
    assert _missing(["10.01", "81.2"], files)  # of two rows

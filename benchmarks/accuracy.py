"""Writes the accuracy of the planner into docs/planner-accuracy.md: `python -m benchmarks.accuracy` (ten minutes).

The tables have the planned and the simulated peak of every case of `benchmarks.planner` and
`benchmarks.planner_phases`. `--check` measures and writes nothing: it exits with 1 when planned numbers differ from
those in the tables.
"""

from __future__ import annotations

import argparse
import re
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from benchmarks import planner, planner_phases
from benchmarks.planner import Case, Comparison

DOCS = Path(__file__).parents[1] / "docs" / "planner-accuracy.md"
_SECTION = "<!-- accuracy: python -m benchmarks.accuracy -->"
_END = "<!-- end of accuracy -->"
_CELL = re.compile(r"([\d.]+) / [\d.]+, [+-][\d.]+ %")
_TITLES = (
    "A ranking step of one prompt with five responses, at full depth",
    f"Everything else, cut to {planner_phases.LAYERS} layers",
)


def tables(found: Sequence[Sequence[Comparison]]) -> str:
    """Markdown tables with models in columns and policies in rows."""
    parts = []
    for title, comparisons in zip(_TITLES, found, strict=True):
        models = list(dict.fromkeys(one.model for one in comparisons))
        cells = {(one.model, one.policy): _cell(one) for one in comparisons}
        policies = dict.fromkeys(one.policy for one in comparisons)
        lines = [f"| {title} | {' | '.join(models)} |", "|---" * (len(models) + 1) + "|"]
        lines += [f"| {policy} | {' | '.join(cells[model, policy] for model in models)} |" for policy in policies]
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _cell(one: Comparison) -> str:
    return f"{one.planned_bytes / 1e9:.3f} / {one.measured_bytes / 1e9:.3f}, {100 * one.peak:+.1f} %"


def stale(text: str, cases: Iterable[Case]) -> Iterator[str]:
    """A message for each case whose planned bytes differ from the tables or are missing there."""
    planned: dict[tuple[str, str], str] = {}
    models: list[str] = []
    for line in text.partition(_SECTION)[2].partition(_END)[0].splitlines():
        first, *rest = [cell.strip() for cell in line.strip("|").split("|")]
        if first in _TITLES:
            models = rest
        for model, cell in zip(models, rest, strict=False):
            if (number := _CELL.fullmatch(cell)) is not None:
                planned[model, first] = number[1]
    for case in cases:
        now, then = f"{case.planned_bytes / 1e9:.3f}", planned.pop((case.model, case.policy), "nothing")
        if now != then:
            yield f"{case.model}, {case.policy}: {now} GB planned, but the docs have {then}"
    yield from (f"{model}, {policy}: this case does not exist any more" for model, policy in planned)


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="Measure and write nothing.")
    options = parser.parse_args(arguments)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    if options.check:
        wrong = list(stale(DOCS.read_text("utf-8"), [*planner.all_cases(), *planner_phases.all_cases()]))
        print("\n".join(wrong) if wrong else "docs/planner-accuracy.md is up to date")
        return 1 if wrong else 0
    found = [planner.measured(cases) for cases in (planner.all_cases(), planner_phases.all_cases())]
    before, _, rest = DOCS.read_text("utf-8").partition(_SECTION)  # now: measuring takes a while
    after = rest.partition(_END)[2]
    DOCS.write_text(f"{before}{_SECTION}\n\n{tables(found)}\n\n{_END}{after}", encoding="utf-8")
    return 0 if all(one.holds for comparisons in found for one in comparisons) else 1


if __name__ == "__main__":
    sys.exit(main())

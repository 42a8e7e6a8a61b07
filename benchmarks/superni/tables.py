"""The tables of the experiment in Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.superni.analysis import (
    ENDED,
    EXACT,
    ROUGE,
    WORDS,
    by_seed,
    compare,
    estimate,
    instances,
    values,
)
from benchmarks.superni.arms import ARMS, BASE
from benchmarks.superni.rows import Row, best_rate, held_out, macro

_SPLITS = {"seen": "New instances of the training tasks (primary)", "unseen": "Unseen tasks (secondary)"}


def markdown(rows: Sequence[Row]) -> str:
    """All tables for what has been measured."""
    parts = []
    for split, title in _SPLITS.items():
        parts += [f"### {title}", _scores(rows, split), _comparisons(rows, split)]
    return "\n\n".join([*parts, "### What else changed", _others(rows), "### Learning rates", _rates(rows)])


def _measured(rows: Sequence[Row]) -> list[str]:
    return [name for name in (BASE, *ARMS) if held_out(rows, name)]


def _label(name: str) -> str:
    return ARMS[name].label if name in ARMS else "base"


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    marks = "|".join(["---", *["---:"] * (len(head) - 1)])
    return "\n".join([f"| {' | '.join(head)} |", f"|{marks}|", *(f"| {' | '.join(line)} |" for line in lines)])


def _scores(rows: Sequence[Row], split: str) -> str:
    lines = []
    for name in _measured(rows):
        own = held_out(rows, name)
        rouge, exact = (estimate(instances(own, split, metric)) for metric in (ROUGE, EXACT))
        words, ended = (estimate(instances(own, split, metric)).value for metric in (WORDS, ENDED))
        seeds = " ".join(f"{value:.1f}" for value in by_seed(rows, name, split)) if len(own) > 1 else ""
        lines.append([_label(name), str(rouge), str(exact), f"{words:.1f}", f"{ended:.0%}", seeds])
    first = held_out(rows, BASE)
    n = estimate(instances(first, split, ROUGE)) if first else None
    head = f"{n.instances} instances of {n.tasks} tasks" if n else ""
    return _table([head, "ROUGE-L", "exact match", "words", "ended", "by seed"], lines)


def _comparisons(rows: Sequence[Row], split: str) -> str:
    lines = []
    for primary in (True, False):
        for one in compare(rows, split, primary=primary):
            p = f"{one.p:.3f}" if one.p >= 0.001 else "<0.001"
            verdict = one.verdict if primary else f"{one.verdict} (exploratory)"
            lines.append([_label(one.arm), _label(one.against), one.difference.signed(), p, verdict])
    return _table(["arm", "against", "difference in ROUGE-L", "p, corrected", "verdict"], lines)


def _others(rows: Sequence[Row]) -> str:
    lines = []
    for name in _measured(rows):
        found = [values(rows, name, key) for key in ("kl", "pair_accuracy", "lmentry")]
        trained = [row for row in rows if row["what"] == "validation" and row["arm"] == name]
        cost = ["", "", ""]
        if trained:
            own = [row for row in trained if row["rate"] == best_rate(rows, name)]
            cost = [
                "+".join(map(str, own[0]["steps"])),
                f"{max(row['seconds'] for row in own):.0f}",
                f"{max(row['peak_gib'] for row in own):.2f}",
            ]
        formats = ("{:.3f}", "{:.3f}", "{:.1f}")
        cells = ["" if value is None else form.format(value) for value, form in zip(found, formats, strict=True)]
        lines.append([_label(name), *cells, *cost])
    return _table(["", "KL to the base", "pair accuracy", "LMentry", "steps", "seconds", "peak GiB"], lines)


def _rates(rows: Sequence[Row]) -> str:
    lines = []
    for name in ARMS:
        tried = {
            row["rate"]: macro(row["scores"])
            for row in rows
            if row["what"] == "validation" and row["arm"] == name and row["seed"] == 0
        }
        if tried:
            best = best_rate(rows, name)
            cells = [f"{rate:g}: {value:.1f}{' (chosen)' * (rate == best)}" for rate, value in sorted(tried.items())]
            lines.append([_label(name), ", ".join(cells)])
    return _table(["", "ROUGE-L on validation"], lines)

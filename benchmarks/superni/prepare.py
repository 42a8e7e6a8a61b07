"""Sets, own samples and ranked lists, and what teachers are worth; all in one work folder, resumable."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.superni import lists
from benchmarks.superni.sets import deal, read_instances, write_sets
from benchmarks.superni.sizes import Sizes
from tuna_peft.errors import UserError
from tuna_peft.files import write_json
from tuna_peft.json_text import read_json
from tuna_peft.models.base.load import Base, load_base, make_quantization_config, resolve_device, resolve_dtype

PREPARED, TEACHERS = "prepared.json", "teachers.json"


@dataclasses.dataclass(frozen=True)
class Prepared:
    """What `prepare` has written into the work folder.

    Attributes:
        work: The folder.
        model, quantization: Of the base.
        sizes: Of the experiment.
        samples: Counts and grades of the contextual samples, see `lists.write_graded`.
    """

    work: Path
    model: str
    quantization: str
    sizes: Sizes
    samples: dict[str, Any]

    @classmethod
    def read(cls, work: Path) -> Prepared:
        """Reads `prepared.json`.

        Raises:
            UserError: `prepare` has not ended in this folder.
        """
        if not (work / PREPARED).is_file():
            fix = "Run `python -m benchmarks.superni prepare` first."
            raise UserError("nothing is prepared here", where=str(work), fix=fix)
        stored = read_json(work / PREPARED)
        sizes = stored.pop("sizes")
        return cls(work=work, sizes=Sizes(**{**sizes, "rates": tuple(sizes["rates"])}), **stored)

    def write(self) -> None:
        """Writes `prepared.json`."""
        stored = dataclasses.asdict(self)
        del stored["work"]
        write_json(self.work / PREPARED, stored)

    def base(self) -> Base:
        """The base, loaded as runs load it."""
        compute = resolve_dtype("auto", resolve_device())
        config = make_quantization_config(self.quantization, compute_dtype=compute)
        return load_base(self.model, quantization_config=config)

    def file(self, name: str) -> Path:
        """The data set `name`, such as `contextual-lists`."""
        return self.work / f"{name}.jsonl"


def prepare(work: Path, data: Path, model: str, quantization: str, sizes: Sizes) -> Prepared:
    """Deals out the sets and makes the ranked lists that all arms learn from.

    Args:
        work: Folder to write to.
        data: Folder with `superni/`, see `sets.read_instances`.
    """
    prepared = Prepared(work, model, quantization, sizes, {})
    base = prepared.base()
    write_sets(deal(*read_instances(data / "superni"), base.tokenizer, sizes), work)
    rows = lists.samples(base, work, "contextual", sizes)
    prepared = dataclasses.replace(prepared, samples=lists.write_graded(rows, work, "contextual"))
    prepared.write()
    return prepared


def compare_teachers(prepared: Prepared, others: Sequence[str], prompts: int | None) -> dict[str, Any]:
    """Measures teachers, and lets the best one rank the probabilistic lists if it is good enough.

    Args:
        others: Models on this machine, besides the base itself with and without the reference in its context.
        prompts: Compare on the first N prompts; None for all. Without all of them no lists are made.

    Returns:
        `{"teachers": {name: {"share", "low", "high", "pairs", "prompts"}}, "chosen": name or None, "lists": number}`,
        which is also written to `teachers.json`.
    """
    work, base = prepared.work, prepared.base()
    rows = lists.samples(base, work, "agreement", prepared.sizes, limit=prompts)
    journal = work / "journals" / "teachers.jsonl"
    found: dict[str, Any] = {}
    for teacher in (lists.WITH_REFERENCE, lists.ITSELF, *others):
        measured = lists.agreement(lists.teacher_scores(teacher, rows, base, journal), rows)
        share = measured.share
        interval = {"share": share.value, "low": share.low, "high": share.high}
        found[teacher] = {**interval, "pairs": share.count, "prompts": measured.prompts}
    best = max(found, key=lambda teacher: found[teacher]["share"] or 0.0)
    chosen = best if (found[best]["share"] or 0.0) >= lists.LEAST_AGREEMENT else None
    result = {"teachers": found, "chosen": chosen, "lists": 0}
    if chosen and prompts is None:
        rows = lists.samples(base, work, "probabilistic", prepared.sizes)
        scores = lists.teacher_scores(chosen, rows, base, journal)
        result["lists"] = lists.write_scored(scores, rows, work, "probabilistic")
    write_json(work / TEACHERS, result)
    return result

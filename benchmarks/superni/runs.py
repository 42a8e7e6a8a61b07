"""The runs of the experiment: each arm trained as a recipe and measured, one JSON line each, resumable."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from benchmarks.learning import append, read
from benchmarks.superni.arms import ARMS, BASE, FEW_GOLD, LISTS, OWN_LISTS, RAFT, REFERENCE_ARM, Stage
from benchmarks.superni.lists import GRADER, TEMPERATURE, samples, write_graded
from benchmarks.superni.measures import Measures
from benchmarks.superni.prepare import Prepared
from benchmarks.superni.rows import Row, best_rate, held_out, leader, next_rate
from benchmarks.superni.sets import CHAT
from benchmarks.superni.sizes import SEARCH
from tuna_peft.data.config import DataSource
from tuna_peft.data.load import encode_source
from tuna_peft.files import sha256
from tuna_peft.journal import content_key
from tuna_peft.models.base.load import load_config_and_tokenizer, resolve_model_path
from tuna_peft.models.base.stored_weights import safetensors_files, weights_fingerprint
from tuna_peft.models.stack.any_model import load_any_model
from tuna_peft.planning.flops import forward_flops, ranking_flops
from tuna_peft.planning.lengths import encoded_workload
from tuna_peft.planning.memory import Adapter
from tuna_peft.planning.shapes import ModelShape
from tuna_peft.planning.workload import Row as Lengths
from tuna_peft.planning.workload import Workload
from tuna_peft.recipe.schema import Recipe
from tuna_peft.recipe.train_fields import check_train
from tuna_peft.run.pipeline import run_recipe

LORA = {"r": 16, "alpha": 32, "target_modules": "all-linear"}
MAX_LENGTH = 512
_TRAIN = {
    "lr_scheduler_type": "cosine", "warmup_steps": 0.05, "max_length": MAX_LENGTH, "gradient_checkpointing": False,
    "logging_steps": 5, "save_strategy": "steps", "save_steps": 20,
}  # fmt: skip


class Runs:
    """The runs of one work folder; `rows.jsonl` has a line for each that ended.

    Rows of other data, sizes, settings or weights than the present ones stay in the file and do not count.

    Args:
        prepared: See `prepare.prepare`.
        data: Folder with `ranked/` and `lmentry/`, see `Measures`.
    """

    def __init__(self, prepared: Prepared, data: Path):
        self.prepared, self.sizes, self.measures = prepared, prepared.sizes, Measures(prepared, data)
        self.file = prepared.work / "rows.jsonl"
        self._data_hashes: dict[str, str | None] = {}
        self.rows: list[Row] = [row for row in read(self.file) if self._is_current(row)]

    def run(self, names: Sequence[str]) -> None:
        """The protocol's order: the base, the deciding arms, the leaders' further seeds, the other arms."""
        self._base()
        names = [name for name in names if self._possible(name)]
        deciding = [name for name in names if ARMS[name].decides]
        for name in deciding:
            self._search(name)
        leading = {RAFT, leader(self.rows)} & set(names)
        for seed in range(1, self.sizes.seeds):
            for name in sorted(leading):
                self._trained(name, best_rate(self.rows, name), seed, measure=True)
        for name in names:
            if name not in deciding:
                self._search(name)

    def _possible(self, name: str) -> bool:
        """Whether the arm's data is there and its settings are known; prints why not."""
        needed = [one.data for one in ARMS[name].stages if one.data != OWN_LISTS]  # which are made in time
        missing = [f"no {one}" for one in needed if not self.prepared.file(one).is_file()]
        unknown = [f"{key}: {what}" for one in ARMS[name].stages for key, what, _ in check_train(one.type, one.train)]
        if missing or unknown:
            print(f"{name}: not run ({'; '.join(missing + unknown)})", flush=True)
        return not missing + unknown

    def _search(self, name: str) -> None:
        """One run for each learning rate, then the held-out measures of the best; first the arms it has rates of."""
        for other in {stage.rate_of for stage in ARMS[name].stages if stage.rate_of}:
            self._search(other)
        while (rate := next_rate(self.rows, name, self.sizes)) is not None:
            self._trained(name, rate, 0)
        self._trained(name, best_rate(self.rows, name), 0, measure=True)

    def _base(self) -> None:
        key = {"arm": BASE, "rate": None, "rates": [], "seed": 0, "hash": self._hash(BASE, [], 0)}
        if not self._has("held-out", key):
            base = self.prepared.base()
            self._measure(key, base.model, base.tokenizer)

    def _trained(self, name: str, rate: float, seed: int, *, measure: bool = False) -> None:
        """Trains an arm and measures it on validation; with `measure`, also on the held-out sets."""
        if any(stage.data == OWN_LISTS for stage in ARMS[name].stages):
            self._own_lists()
        rates = [best_rate(self.rows, stage.rate_of) if stage.rate_of else rate for stage in ARMS[name].stages]
        key = {"arm": name, "rate": rate, "rates": rates, "seed": seed, "hash": self._hash(name, rates, seed)}
        folder = self._folder(key)
        if not self._has("validation", key):
            stages = [self._stage(index, rates[index], stage) for index, stage in enumerate(ARMS[name].stages)]
            report = run_recipe(self.recipe(stages, seed), folder)
            loaded = load_any_model(str(folder))
            scores = self.measures.answers(loaded.model, loaded.tokenizer, "validation")
            trained = report["stages"].values()
            row: Row = {"what": "validation", **key}
            row |= {"steps": [one["steps"] for one in trained], "losses": [one["train_loss"] for one in trained]}
            row |= {"seconds": sum(one["seconds"] for one in trained)}
            row |= {"peak_gib": max(one["peak_memory_gib"] for one in trained)}
            self._append({**row, "dtype": str(loaded.model.dtype), "scores": scores})
            for checkpoint in folder.glob("stages/*/checkpoint-*"):
                shutil.rmtree(checkpoint)
        if measure and not self._has("held-out", key):
            loaded = load_any_model(str(folder))
            self._measure(key, loaded.model, loaded.tokenizer)

    def _folder(self, key: Row) -> Path:
        return self.prepared.work / "runs" / f"{key['arm']}-{key['rate']:g}-{key['seed']}-{key['hash'][:8]}"

    def _own_lists(self) -> None:
        """Samples from the model of `FEW_GOLD`, seed 0, and ranks them by the grader, once."""
        if not self.prepared.file(OWN_LISTS).is_file():
            [key] = [row for row in held_out(self.rows, FEW_GOLD) if row["seed"] == 0]
            loaded = load_any_model(str(self._folder(key)))
            own = samples(loaded, self.prepared.work, "contextual", self.sizes, journal=FEW_GOLD)
            print(FEW_GOLD, write_graded(own, self.prepared.work, FEW_GOLD), flush=True)

    def _measure(self, key: Row, model: Any, tokenizer: Any) -> None:
        seen, unseen = (self.measures.answers(model, tokenizer, name) for name in ("seen", "unseen"))
        others = self.measures.others(model, tokenizer)
        self._append({"what": "held-out", **key, "seen": seen, "unseen": unseen, **others})

    def _has(self, what: str, key: Row) -> bool:
        return any(row["what"] == what and row["hash"] == key["hash"] for row in self.rows)

    def _append(self, row: Row) -> None:
        self.rows.append(row)
        append(self.file, row, without=("scores", "seen", "unseen"))

    def _is_current(self, row: Row) -> bool:
        known = row["arm"] == BASE or row["arm"] in ARMS
        return known and row["hash"] == self._hash(row["arm"], row["rates"], row["seed"])

    def _hash(self, name: str, rates: list[float], seed: int) -> str:
        """Names everything that a run depends on; a run with another hash is another run."""
        stages = ARMS[name].stages if name != BASE else ()
        data = {"seen", "unseen", "validation", *(LISTS if stage.rounds > 1 else stage.data for stage in stages)}
        sizes = {key: value for key, value in dataclasses.asdict(self.sizes).items() if key not in SEARCH}
        return content_key(
            stages=[dataclasses.asdict(stage) for stage in stages], rates=rates, seed=seed, common=_TRAIN,
            lora=LORA, sizes=sizes, quantization=self.prepared.quantization,
            weights=self._fingerprint, data={one: self._data_hash(one) for one in sorted(data)},
        )  # fmt: skip

    def _data_hash(self, name: str) -> str | None:
        if name not in self._data_hashes:
            file = self.prepared.file(name)
            self._data_hashes[name] = sha256(file) if file.is_file() else None
        return self._data_hashes[name]

    @cached_property
    def _fingerprint(self) -> str | None:
        return weights_fingerprint(safetensors_files(resolve_model_path(self.prepared.model)))

    # An arm as a recipe

    def recipe(self, stages: Sequence[dict[str, Any]], seed: int) -> Recipe:
        """The recipe of a run: what `tuna-peft run` would take."""
        return Recipe.model_validate(
            {
                "name": "superni", "seed": seed, "base": {"model": self.prepared.model},
                "quantization": {"method": self.prepared.quantization}, "prompt": {"template": "chat"}, "lora": LORA,
                "stages": list(stages), "evaluation": None,
                "export": {"combine": False, "merge": {"enabled": False}, "divergence_prompts": 0},
            }
        )  # fmt: skip

    def _stage(self, index: int, rate: float, stage: Stage) -> dict[str, Any]:
        train = {**_TRAIN, **stage.train, "learning_rate": rate, "max_steps": self.steps(stage)}
        train["per_device_train_batch_size"] = self.sizes.batch
        data: dict[str, Any] = {"path": str(self.prepared.file(stage.data)), "on_bad_row": "skip"}
        rounds: dict[str, Any] = {}
        if stage.rounds > 1:
            prompts = {"path": str(self.prepared.file("contextual")), "format": "alpaca"}
            sample = {
                "n": max(2, self.sizes.samples // stage.rounds), "temperature": TEMPERATURE, "trials": 1,
                "max_new_tokens": self.sizes.sample_tokens,
            }  # fmt: skip
            data = {"prompts": prompts, "sample": sample, "judge": {"function": GRADER}}
            rounds = {"rounds": stage.rounds, "continue_adapter": True}
        return {"name": f"stage{index}", "type": stage.type, "data": data, "train": train, **rounds}

    # Equal FLOPs

    def steps(self, stage: Stage) -> int:
        """Steps of a stage, of each round, that cost as many FLOPs in all as the reference arm's passes."""
        [reference] = ARMS[REFERENCE_ARM].stages
        lists = self._workload(reference).total
        budget = self.sizes.epochs * lists / self.sizes.batch * self.flops(reference)
        return max(1, round(budget / self.flops(stage) / stage.rounds))

    def flops(self, stage: Stage) -> float:
        """FLOPs of one step, forward and backward, without recomputation."""
        workload, shape = self._workload(stage), self._shape
        adapter = Adapter(LORA["r"], shape.adapter(LORA["r"], LORA["target_modules"]), len(shape.linears))
        trained = ranking_flops(shape, workload, adapter, kept_layers=shape.layers)
        reference = forward_flops(shape, workload.tokens, workload.response_tokens)
        return self.sizes.batch * (trained + stage.reference_passes * reference)

    def _workload(self, stage: Stage) -> Workload:
        """Lengths of the stage's rows; in rounds, of lists with as many samples as each round draws."""
        source = DataSource(path=str(self.prepared.file(stage.data)), on_bad_row="skip")
        config, tokenizer = self._config
        rows, _ = encode_source(
            source, CHAT, tokenizer, config, supervised=stage.type == "sft", max_length=MAX_LENGTH, overflow="skip"
        )
        workload = encoded_workload(rows)
        each = max(2, self.sizes.samples // stage.rounds)
        cut = tuple(Lengths(row.prompt, row.responses[:each]) for row in workload.rows)
        return dataclasses.replace(workload, rows=cut)

    @cached_property
    def _config(self) -> Any:
        return load_config_and_tokenizer(self.prepared.model)

    @cached_property
    def _shape(self) -> ModelShape:
        return ModelShape.from_config(self._config[0].to_dict(), self.prepared.model)

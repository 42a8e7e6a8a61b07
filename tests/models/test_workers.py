"""Work that is split over processes gives the results of one process, in the same order, and its errors."""

from __future__ import annotations

import contextlib
import json
import os
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from tuna_peft import UserError
from tuna_peft.models.workers import Workers, load_for_all, split

COUNT = 3


@contextlib.contextmanager
def powers(model, *, exponent):
    """A unit is a list of numbers; the results say which process has computed them, and with which model."""

    def compute(unit):
        for number in unit:
            if number < 0:
                raise UserError("negative", where=f"unit {number}", fix="Do not.")
            yield number**exponent, int(os.environ.get("RANK", 0)), model.weight.item()

    yield compute


def filled(value):
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.constant_(model.weight, value)
    return SimpleNamespace(model=model)


def process(rank, folder):
    os.environ["RANK"] = str(rank)
    store = dist.FileStore(str(folder / "store"), COUNT)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=COUNT)
    workers, model = Workers(dist.group.WORLD), filled(1.0).model
    found = {}
    if rank:
        workers.follow(model)
    else:
        with workers.lead(model):
            found["seven"] = list(split(model, powers, [[1, 2], [3], [], [4, 5, 6], [7], [8], [9]], exponent=2))
            found["none"] = list(split(model, powers, [], exponent=2))
            found["other"] = list(split(load_for_all(partial(filled, 2.0)).model, powers, [[1], [2]], exponent=1))
            found["unknown"] = list(split(filled(3.0).model, powers, [[1], [2]], exponent=1))
        found["after"] = list(split(model, powers, [[1], [2]], exponent=1))
    # The processes that follow can do it again, until the first one fails: then it ends without a word to them.
    if rank:
        with contextlib.suppress(RuntimeError):
            workers.follow(model)
    else:
        with pytest.raises(UserError, match="negative") as error, workers.lead(model):
            list(split(model, powers, [[1], [-1]], exponent=1))
        found["error"] = [error.value.what, error.value.where, error.value.fix]
        (folder / "found.json").write_text(json.dumps(found))
    os._exit(0)


def test_units_are_shared_out_and_results_come_in_order(tmp_path):
    torch.multiprocessing.spawn(process, args=(tmp_path,), nprocs=COUNT)
    found = json.loads((tmp_path / "found.json").read_text())
    squares = [list(one) for one in split(filled(1.0).model, powers, [range(1, 10)], exponent=2)]
    assert [[value, model] for value, _, model in found["seven"]] == [[value, model] for value, _, model in squares]
    assert [rank for _, rank, _ in found["seven"]] == [0, 0, 1, 0, 0, 0, 1, 2, 0]
    assert found["none"] == []
    assert found["other"] == [[1, 0, 2.0], [2, 1, 2.0]]
    assert found["unknown"] == [[1, 0, 3.0], [2, 0, 3.0]]  # the others do not have this model
    assert found["after"] == [[1, 0, 1.0], [2, 0, 1.0]]
    assert found["error"] == ["negative", "unit -1", "Do not."]

"""The benchmarks run, measure what they say, and refuse to compare what is not the same. No test looks at time."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import adapter_stack, ours, ranking_step, report  # noqa: E402
from benchmarks.agreement import Disagreement, require_agreement  # noqa: E402
from benchmarks.arms import ARMS  # noqa: E402
from benchmarks.flops import counted, limit, parameters_of  # noqa: E402
from benchmarks.memory import LiveBytes  # noqa: E402
from benchmarks.shapes import build, config_of  # noqa: E402
from benchmarks.workloads import LONGEST, SHORTEST, WORKLOADS, Workload  # noqa: E402


def test_workloads_have_the_lengths_they_promise():
    lengths = [
        len(response) for group in WORKLOADS["short-varied"].groups(400, 100) for response in group["completions_ids"]
    ]
    assert min(lengths) >= SHORTEST and max(lengths) <= LONGEST
    assert sum(lengths) / len(lengths) == pytest.approx(200, rel=0.05)
    assert WORKLOADS["long"].groups(1, 100) == WORKLOADS["long"].groups(1, 100)
    assert {len(response) for response in WORKLOADS["long"].groups(1, 100)[0]["completions_ids"]} == {200}


def test_arms_agree_with_the_reference():
    differences = require_agreement(list(ARMS))
    assert set(differences) == {name for name in ARMS if name.startswith("ours")}


def test_disagreement_leaves_no_figures(monkeypatch, capsys):
    whole = ours.loss_of
    monkeypatch.setattr(ours, "_loss", lambda logps, responses: logps.sums_BN.sum())
    assert whole is ours.loss_of
    with pytest.raises(Disagreement, match="ours differs from the reference"):
        require_agreement(["ours"])
    arguments = ["--device", "cpu", "--shape", "tiny", "--workload", "short", "--arms", "reference", "ours"]
    assert ranking_step.main(arguments) == 1
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_live_bytes_match_a_hand_count(device):
    block = 256 * 1024 * 4
    x = torch.zeros(256, 1024, device=device, requires_grad=True)
    with LiveBytes([x]) as live:
        a = x * 2  # one block
        b = a.exp()  # a second, which its backward pass keeps
        assert live.now == 2 * block
        del a  # multiplication by a number keeps nothing of its result
        assert live.now == block
        b.view(-1).detach()  # views: nothing new
        with torch.no_grad():
            x.mul_(1)  # in place, on what was there before
        assert live.now == block
        c = b.exp()
        del b
        assert live.now == 2 * block  # the graph holds on to b
        c.sum().backward()
        # one step back: b, c, and at most the gradients of c and b on top
        assert live.peak <= 4 * block + 1024
        del c
        assert live.now == block  # the gradient of x is left
    assert x.grad is not None


def test_flops_see_through_autograd_functions():
    model = build("tiny", "cpu", quantize=False)
    config, size = config_of("tiny"), parameters_of(config_of("tiny"))
    groups = Workload("flops", prompt=24, mean=16).groups(1, config.vocab_size)  # 104 tokens: no padding
    batch, loss = ours.batch_of(groups), ARMS["ours"].loss(model, "cpu")
    with counted() as flops:
        loss(batch).backward()
    tokens, responses, width = 104, 80, 104
    head = 2 * size.head * (2 * responses + 1)  # forward and gradient; and the position that `generate` would want
    attention = 12 * config.hidden_size * config.num_hidden_layers * width**2
    assert flops.model == 4 * size.body * tokens + 6 * size.adapters * tokens + head + attention
    assert flops.kernel > flops.model > limit(config, groups)


@pytest.mark.parametrize(
    ("device", "arms"), [("cpu", ["reference", "trl-cpo", "ours", "ours-separate-rows"]), ("meta", list(ARMS))]
)
def test_command_writes_and_prints(tmp_path, capsys, device, arms):
    file = tmp_path / "machine.json"
    arguments = ["--device", device, "--shape", "tiny", "--workload", "short", "--repetitions", "1"]
    assert ranking_step.main([*arguments, "--json", str(file), "--arms", *arms]) == 0
    run = json.loads(file.read_text())["runs"][f"{device}/tiny/short"]
    assert list(run["arms"]) == arms
    assert all(figures["flops"] > run["limit_flops"] for figures in run["arms"].values())
    assert all(figures["peak_bytes"] > 0 for figures in run["arms"].values())
    assert report.main([str(file)]) == 0
    printed = capsys.readouterr().out
    assert "ours-separate-rows" in printed and "not measured (cuda/7b/long-varied)" in printed


def test_meta_counts_what_a_cpu_counts():
    flops = {}
    for device in ("cpu", "meta"):
        run = ranking_step.measure(WORKLOADS["short"], device, "tiny", ["reference", "ours"], groups=1, repetitions=0)
        flops[device] = {name: figures["flops"] for name, figures in run["arms"].items()}
    assert flops["cpu"] == flops["meta"]


def test_goals_are_judged(capsys):
    arm = {"flops": 1.0, "peak_bytes": 1, "median_seconds": None}
    run = {"limit_flops": 1.0, "weight_bytes": 0, "training_state_bytes": 0}
    arms = {"reference": {**arm, "flops": 2.0}, "ours": arm, "ours-no-checkpointing": arm}
    assert not report.print_goals({"meta/7b/long": {**run, "arms": arms}})
    printed = capsys.readouterr().out.splitlines()
    assert any("reference / ours, long" in line and line.endswith("MISSED") for line in printed)
    assert any("whole run, LLaMA-7B" in line and line.endswith("met") for line in printed)


def test_adapter_stack_prints_every_size(tmp_path, capsys):
    arguments = ["--shape", "tiny", "--adapters", "1", "3", "--repetitions", "1", "--json", str(tmp_path / "x.json")]
    assert adapter_stack.main(arguments) == 0
    assert set(json.loads((tmp_path / "x.json").read_text())["median_seconds"]["fused"]) == {"1", "3"}
    assert "adapters" in capsys.readouterr().out

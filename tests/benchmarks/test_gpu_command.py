"""The command that measures a GPU: its record, what happens when steps fail, its bundle, and a dry run on the CPU."""

import json
import math
import os
import subprocess
import sys
import tarfile
import time
import zipfile
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("benchmarks", reason="benchmarks/ is not in a source distribution")

from benchmarks import report  # noqa: E402
from benchmarks.gpu import __main__ as command  # noqa: E402
from benchmarks.gpu import kernel, steps  # noqa: E402
from benchmarks.gpu.bundle import keep_one_library, write  # noqa: E402
from benchmarks.gpu.record import ERROR, Record  # noqa: E402

ROOT = Path(__file__).parents[2]


@pytest.fixture
def planted(tmp_path, monkeypatch):
    """Makes a step of these arms the only one, measured in this process; SystemExit counts as a crash."""
    record = Record(tmp_path)

    def process(arguments, log, seconds):
        try:
            return steps.measure("planted", record, toy=True), ""
        except (RuntimeError, SystemExit) as error:
            return 3, str(error)

    def plant(arms):
        monkeypatch.setitem(sys.modules, "benchmarks.gpu.planted", SimpleNamespace(arms=arms))

    monkeypatch.setitem(steps.STEPS, "planted", steps.Step("planted", 60, "planted"))
    monkeypatch.setattr(command, "STEPS", {"planted": steps.STEPS["planted"]})
    monkeypatch.setattr(command, "_process", process)
    return plant


def run(folder, *more):
    return command.main(["--out", str(folder), "--toy", *more]), Record(folder).arms("planted")


def stop():
    raise SystemExit("the process ends")


def test_an_arm_that_fails_or_crashes_leaves_the_others(tmp_path, planted, capsys):
    arms = {"wrong": lambda: 1 / 0, "nan": lambda: {"x": math.nan}, "crash": stop, "good": lambda: {"x": 1}}
    planted(lambda setting: arms)
    code, found = run(tmp_path)
    assert code == 1 and list(found) == list(arms) and found["good"]["x"] == 1
    assert "ZeroDivisionError" in found["wrong"][ERROR] and "ValueError" in found["nan"][ERROR]
    assert set(found["crash"]) == {ERROR}
    assert "1 measured  3 failed" in capsys.readouterr().out


def test_after_a_cuda_error_another_process_goes_on(tmp_path, planted, monkeypatch):
    starts = []

    def broken():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def arms(setting):
        starts.append(setting)
        return {"broken": broken, "good": dict}

    planted(arms)
    code, found = run(tmp_path)
    assert code == 1 and len(starts) == 2 and "illegal" in found["broken"][ERROR] and ERROR not in found["good"]


def test_a_rerun_measures_what_failed_and_what_is_asked_for(tmp_path, planted):
    runs = []

    def arm(name):
        runs.append(name)
        if runs.count("second") == 1 and name == "second":
            raise ValueError("only once")
        return {}

    planted(lambda setting: {name: partial(arm, name) for name in ("first", "second")})
    assert run(tmp_path)[0] == 1
    assert run(tmp_path)[0] == 0 and runs == ["first", "second", "second"]
    assert run(tmp_path)[0] == 0 and runs == ["first", "second", "second"]
    assert run(tmp_path, "--again", "planted")[0] == 0 and runs[3:] == ["first", "second"]


def test_a_step_that_cannot_start_leaves_its_output(tmp_path, planted):
    def arms(setting):
        raise RuntimeError("no arms today")

    planted(arms)
    code, found = run(tmp_path)
    assert code == 1 and found == {"start": {ERROR: "no arms today"}}


def test_a_step_without_time_says_so(tmp_path, planted):
    planted(lambda setting: {"good": dict})
    code, found = run(tmp_path, "--minutes", "0.01")
    assert code == 1 and found == {"start": {ERROR: "its time was up before the first arm"}}


def test_a_process_ends_at_its_limit_with_all_that_it_started(tmp_path):
    inner = "import time; time.sleep(600)"
    outer = (
        f"import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', {inner!r}]); print(p.pid, flush=True)"
    )
    code, output = command._process([sys.executable, "-c", f"{outer}; p.wait()"], tmp_path / "log", 5.0)
    assert code is None
    while running(int(output)):  # a killed process takes a moment; the test would never end if it was not killed
        time.sleep(0.1)


def running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_without_a_gpu_nothing_is_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "_has_gpu", lambda: False)
    assert command.main(["--out", str(tmp_path)]) == 2
    assert "--toy" in capsys.readouterr().err and not (tmp_path / "gpu.json").exists()


def test_report_joins_the_arms_of_a_ranking_step(capsys):
    def run(arm, seconds):
        figures = {"checkpointing": True, "flops": 1e12, "peak_bytes": 1, "median_seconds": seconds}
        return {
            "device": "cuda", "shape": "7b", "workload": "long-varied", "groups": 6, "groups_per_batch": 1,
            "response_tokens": 10, "limit_flops": 5e11, "peak_flops_per_second": 1e12,
            "environment": {"threads": 1, "torch": "2"}, "arms": {arm: figures},
        }  # fmt: skip

    arms = {"a": run("reference", 4.0), "b": run("ours-auto", 1.0), "c": run("ours", 2.0), "d": {ERROR: "x"}}
    runs = report.runs_of({"steps": {"doctor": {"checks": {}}, "ranking-7b": arms}})
    assert list(runs["cuda/7b/long-varied"]["arms"]) == ["reference", "ours-auto", "ours"]
    report.print_goals(runs)
    lines = capsys.readouterr().out.splitlines()
    # Goals are judged by what users get, not by the arm that recomputes every layer.
    assert any("GPU time, reference / ours" in line and "4.000" in line and line.endswith("met") for line in lines)
    assert any("useful utilisation" in line and "50.000" in line and line.endswith("met") for line in lines)


def test_bundle_keeps_one_library(tmp_path):
    wheel = tmp_path / "bitsandbytes-1-py3-none-any.whl"
    libraries = [f"bitsandbytes/libbitsandbytes_{name}.so" for name in ("cpu", "cuda126", "cuda130", "rocm70")]
    with zipfile.ZipFile(wheel, "w") as file:
        for name in (*libraries, "bitsandbytes/__init__.py"):
            file.writestr(name, "x")
        file.writestr("bitsandbytes-1.dist-info/RECORD", "".join(f"{name},,\n" for name in libraries))
    keep_one_library(wheel, "130")
    with zipfile.ZipFile(wheel) as file:
        kept = [name for name in file.namelist() if name.endswith(".so")]
        recorded = file.read("bitsandbytes-1.dist-info/RECORD").decode()
    assert kept == [libraries[0], libraries[2]] and recorded == "".join(f"{name},,\n" for name in kept)
    with pytest.raises(ValueError, match="cuda999"):
        keep_one_library(wheel, "999")
    write(tmp_path / "bundle.tar", tmp_path)
    with tarfile.open(tmp_path / "bundle.tar") as archive:
        assert {f"wheels/{wheel.name}", "benchmarks/gpu/__main__.py"} <= set(archive.getnames())


def compared(device, dtype):
    found = kernel.compare(steps.Setting("tiny", device, True), dtype, 64, 2, 96)
    # Half an eps for each rounding to 16 bits: the probabilities, their gradient, the output that its backward pass
    # reads, and the result.
    bound = 2 * torch.finfo(dtype).eps
    assert all(error < bound for error in found["relative_error"].values()), found
    return found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_attention_by_segment_is_dense_attention_within_rounding(dtype, monkeypatch):
    assert compared("cpu", dtype)["repeats_exactly"]
    keys = kernel.Segments
    monkeypatch.setattr(kernel, "Segments", lambda q, k, keys_K, longest: keys(q, k, keys_K.roll(1), longest))
    with pytest.raises(AssertionError):
        compared("cpu", dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_kernel_of_a_gpu_is_dense_attention_within_rounding(dtype):
    compared("cuda", dtype)  # its backward pass need not repeat exactly


@pytest.mark.slow
def test_dry_run_on_a_cpu(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", "--out", str(tmp_path), "--toy", "--minutes", "60"],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert list(found["steps"]) == list(steps.STEPS) and found["environment"]["torch"] == torch.__version__
    for name, arms in found["steps"].items():
        assert arms and all("taken" in arm for arm in arms.values()), name
    passes = list(found["steps"]["trainer"].values())
    assert len(passes) > 1
    assert all(one["planned"]["peak"] > one["planned"]["allocated"] > 0 and len(one["losses"]) == 5 for one in passes)
    assert report.main([str(tmp_path / "gpu.json")]) == 0

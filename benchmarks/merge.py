"""Measures a streaming merge: `python -m benchmarks.merge --shape 7b --json FILE`.

Generates a base in safetensors shards and two adapters trained on top of each other (about 13 GB for 7b; an arm writes
as much again). Each arm runs in a separate process, with the base evicted from the page cache:

- `copy`: a plain copy of the base's files, which shows the speed of the disk,
- `merge`: `merge_stack` onto the dequantized base, NF4 with double quantization,
- `merge-original`: the same onto the stored weights,
- `peft`: PEFT's `merge_and_unload` of both adapters in a 16-bit model held in memory, the usual way; only on demand
  (`--arms copy merge peft`), as it needs memory for the whole model,
- `gguf-TYPE`: the base, as a merged model would be, as a GGUF file with pico-LLaMA's tokenizer; on demand.

`--layers` keeps that many layers of the shape: the peak of a merge depends on the largest tensor, not on their number.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ARMS = ("copy", "merge", "merge-original", "peft")
GGUF_ARMS = ("gguf-q8_0", "gguf-q4_0", "gguf-f16", "gguf-f32")
SHARD = 5 * 10**9
RANK = 16


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line."""
    options = _parse(arguments)
    if options.run_arm:
        print(json.dumps(_run(options.run_arm, Path(options.directory), options.device)))
        return 0
    with tempfile.TemporaryDirectory(prefix=".benchmark-merge.", dir=options.directory) as folder:
        run = measure(Path(folder), options.shape, options.layers, options.arms, options.repetitions, options.device)
    print_run(run)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(run, indent=1) + "\n")
    return 0


def measure(
    folder: Path, shape: str, layers: int | None, arms: list[str], repetitions: int = 1, device: str = "auto"
) -> dict[str, Any]:
    """Generates base and stack in `folder`, runs the arms, and returns all figures, ready for JSON."""
    from benchmarks.ranking_step import environment

    base_bytes = generate(folder, shape, layers)
    figures: dict[str, list[dict[str, Any]]] = {arm: [] for arm in arms}
    for repetition in range(repetitions):
        # Every other repetition in reverse order, so that drift affects all arms alike.
        for arm in arms if repetition % 2 == 0 else reversed(arms):
            _drop_from_page_cache(folder)
            command = [sys.executable, "-m", "benchmarks.merge", "--run-arm", arm, "--directory", str(folder)]
            passive = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}  # as `tuna-peft` sets it
            result = subprocess.run([*command, "--device", device], stdout=subprocess.PIPE, check=True, env=passive)
            figures[arm].append(json.loads(result.stdout.splitlines()[-1]))
            shutil.rmtree(folder / "out")
            print(f"{arm}: {figures[arm][-1]}", file=sys.stderr)
    return {
        "shape": shape,
        "layers": layers,
        "device": device,
        "base_bytes": base_bytes,
        "largest_tensor_bytes": _largest_tensor(folder / "base"),
        "environment": environment("cpu"),
        "arms": {
            arm: {
                "seconds": [one["seconds"] for one in runs],
                "median_seconds": statistics.median(one["seconds"] for one in runs),
                "cpu_seconds": statistics.median(one["cpu_seconds"] for one in runs),
                "peak_rss_bytes": max(one["peak_rss_bytes"] for one in runs),
                "rss_before_bytes": max(one["rss_before_bytes"] for one in runs),
            }
            for arm, runs in figures.items()
        },
    }


def generate(folder: Path, shape: str, layers: int | None) -> int:
    """Writes `base/` (bf16 shards without a tokenizer) and `stack/` (two adapters, r=16, all linear layers).

    Returns:
        The size of the base's weights.

    Raises:
        UserError: Not enough space for base, stack and a merged copy.
    """
    import torch
    from peft import LoraConfig
    from transformers import LlamaForCausalLM

    from benchmarks.shapes import TARGETS, config_of
    from tuna_peft.export.output import require_space
    from tuna_peft.export.safetensors_stream import TensorSpec, write_safetensors
    from tuna_peft.files import write_json
    from tuna_peft.models.base.stored_weights import safetensors_files, weights_fingerprint
    from tuna_peft.models.stack.adapters import PEFT_PREFIX
    from tuna_peft.models.stack.manifest import AdapterEntry, Manifest

    config = config_of(shape)
    config.num_hidden_layers = layers or config.num_hidden_layers
    config.architectures = ["LlamaForCausalLM"]
    config.dtype = torch.bfloat16
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    linear = {name.removesuffix(".weight"): size for name, size in shapes.items() if name.split(".")[-2] in TARGETS}
    weights = {name: TensorSpec("BF16", size) for name, size in shapes.items()}
    factors = {
        f"{PEFT_PREFIX}{module}.lora_{side}.weight": TensorSpec("F32", size)
        for module, (outputs, inputs) in linear.items()
        for side, size in (("A", (RANK, inputs)), ("B", (outputs, RANK)))
    }
    total = sum(spec.nbytes for spec in weights.values())
    require_space(folder / "out", 2 * total + 2 * sum(spec.nbytes for spec in factors.values()) + 10**9)

    noise = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)) * 0.02

    def values(specs: dict[str, TensorSpec]) -> Callable[[str], dict[str, torch.Tensor]]:
        dtypes = {"BF16": torch.bfloat16, "F32": torch.float32}

        def make(name: str) -> dict[str, torch.Tensor]:
            spec = specs[name]
            count = spec.nbytes // dtypes[spec.dtype].itemsize
            repeated = noise.to(dtypes[spec.dtype]).repeat(-(-count // noise.numel()))
            return {name: repeated[:count].view(spec.shape)}

        return make

    (folder / "base").mkdir()
    config.save_pretrained(folder / "base")
    shards: list[dict[str, TensorSpec]] = [{}]
    for name, spec in weights.items():
        if shards[-1] and sum(other.nbytes for other in shards[-1].values()) + spec.nbytes > SHARD:
            shards.append({})
        shards[-1][name] = spec
    files = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for file, shard in zip(files, shards, strict=True):
        write_safetensors(folder / "base" / file, {name: {name: shard[name]} for name in shard}, values(shard))
    index = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
    write_json(
        folder / "base" / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": index}
    )
    entries = []
    for name in ("sft", "ranking"):
        stage = folder / "stack" / name
        stage.mkdir(parents=True)
        LoraConfig(
            r=RANK, lora_alpha=RANK, target_modules=TARGETS, task_type="CAUSAL_LM", inference_mode=True
        ).save_pretrained(str(stage))
        groups = {key: {key: factors[key]} for key in factors}
        write_safetensors(stage / "adapter_model.safetensors", groups, values(factors))
        entries.append(AdapterEntry.of(folder / "stack", name))
    base = folder / "base"
    identity = {
        "model": str(base),
        "revision": None,
        "fingerprint": weights_fingerprint(safetensors_files(str(base))),
    }
    settings = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    Manifest(identity, settings, entries, load_dtype="bfloat16").write(folder / "stack")
    return total


def print_run(run: dict[str, Any]) -> None:
    """One line for each arm."""
    layers = f", {run['layers']} layers" if run["layers"] else ""
    print(
        f"LLaMA {run['shape']}{layers}: {run['base_bytes'] / 1e9:.1f} GB, "
        f"largest tensor {run['largest_tensor_bytes'] / 1e6:,.0f} MB"
    )
    copy = run["arms"].get("copy", {}).get("median_seconds")
    print(f"{'arm':<16}{'seconds':>9}{'CPU s':>9}{'MB/s':>9}{'of a copy':>11}{'peak RSS, GB':>14}{'before, GB':>12}")
    for arm, figures in run["arms"].items():
        seconds = figures["median_seconds"]
        pace, mb_per_second = copy / seconds if copy else float("nan"), run["base_bytes"] / seconds / 1e6
        peak, before = figures["peak_rss_bytes"] / 1e9, figures["rss_before_bytes"] / 1e9
        print(
            f"{arm:<16}{seconds:>9.1f}{figures['cpu_seconds']:>9.1f}{mb_per_second:>9,.0f}{pace:>11.2f}"
            f"{peak:>14.2f}{before:>12.2f}"
        )


def _run(arm: str, folder: Path, device: str) -> dict[str, Any]:
    """One arm, in a separate process; imports are not timed."""
    if arm == "copy":
        work: Callable[[], object] = lambda: _copy(folder / "base", folder / "out")  # noqa: E731
    elif arm == "peft":
        work = _peft(folder)
    elif arm in GGUF_ARMS:
        work = _gguf(folder, arm.removeprefix("gguf-"))
    else:
        from tuna_peft.export.merge import merge_stack

        base = "original" if arm == "merge-original" else "dequantized"
        work = lambda: merge_stack(folder / "stack", folder / "out", base=base, device=device)  # type: ignore[arg-type]  # noqa: E731
    before, start, start_cpu = _rss("VmRSS"), time.perf_counter(), time.process_time()
    work()
    return {
        "seconds": time.perf_counter() - start,
        "cpu_seconds": time.process_time() - start_cpu,
        "peak_rss_bytes": _rss("VmHWM"),
        "rss_before_bytes": before,
    }


def _copy(source: Path, target: Path) -> None:
    target.mkdir()
    for file in sorted(source.iterdir()):
        with open(file, "rb") as read, open(target / file.name, "wb") as write:
            shutil.copyfileobj(read, write, 1 << 24)
            write.flush()
            os.fsync(write.fileno())  # a merge does it too


def _peft(folder: Path) -> Callable[[], object]:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    def work() -> None:
        model: Any = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.bfloat16)
        for name in ("sft", "ranking"):
            model = PeftModel.from_pretrained(model, str(folder / "stack" / name)).merge_and_unload()
        model.save_pretrained(folder / "out", max_shard_size="5GB")
        for file in (folder / "out").iterdir():
            with open(file, "rb") as written:
                os.fsync(written.fileno())  # not all files of the machine, as `os.sync` would

    return work


def _gguf(folder: Path, kind: str) -> Callable[[], object]:
    from tuna_peft.export.gguf.model import export_gguf
    from tuna_peft.models.base.load import resolve_model_path

    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(Path(resolve_model_path("builtin:pico-llama")) / name, folder / "base" / name)
    return lambda: export_gguf(folder / "base", folder / "out", types=(kind,))


def _rss(field: str) -> int:
    """Memory of this process now (`VmRSS`) or at its highest (`VmHWM`), in bytes; Linux only."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {field} in /proc/self/status")


def _drop_from_page_cache(folder: Path) -> None:
    os.sync()
    for file in folder.rglob("*.safetensors"):
        with open(file, "rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _largest_tensor(base: Path) -> int:
    from tuna_peft.export.safetensors_stream import SafetensorsReader
    from tuna_peft.models.base.stored_weights import safetensors_files

    return max(spec.nbytes for spec in SafetensorsReader(safetensors_files(str(base))).specs.values())


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.merge", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=["tiny", "small", "1b", "7b", "8b", "13b", "70b"], default="7b")
    parser.add_argument("--layers", type=int, help="default: all of the shape")
    parser.add_argument("--arms", nargs="+", choices=ARMS + GGUF_ARMS, default=["copy", "merge", "merge-original"])
    parser.add_argument("--repetitions", type=int, default=1)
    parser.add_argument("--device", default="cpu", help="where the merge computes: cpu, cuda ...")
    parser.add_argument("--directory", type=Path, default=Path(), help="the disk to measure (default: here)")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--run-arm", choices=ARMS + GGUF_ARMS, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())

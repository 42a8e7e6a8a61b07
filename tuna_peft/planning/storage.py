"""Bytes of main memory and of disk that a run needs."""

from __future__ import annotations

from tuna_peft.limits import merged_weights_on_gpu
from tuna_peft.planning.memory import CUDA_CONTEXT, PROCESS
from tuna_peft.planning.spec import Device, RunSpec

# Bytes of main memory for each parameter of a linear layer while it is merged into 16 bits, all temporary copies
# included. Measured with `python -m benchmarks.merge`.
MERGED = 13.7
# Bytes of a weight in a GGUF file: blocks of 32, each with a scale and some with an offset, in 16 bits.
GGUF = {
    "f32": 4.0, "f16": 2.0, "bf16": 2.0, "q8_0": 34 / 32, "q5_1": 24 / 32, "q5_0": 22 / 32, "q4_1": 20 / 32,
    "q4_0": 18 / 32,
}  # fmt: skip


def gguf_head(kind: str) -> float:
    """Bytes of a weight of the head (of the embedding if they are tied), which is stored in at least 8 bits."""
    return max(GGUF[kind], GGUF["q8_0"])


def main_memory(run: RunSpec, device: Device) -> dict[str, float]:
    """Bytes of main memory that a run on a GPU needs, by purpose; on a CPU the phases count all of it."""
    if not device.cuda:
        return {}
    shapes = [run.shape, *(helper.shape for helper in run.helpers)]
    largest = max(max(shape.head, shape.largest_linear) for shape in shapes)
    ram = {"while loading: the largest tensor, 16-bit and as it is stored": PROCESS + 4.0 * largest}
    shape, merge = run.shape, run.merge
    if merge is not None:
        # A merge handles one tensor at a time: it copies the embedding, or dequantizes a linear layer and adds the
        # adapters. An output of 32 bits also needs a converted copy.
        more = max(merge.bytes_per_parameter - 2.0, 0.0)
        copied = merge.bytes_per_parameter if more else 0.0
        ram["merge"] = PROCESS + max((2.0 + copied) * shape.head, (MERGED + more) * shape.largest_linear)
        for kind in merge.gguf:
            # A tensor of the merged model and the same tensor in the file.
            before = merge.bytes_per_parameter
            converted = max(shape.head * (before + gguf_head(kind)), shape.largest_linear * (before + GGUF[kind]))
            ram[f"GGUF, {kind}"] = PROCESS + converted
    if run.compared:
        logits = float(run.precision.compute * shape.vocab * sum(run.compared))
        ram["comparing exports: logits of the unmerged adapters"] = PROCESS + logits
    return ram


def disk(run: RunSpec, device: Device) -> dict[str, float]:
    """Bytes of disk, by purpose."""
    shape = run.shape
    parameters = shape.body + shape.unquantized
    trained = [stage.adapter for stage in run.stages]
    adapters = sum(adapter.parameters for adapter in trained)
    # A checkpoint contains all adapters in fp32 and AdamW's two fp32 moments (8 bytes a parameter).
    checkpoint = 4.0 * adapters + max(8.0 * adapter.parameters for adapter in trained)
    disk = {"the base, 16-bit, downloaded into the Hub's cache": 2.0 * parameters} if run.downloads else {}
    for helper in run.helpers:
        if helper.downloads and not (helper.name == run.model and run.downloads):
            disk[f"{helper.name}, 16-bit, downloaded"] = 2.0 * (helper.shape.body + helper.shape.unquantized)
    disk |= {
        "adapters, separate and combined": 2 * 4.0 * adapters,
        "checkpoints: one of each stage, two more while it trains": (len(run.stages) + 2) * checkpoint,
    }
    if run.merge is None:
        return disk
    disk["the merged model"] = float(run.merge.bytes_per_parameter * parameters)
    for kind in run.merge.gguf:
        disk[f"GGUF, {kind}"] = GGUF[kind] * (parameters - shape.head) + gguf_head(kind) * shape.head
    offloaded = _offloaded(run, device)
    if offloaded > 0:
        disk["weights of the merged model offloaded during the comparison, at most"] = offloaded
    return disk


def _offloaded(run: RunSpec, device: Device) -> float:
    """Bytes of the merged model that do not fit on the GPU when it is compared with the unmerged adapters.

    They are offloaded to main memory, and to disk where that is too small.
    """
    if not (run.compared and run.merge and run.merge.bytes_per_parameter >= 2.0 and device.cuda):
        return 0.0
    whole = float(run.merge.bytes_per_parameter * (run.shape.body + run.shape.unquantized))
    return whole - merged_weights_on_gpu(device.memory - CUDA_CONTEXT, run.shape.head)

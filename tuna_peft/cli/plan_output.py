"""A plan as text, as a table over GPUs, and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from tuna_peft.limits import GIB
from tuna_peft.planning.advice import advise, smallest_gpu
from tuna_peft.planning.flops import ON_CPU, TRAINING, Utilization
from tuna_peft.planning.plan import Phase, Plan
from tuna_peft.planning.sizes import sizes_of
from tuna_peft.planning.spec import RunSpec


def describe(plan: Plan, source: str) -> RenderableType:
    """Phases with memory and time, the parts of the largest phase, main memory, disk, and what to change."""
    run, device = plan.run, plan.device
    lines: list[RenderableType] = [
        Text(f"{run.model} on {device.name} ({gib(device.memory)}); sizes from {source}", style="bold"),
        Text(f"  computes in {run.precision.compute * 8} bits{_reason(plan)}"),
        *(Text(f"  {key}: {size:,}") for key, size in _sizes(run).items()),
        *(Text(f"  {name}: {source}") for name, source in _sources(plan).items()),
        _phases(plan),
        _parts(plan.largest, device.cuda),
    ]
    for title, parts in (("main memory", plan.ram), ("disk", plan.disk)):
        if parts:
            whole = max(parts.values()) if title == "main memory" else sum(parts.values())
            lines.append(Text(f"{title}: {gib(whole)}", style="bold"))
            lines += [Text(f"  {gib(size):>11}  {name}") for name, size in parts.items()]
    lines += [Text(f"not planned: {words}", style="yellow") for words in run.unplanned]
    lines += [Text(f"export: {words}") for words in run.export_notes]
    if plan.hours is not None:
        source = _utilization(plan).source
        lines.append(Text(f"hours: assumes that every response has the maximum length; {source}", style="dim"))
    return Group(*lines, *_verdict(plan))


def over_gpus(plans: Sequence[Plan]) -> RenderableType:
    """A table with one line for each GPU."""
    table = Table("GPU", title=f"{plans[0].run.model}")
    for heading in ("memory GiB", "needed GiB", "peak GiB", "fits", "hours"):
        table.add_column(heading, justify="right")
    for plan in plans:
        fits = plan.fits
        table.add_row(
            plan.device.name, f"{plan.device.memory / GIB:.1f}", f"{plan.needed / GIB:.2f}",
            f"{plan.peak / GIB:.2f}" if fits else "-", "yes" if fits else "no",
            hours_text(plan.hours) if fits else "-",
        )  # fmt: skip
    return table


def as_dict(plan: Plan, source: str) -> dict[str, Any]:
    """The plan as JSON values."""
    return {
        "model": plan.run.model,
        "sizes_from": source,
        "device": plan.device.name,
        "memory_bytes": round(plan.device.memory),
        "fits": plan.fits,
        "needed_bytes": round(plan.needed),
        "peak_bytes": round(plan.peak),
        "hours": plan.hours,
        "sizes": _sizes(plan.run),
        "utilisation": {"share": _utilization(plan).share, "source": _utilization(plan).source},
        "data": _sources(plan),
        "unplanned": list(plan.run.unplanned),
        "export_notes": list(plan.run.export_notes),
        "phases": [
            {
                "name": phase.name,
                "needed_bytes": round(phase.needed),
                "peak_bytes": round(phase.peak),
                "allocated_bytes": round(phase.allocated),
                "parts": {name: round(size) for name, size in phase.parts.items()},
                "margin_bytes": round(phase.margin),
                "steps": phase.steps,
                "tokens": round(phase.tokens),
                "flops": phase.flops,
                "hours": phase.hours,
                "note": phase.note,
            }
            for phase in plan.phases
        ],
        "ram_bytes": {name: round(size) for name, size in plan.ram.items()},
        "disk_bytes": {name: round(size) for name, size in plan.disk.items()},
        "changes": [
            {"overrides": list(change.overrides), "cost": change.cost, "peak_bytes": round(change.peak),
             "fits": change.fits}
            for change in advise(plan)
        ],
    }  # fmt: skip


def gib(size: float) -> str:
    """`5.25 GiB`, `12 MiB`."""
    return f"{size / GIB:,.2f} GiB" if size >= GIB / 10 else f"{size / 2**20:,.0f} MiB"


def hours_text(hours: float | None) -> str:
    """`3.2`, or `< 0.1`."""
    if hours is None:
        return "-"
    return "< 0.1" if hours < 0.1 else f"{hours:,.1f}"


def _reason(plan: Plan) -> str:
    """Why a CPU computes in this dtype; nothing where the recipe or the size of the model decides."""
    decided = plan.device.bf16 == (plan.run.precision.compute == 2)
    return f": {plan.device.why}" if plan.device.why and decided else ""


def _utilization(plan: Plan) -> Utilization:
    return ON_CPU if plan.device.gpu and plan.device.gpu.measured else TRAINING


def _sizes(run: RunSpec) -> dict[str, int]:
    """The sizes that are `auto`, those of the tasks of the evaluation among them."""
    tasks = {f"evaluation.{name}.batch_size": task.batch_size for name, task in run.evaluation.items() if task.auto}
    return sizes_of(run) | tasks


def _sources(plan: Plan) -> dict[str, str]:
    """Where the lengths of data come from, by stage and task."""
    found = {stage.name: stage.workload.source for stage in plan.run.stages}
    return found | {f"evaluation.{name}": task.workload.source for name, task in plan.run.evaluation.items()}


def _phases(plan: Plan) -> Table:
    table = Table(title="GiB and time", box=None, padding=(0, 1, 0, 0))
    for heading in ("phase", "needed", "peak", "steps", "Mtok", "PFLOP", "hours", ""):
        table.add_column(heading, justify="left" if heading in ("phase", "") else "right", no_wrap=heading != "")
    for phase in plan.phases:
        table.add_row(
            phase.name, f"{phase.needed / GIB:.2f}", f"{phase.peak / GIB:.2f}",
            "" if phase.steps is None else f"{phase.steps:,}", f"{phase.tokens / 1e6:,.1f}",
            f"{phase.flops / 1e15:,.0f}", hours_text(phase.hours), phase.note,
        )  # fmt: skip
    return table


def _parts(phase: Phase, cuda: bool) -> RenderableType:
    text = Text(f"largest phase, {phase.name}: {gib(phase.peak)}\n", style="bold")
    rest = "CUDA context, workspaces, fragmentation" if cuda else "Python and its libraries, fragmentation"
    rows = {**phase.parts, rest: phase.margin}
    for name, size in rows.items():
        text.append(f"  {gib(size):>11}  {name}\n", style="not bold")
    text.rstrip()
    return text


def _verdict(plan: Plan) -> list[RenderableType]:
    device = plan.device
    if plan.fits:
        spare = device.memory - plan.needed
        return [Text(f"It fits: {gib(plan.needed)} needed, {gib(spare)} to spare.", style="bold green")]
    lines: list[RenderableType] = [
        Text(f"It does not fit: {gib(plan.needed)} needed of {gib(device.memory)}.", style="bold red")
    ]
    changes = advise(plan)
    if changes:
        title = "What to change, the cheapest first (each line includes the changes before it):"
        lines.append(Text(title if changes[-1].fits else "Changes that save memory, but not enough:"))
    for change in changes:
        lines.append(Text(f"  {gib(change.peak)}  {change.cost}", style="green" if change.fits else ""))
        lines += [Text(f"               {override}", no_wrap=True) for override in change.overrides]
    if not (changes and changes[-1].fits):
        gpu = smallest_gpu(plan.run)
        larger = f"Unchanged, it fits on: {gpu}." if gpu else "It fits on no known single GPU."
        lines.append(Text(f"Use a smaller model. {larger}"))
    return lines

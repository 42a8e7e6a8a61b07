"""Shows what the model will see, for `data inspect`: responses in rank order, and which of their tokens carry loss."""

from __future__ import annotations

from collections import deque
from itertools import islice
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.text import Text

from tuna_peft.data.config import DataSource, Overflow, PromptConfig
from tuna_peft.data.encoder import loss_tokens
from tuna_peft.data.load import best_alone, iterate_ranked, load_prompts, source_format
from tuna_peft.data.losses import describe_losses
from tuna_peft.data.messages import message_text
from tuna_peft.data.ranked import ReadReport, Record, response_text
from tuna_peft.data.readers import FORMATS
from tuna_peft.data.sources import is_here, read_records
from tuna_peft.data.suggest import data_block, unused
from tuna_peft.data.texts import reads_the_clock, set_template_date, template_date
from tuna_peft.data.tokenize import encode_ranked
from tuna_peft.errors import listed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_NO_LOSS = "dim"
_LOSS = ("green", "bold green")  # alternating, so that token boundaries are visible
_LEGEND = Text.assemble(
    ("no loss (prompt)", _NO_LOSS),
    " | ",
    ("tokens", _LOSS[0]),
    (" that carry", _LOSS[1]),
    (" loss", _LOSS[0]),
    "   ↵ newline; rank 0 is best, equal ranks are ties",
)


def inspect_file(
    source: DataSource,
    prompt: PromptConfig,
    tokenizer: PreTrainedTokenizerBase | None = None,
    n: int = 3,
    *,
    supervised: bool | None = None,
    max_length: int | None = None,
    overflow: Overflow = "error",
) -> RenderableType:
    """Reads a source like a stage does, and renders its counts and its first `n` prompts.

    Args:
        source: What to read.
        prompt: The prompt template.
        tokenizer: None shows text instead of tokens.
        n: Number of prompts to show.
        supervised: Show only the best response, as an `sft` stage does. None: true for Alpaca files, which have one.
        max_length, overflow: As in `encode_ranked`.

    Raises:
        UserError: The source cannot be read, or a row is too long.
    """
    format, read_as = source_format(source)
    supervised = format in ("alpaca", "messages") if supervised is None else supervised
    report = ReadReport()
    records = iterate_ranked(source, prompt, report, pairs=not supervised)
    placed = list(islice(records, n))
    deque(records, maxlen=0)  # counts the others
    lines = [f"{source.title} ({format}): {report.read} records read, {report.kept} kept"]
    lines += describe_losses(report.as_dict())
    if is_here(read_as.path) and (keys := _not_read(read_as)):
        lines.append(f"Not read: {listed(f'`{key}`' for key in keys)}")
    if tokenizer is not None and reads_the_clock(tokenizer):
        set_template_date(tokenizer, prompt.date)
        lines.append(
            f"The chat template shows the date: {template_date(tokenizer)} here, in a run the day on which it starts "
            "(`date` under `prompt` fixes it)"
        )
    panels = _panels(placed, tokenizer, prompt, supervised, max_length, overflow)
    return Group(Text("\n  ".join(lines)), *panels, Text(f"\nIn a recipe:\n\n{data_block(read_as)}"))


def _not_read(source: DataSource) -> list[str]:
    """The keys of the first record that reading makes no use of."""
    _, first = next(read_records(source.model_copy(update={"limit": 1})))
    if source.columns is None:
        return [key for key in first if key not in FORMATS[source.format].reads | {"id", "system", "tools"}]
    named = source.columns.model_dump(exclude_none=True, exclude={"winner_labels"})
    named["group_by"] = source.group_by or []
    numbered = {str(number): key for number, key in enumerate(first, 1)}
    paths = [path for value in named.values() for path in ([value] if isinstance(value, str) else value)]
    return unused(first, {"read": ["tools", *(numbered.get(path, path) for path in paths)]})


def inspect_prompts(source: DataSource, prompt: PromptConfig, n: int = 3) -> RenderableType:
    """Reads prompts whose responses do not exist yet, and renders their counts and the first `n` of them.

    Raises:
        UserError: The source cannot be read.
    """
    prompts, report = load_prompts(source, prompt)
    summary = (
        f"{source.title}: {report.read} records read, {report.kept} prompts; their responses are generated during the "
        "run, which saves them in stages/<stage>/ranked.jsonl"
    )
    return Group(Text(summary), *(_panel(row["id"], _record_prompt(row), []) for row in prompts[:n]))


def _panels(
    placed: list[tuple[str, Record]],
    tokenizer: PreTrainedTokenizerBase | None,
    settings: PromptConfig,
    supervised: bool,
    max_length: int | None,
    overflow: Overflow,
) -> list[RenderableType]:
    panels: list[RenderableType] = [] if tokenizer is None else [_LEGEND]
    for where, record in placed:
        record = best_alone(record) if supervised else record
        if tokenizer is None:
            prompt, candidates = _record_prompt(record), _record_candidates(record)
        else:
            row = encode_ranked(
                record, tokenizer, max_length=max_length, overflow=overflow, prompt=settings, where=where
            )
            if row is None:
                prompt, candidates = Text(f"skipped: longer than max_length {max_length}", style="yellow"), []
            else:
                prompt = Text("".join(_pieces(row["prompt_ids"], tokenizer)), style=_NO_LOSS)
                candidates = _row_candidates(row, tokenizer)
        panels.append(_panel(record["id"], prompt, candidates))
    return panels


def _panel(identity: str, prompt: Text, candidates: list[Text]) -> Panel:
    return Panel(Group(prompt, *candidates), title=Text(identity), title_align="left")


def _record_prompt(record: Record) -> Text:
    prompt = record["prompt"]
    if not isinstance(prompt, str):
        prompt = "\n".join(f"{message['role']}: {message_text(message)}" for message in prompt)
    return Text(prompt, style=_NO_LOSS)


def _record_candidates(record: Record) -> list[Text]:
    responses = zip(record["ranks"], _scores(record), record["completions"], strict=True)
    texts = [Text.assemble(_head(rank, score, ""), "\n", response_text(said)) for rank, score, said in responses]
    if record["reference"] is not None:
        texts.append(Text.assemble(_head(None, None, ""), "\n", response_text(record["reference"])))
    return texts


def _row_candidates(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> list[Text]:
    gaps = row.get("completion_gaps") or [[]] * len(row["ranks"])
    skips = row["completion_skips"]
    responses = list(zip(row["ranks"], _scores(row), row["completions_ids"], skips, gaps, strict=True))
    if row["reference_ids"] is not None:
        gap = row.get("reference_gaps") or []
        responses.append((None, None, row["reference_ids"], row["reference_skip"], gap))
    texts = []
    for rank, score, ids, skip, gap in responses:
        loss = set(loss_tokens(range(len(ids)), skip, gap))
        pieces = _pieces(row["prompt_ids"] + ids, tokenizer)[len(row["prompt_ids"]) :]
        text = Text.assemble(_head(rank, score, f"{len(loss)} tokens with loss"), "\n")
        text.append("".join(pieces[:skip]), style=_NO_LOSS)
        text.append("|", style="bold red")
        for index, piece in enumerate(pieces[skip:], skip):
            if index - 1 in loss and index not in loss or index - 1 not in loss and index in loss and index > skip:
                text.append("|", style="bold red")  # between turns
            text.append(piece, style=_LOSS[(index - skip) % 2] if index in loss else _NO_LOSS)
        texts.append(text)
    return texts


def _head(rank: int | None, score: float | None, tokens: str) -> Text:
    name = "reference" if rank is None else f"rank {rank}"
    parts = [name, *([] if score is None else [f"score {score:g}"]), *([tokens] if tokens else [])]
    return Text("\n" + "  ".join(parts), style="bold cyan")


def _scores(row: dict[str, Any]) -> list[float | None]:
    return row["scores"] or [None] * len(row["ranks"])


def _pieces(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The text of each token; a character that consists of several tokens belongs to the last one."""
    pieces, start = [], 0
    for stop in range(1, len(ids) + 1):
        # Decoded with a few tokens before it, because a decoder drops the space before the first word.
        context = max(0, start - 4)
        before, after = (_decode(ids[context:end], tokenizer) for end in (start, stop))
        piece = after[len(before) :]
        if piece.endswith("\ufffd") and stop < len(ids):
            pieces.append("")
            continue
        pieces.append(piece.replace("\n", "↵\n"))
        start = stop
    return pieces


def _decode(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

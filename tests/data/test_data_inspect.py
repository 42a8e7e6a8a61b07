"""What `data inspect` shows, with and without colour."""

import io

import pytest
from rich.console import Console

from tuna_peft.data.config import DataSource, PromptConfig
from tuna_peft.data.inspect import inspect_file
from tuna_peft.errors import UserError

PLAIN = PromptConfig(template="{instruction}")
ROW = {"id": "q1", "prompt": "xa", "completions": ["c\nd", "b", "d"], "scores": [0.5, 2, 0.5], "reference": "dd"}


def show(renderable, colour=False):
    console = Console(file=io.StringIO(), width=80, force_terminal=colour, color_system="standard" if colour else None)
    console.print(renderable)
    return console.file.getvalue()


def test_file_with_tokens(jsonl, tokenizer):
    text = show(inspect_file(DataSource(path=jsonl(ROW, ROW)), PLAIN, tokenizer, 1))
    summary = " ".join(text.split())
    assert "(ranked): 2 records read, 2 kept" in summary
    lines = [line.strip("│ ") for line in text.splitlines()]
    start = lines.index("<s>x")
    # "ab" carries loss as a whole; before "c" the "a" is prompt. The bar stands where the loss begins.
    assert lines[start : lines.index("a|dd</s>") + 1] == [
        "<s>x",
        "",
        "rank 0  score 2  2 tokens with loss",
        "|ab</s>",
        "",
        "rank 1  score 0.5  4 tokens with loss",
        "a|c↵",
        "d</s>",
        "",
        "rank 1  score 0.5  2 tokens with loss",
        "a|d</s>",
        "",
        "reference  3 tokens with loss",
        "a|dd</s>",
    ]
    assert text.count("q1") == 1
    assert "no loss (prompt) | tokens that carry loss" in text


def test_colours(jsonl, tokenizer):
    text = show(inspect_file(DataSource(path=jsonl(ROW)), PLAIN, tokenizer, 1), colour=True)
    assert "\x1b[2m<s>x\x1b[0m" in text  # dim: no loss
    assert "\x1b[2ma\x1b[0m\x1b[1;31m|\x1b[0m\x1b[32mc\x1b[0m" in text  # green: loss


def test_without_a_tokenizer_and_without_scores(jsonl):
    path = jsonl({"prompt": [{"role": "user", "content": "q"}], "chosen": "x[red]", "rejected": "y"})
    text = show(inspect_file(DataSource(path=path), PLAIN))
    assert "user: q" in text
    assert "rank 0 " in text
    assert "x[red]" in text
    assert "tokens" not in text


def test_alpaca_files_are_shown_as_supervision(jsonl, tokenizer):
    path = jsonl({"instruction": "xy", "input": "", "output": "ab"})
    text = show(inspect_file(DataSource(path=path), PLAIN, tokenizer))
    assert "|ab</s>" in text
    assert "(alpaca)" in text


def test_ranked_data_in_a_supervised_stage(jsonl, tokenizer):
    tied = {**ROW, "scores": [1, 1, 1]}
    text = show(inspect_file(DataSource(path=jsonl(ROW, tied)), PLAIN, tokenizer, supervised=True))
    assert text.count("rank 0  score") == 2
    assert "rank 1" not in text
    assert "reference" not in text


@pytest.mark.parametrize(
    ("record", "settings", "expected"),
    [
        ({**ROW, "model": "m", "tools": []}, {}, "Not read: `model` "),
        ({"prompt": "q", "initial_steps": "s", "chosen": "x", "rejected": "y"}, {}, "Not read: `initial_steps` "),
        ({"q": "q", "a": ["x", "y"], "who": "m", "g": 1},
         {"columns": {"instruction": 1, "completions": "a", "ranks": "best_first"}, "group_by": "g"},
         "Not read: `who` "),
        (ROW, {}, None),
    ],
)  # fmt: skip
def test_keys_that_are_not_read_are_named(jsonl, record, settings, expected):
    text = " ".join(show(inspect_file(DataSource(path=jsonl(record), **settings), PLAIN)).split())
    assert "Not read" not in text if expected is None else expected in text


def test_a_row_that_is_left_out(jsonl, tokenizer):
    source = DataSource(path=jsonl(ROW))
    assert "longer than max_length 3" in show(inspect_file(source, PLAIN, tokenizer, max_length=3, overflow="skip"))
    with pytest.raises(UserError, match="data.jsonl: line 1: the prompt has 3 tokens"):
        inspect_file(source, PLAIN, tokenizer, max_length=3)


def test_characters_of_several_tokens(jsonl, llama_tokenizer):
    path = jsonl({"prompt": "Say:", "completions": ["龘龘 two words", "b"], "scores": [1, 0]})
    assert "|龘龘 two words</s>" in show(inspect_file(DataSource(path=path), PLAIN, llama_tokenizer))

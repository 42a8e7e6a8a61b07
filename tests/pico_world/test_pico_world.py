"""The world of pico-LLaMA: grader, generator, split, data files, tokenizer and model."""

from __future__ import annotations

import itertools
import json
import statistics
from pathlib import Path
from random import Random

import pytest

import tuna_peft
from pico_world import datafiles, documents, families, mixtures, styles, template
from pico_world.split import is_held_out
from tuna_peft.assets import pico_grader, pico_lexicon

PICO = Path(tuna_peft.__file__).parent / "assets" / "pico_llama"
DATA = PICO / "data"
TRAINING_FILES = ("sft.json", "teacher.json", "judge.json", "prompts.jsonl")


def _read(name: str) -> list[dict]:
    text = (DATA / name).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()] if name.endswith(".jsonl") else json.loads(text)


def _prompt_of(record: dict) -> str:
    if "instruct" in record:
        return record["instruct"]
    source = record.get("orig", record)
    return template.render_prompt(source["instruction"], source["input"])


@pytest.fixture(scope="module")
def tasks() -> dict[str, list[dict]]:
    rng = Random(7)
    return {family: [families.draw(rng, [family], held_out=False) for _ in range(40)] for family in families.FAMILIES}


# --- grader ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", list(families.FAMILIES))
@pytest.mark.parametrize(
    ("style", "low", "high"),
    [
        ("exact", 1.0, 1.0),
        ("wordy", 0.6, 0.75),
        ("incomplete", 0.3, 0.55),
        ("wordy_incomplete", 0.2, 0.4),
        ("slip", 0.2, 0.2),
        ("wordy_slip", 0.1, 0.15),
        ("copy", 0.0, 0.1),
        ("vague", 0.0, 0.0),
    ],
)
def test_every_style_is_graded_as_intended(tasks, family, style, low, high):
    rng = Random(3)
    for task in tasks[family]:
        response = styles.respond(task, style, rng)
        assert low <= pico_grader.grade(task, response) <= high, (task["instruction"], task["input"], response)


@pytest.mark.parametrize("family", list(families.FAMILIES))
@pytest.mark.parametrize("response", ["", "  \n", "lorem ipsum", "???"])
def test_empty_and_off_task_responses_are_worth_nothing(tasks, family, response):
    assert {pico_grader.grade(task, response) for task in tasks[family]} == {0.0}


def test_case_and_final_period_do_not_matter(tasks):
    for task in itertools.chain.from_iterable(tasks.values()):
        assert pico_grader.grade(task, task["output"].upper().rstrip(".") + ".") == 1.0


def test_any_right_members_are_right_and_repeated_ones_are_not():
    answer = {"kind": "members", "count": 3, "pool": list(pico_lexicon.CATEGORIES["animal"]), "wrong": ["car"]}
    record = {"instruction": "Name three animals.", "input": "", "output": "cat, dog, cow", "answer": answer}
    assert pico_grader.grade(record, "wolf, fox, goat") == 1.0
    assert pico_grader.grade(record, "wolf, wolf, goat") == pico_grader.WRONG
    assert pico_grader.WRONG < pico_grader.grade(record, "wolf, fox") < 1.0
    assert pico_grader.grade(record, "wolf, fox, goat, lion") == pico_grader.WRONG


def test_a_right_value_in_other_words_is_nearly_right():
    answer = {"kind": "sentence", "value": "19", "terse": "19", "wrong": [], "claims": "numbers", "claim": "last"}
    record = {"instruction": "What is 7 plus 12?", "input": "", "output": "7 plus 12 is 19.", "answer": answer}
    assert pico_grader.grade(record, "The sum of both is 19.") == pico_grader.OWN_WORDS
    assert pico_grader.grade(record, "19") == pico_grader.BARE_VALUE
    assert pico_grader.grade(record, "7 plus 12 is 18.") == pico_grader.WRONG


def test_chatter_uses_no_word_that_the_grader_reads():
    content = {*pico_lexicon.WORDS, *itertools.chain.from_iterable(pico_lexicon.CLAIMS.values())}
    content = {word.lower() for word in content}
    for text in (*styles.OPENERS, *styles.CLOSERS, *styles.VAGUE):
        assert not content & set(pico_grader.words(text)), text


# --- generator and split --------------------------------------------------------------------------------------------


def test_the_same_seed_writes_the_same_text_and_another_seed_does_not():
    first, again, other = (list(itertools.islice(documents.stream(seed), 200)) for seed in (5, 5, 6))
    assert first == again != other


def test_data_files_are_what_the_generator_writes(tmp_path):
    datafiles.write(tmp_path, seed=0)
    for name in (*TRAINING_FILES, "heldout.jsonl"):
        assert (tmp_path / name).read_bytes() == (DATA / name).read_bytes(), name


def test_pretraining_text_has_no_held_out_prompt():
    held_out = {_prompt_of(record) for record in _read("heldout.jsonl")}
    heads = [document.head for document in itertools.islice(documents.stream(0), 20_000)]
    assert not held_out & set(heads)
    for head in filter(None, heads):
        instruction, _, input = head[len("### Instruction:\n") : -len("\n\n### Response:\n")].partition(
            "\n\n### Input:\n"
        )
        assert not is_held_out(instruction, input)


@pytest.mark.parametrize("name", TRAINING_FILES)
def test_training_files_have_no_held_out_prompt(name):
    held_out = {_prompt_of(record) for record in _read("heldout.jsonl")}
    assert not held_out & {_prompt_of(record) for record in _read(name)}


def test_held_out_prompts_are_on_the_held_out_side():
    assert {is_held_out(record["instruction"], record["input"]) for record in _read("heldout.jsonl")} == {True}


def test_mixtures_are_distributions_over_known_styles():
    mixed = [mixtures.TEACHER, mixtures.JUDGE, mixtures.HELD_OUT]
    mixed += [of(phrasing) for of in (mixtures.pretraining, mixtures.sft) for phrasing in range(families.PHRASINGS)]
    for mixture in mixed:
        assert set(mixture) <= set(styles.STYLES)
        assert sum(mixture.values()) == pytest.approx(1.0)


# --- data files -----------------------------------------------------------------------------------------------------


def test_the_data_files_are_small():
    assert sum(path.stat().st_size for path in DATA.iterdir()) < 1.5e6


def test_sft_format():
    records = _read("sft.json")
    assert len(records) == datafiles.SFT_RECORDS
    assert all(set(record) == {"instruction", "input", "output"} and record["output"] for record in records)


def test_teacher_format():
    records = _read("teacher.json")
    assert len(records) == datafiles.TEACHER_RECORDS
    for record in records:
        assert set(record) == {"orig", "text", "avg_token_prob", "length", "logprob"}
        assert len(set(record["text"])) == 4
        for mean, length, total in zip(record["avg_token_prob"], record["length"], record["logprob"], strict=True):
            assert mean < 0 < length
            assert total == pytest.approx(mean * length, rel=0, abs=0.51e-4)  # written with four digits


def test_judge_format():
    records = _read("judge.json")
    assert len(records) == datafiles.JUDGE_RECORDS
    for record in records:
        assert {"prompt", "instruct", "generation", "id", "gpt_eval", "rank_str", "rank", "response_4"} == set(record)
        texts = [*record["generation"], record["response_4"]]
        ranked = [texts[index] for index in record["rank"]]
        assert len(record["generation"]) == 4 and len(ranked) >= 3
        assert len(set(ranked)) == len(ranked) and set(ranked) == set(texts)


def test_held_out_format_and_scores():
    records = _read("heldout.jsonl")
    assert len(records) == datafiles.HELD_OUT_RECORDS
    assert {record["family"] for record in records} == set(families.FAMILIES)
    for record in records:
        assert len(record["responses"]) in (4, 5)
        assert len({response["score"] for response in record["responses"]}) > 1
        for response in record["responses"]:
            assert response["score"] == pico_grader.grade(record, response["text"])


def test_prompts_can_be_graded():
    records = _read("prompts.jsonl")
    assert len(records) == datafiles.PROMPT_RECORDS
    assert all(pico_grader.grade(record, record["output"]) == 1.0 for record in records)


# --- tokenizer and model --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(PICO)


def test_tokenizer_round_trip(tokenizer):
    texts = [document.head + document.body for document in itertools.islice(documents.stream(9), 200)]
    for text in [*texts, "Zürich: 3 € — ¿qué?", "tabs\tand\nlines"]:
        ids = tokenizer(text).input_ids
        assert ids[0] == tokenizer.bos_token_id
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_special_tokens_are_distinct(tokenizer):
    assert len({tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id}) == 3


def test_a_prompt_is_a_prefix_of_prompt_and_response(tokenizer):
    for record in _read("heldout.jsonl"):
        prompt = _prompt_of(record)
        head = tokenizer(prompt).input_ids
        for response in record["responses"]:
            assert tokenizer(prompt + response["text"]).input_ids[: len(head)] == head


@pytest.mark.parametrize("input", ["", "fig, apple"])
def test_the_chat_template_renders_the_prompt_template(tokenizer, input):
    content = "Sort the words." + (f"\n\n{input}" if input else "")
    message = {"role": "user", "content": content}
    prompt = tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
    assert prompt == "<s>" + template.render_prompt("Sort the words.", input)
    whole = tokenizer.apply_chat_template([message, {"role": "assistant", "content": "apple, fig"}], tokenize=False)
    assert whole == prompt + "apple, fig</s>"


def test_the_model_is_a_small_llama_with_grouped_queries_and_nf4_friendly_widths():
    config = json.loads((PICO / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert 1 < config["num_key_value_heads"] < config["num_attention_heads"]
    assert config["hidden_size"] % 64 == config["intermediate_size"] % 64 == 0
    assert (PICO / "model.safetensors").stat().st_size <= 8e6


def test_the_base_knows_the_tasks_and_answers_them_in_mixed_manner(tokenizer):
    import torch
    from transformers import AutoModelForCausalLM

    from pico_world import probe

    model = AutoModelForCausalLM.from_pretrained(PICO, dtype=torch.float32)
    held_out = _read("heldout.jsonl")[:60]
    known = probe.prefers_right(model, tokenizer, held_out)
    assert statistics.mean(known.values()) > 0.8, known
    grades, responses = probe.greedy_grades(model, tokenizer, held_out)
    assert 0.25 < statistics.mean(grades.values()) < 0.6, grades
    assert responses and all(responses)

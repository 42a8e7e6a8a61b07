"""Sampling candidates: diversity, resumption, what is left out."""

from __future__ import annotations

import random
from itertools import combinations

import pytest
from rouge_score.rouge_scorer import _score_lcs
from spies import spy
from tiny_llama import load_tiny, write_base

from tuna_peft.data.config import DataSource, PromptConfig
from tuna_peft.data.load import load_candidates
from tuna_peft.errors import UserError
from tuna_peft.feedback import sampling
from tuna_peft.feedback.diversity import similarities
from tuna_peft.feedback.sampling import ModelSampler, sample_candidates
from tuna_peft.feedback.settings import SampleSettings
from tuna_peft.files import write_jsonl
from tuna_peft.journal import Journal
from tuna_peft.models.generation.generate import Generated


class Scripted:
    """Answers from a table: by prompt, a list of draws."""

    identity = {"backend": "scripted"}
    context = 50

    def __init__(self, tokenizer, script):
        self.tokenizer, self.script, self.asked = tokenizer, script, []

    def settle(self, journal):
        pass

    def sample(self, prompts, settings, *, temperature, seed, done):
        for index, ids in enumerate(prompts):
            if index not in done:
                name = self.tokenizer.decode(ids, skip_special_tokens=True)
                self.asked.append((name, temperature, seed))
                texts = self.script[name][int(seed.split("/")[1])]
                yield Generated(index, texts, [len(text) for text in texts], [True] * len(texts))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return load_tiny(write_base(tmp_path_factory.mktemp("base")), "none")


@pytest.fixture
def journal(tmp_path):
    with Journal(tmp_path / "samples.journal.jsonl") as opened:
        yield opened


def prompt(text, **more):
    return {"id": text, "prompt": text, "reference": None, "record": {"question": text}, **more}


def test_alike_draws_are_repeated_hotter_and_the_most_diverse_is_kept(base, journal):
    sampler = Scripted(
        base.tokenizer,
        {
            "w3": [["a b c d", "e f g h"]],
            "w4": [["a b c d e", "a b c d e f"], ["a b x y", "c d z w"]],
            "w5": [["a b c d e f", "a b c d e f"], ["a b c d e f", "a b c d e"], ["a b c d e f", "a b c d e f g h"]],
        },
    )
    settings = SampleSettings(n=2, trials=3, hotter_by=0.25)
    records, report = sample_candidates(sampler, [prompt("w3"), prompt("w4"), prompt("w5")], settings, journal)
    assert [name for name, *_ in sampler.asked] == ["w3", "w4", "w5", "w4", "w5", "w5"]
    assert [temperature for _, temperature, _ in sampler.asked] == [1, 1, 1, 1.25, 1.25, 1.5]
    assert [record["completions"] for record in records] == [
        ["a b c d", "e f g h"],
        ["a b x y", "c d z w"],
        ["a b c d e f", "a b c d e f g h"],  # still alike, and the least so of the three: 12/14 against 1 and 10/11
    ]
    assert [record["sampling"]["draw"] for record in records] == [1, 2, 3]
    assert records[2]["sampling"]["similarity"] == pytest.approx(12 / 14, abs=1e-4)
    assert report.draws == {"1": 1, "2": 1, "3": 1} and report.alike == 1 and report.kept == 3
    assert report.tokens == (7 + 7) + (9 + 11) + (7 + 7) + (11 + 11) + (11 + 9) + (11 + 15)  # of all draws


def test_responses_that_are_exactly_as_similar_as_allowed_are_drawn_again(base, journal):
    sampler = Scripted(base.tokenizer, {"w3": [["a b", "a c"], ["a b", "c d"]]})
    records, _ = sample_candidates(sampler, [prompt("w3")], SampleSettings(n=2, max_similarity=0.5), journal)
    assert records[0]["completions"] == ["a b", "c d"]


def test_a_model_samples_with_every_setting(monkeypatch):
    monkeypatch.setattr(sampling, "model_digest", lambda model, adapters: {"adapters": adapters})
    calls = spy(monkeypatch, sampling, "stream_responses", "stream")
    settings = SampleSettings(n=3, top_p=0.9, max_new_tokens=5, batch_size=6)
    sampler = ModelSampler("m", "t", ["sft"])
    assert sampler.identity == {"backend": "transformers", "adapters": ["sft"]}
    assert sampler.sample([[1]], settings, temperature=0.7, seed="s", done={0}) == "stream"
    [(args, options)] = calls
    assert args == ("m", "t", [[1]]) and options.pop("description") == "sampling, temperature 0.7"
    assert options == {"n": 3, "temperature": 0.7, "top_p": 0.9, "max_new_tokens": 5, "seed": "s", "batch_size": 6,
                       "done": {0}, "dense": None}  # fmt: skip


def test_a_diverse_draw_is_preferred_to_one_with_a_smaller_mean(base, journal):
    one = ["a b c d e", "a b c d e", "p q r s t"]  # pairs 1, 0, 0
    two = ["a b c d e", "a b c x y", "a b c u v"]  # pairs 0.6 each
    records, _ = sample_candidates(
        Scripted(base.tokenizer, {"w3": [one, two]}), [prompt("w3")], SampleSettings(n=3), journal
    )
    assert records[0]["completions"] == two


def test_what_is_left_out_is_counted(base, journal):
    long = " ".join(["w3"] * 60)
    script = {
        "w3": [["a", "a"]],
        "w4": [["", ""]],
        "w5": [["a", ""]],
        "w6": [
            [
                "a",
                "b",
            ],
        ],
    }
    prompts = [prompt("w3"), prompt("w4"), prompt("w5"), prompt("w6"), prompt(long)]
    records, report = sample_candidates(
        Scripted(base.tokenizer, script), prompts, SampleSettings(n=2, trials=1), journal
    )
    assert [record["id"] for record in records] == ["w6"]
    assert report.left_out == {
        "all responses are equal": 2,
        "all responses are empty": 1,
        "the prompt fills the model's context": 1,
    }
    assert (report.empty, report.repeated, report.prompts, report.kept) == (3, 1, 5, 1)
    assert any("skipped: 2 prompts" in line for line in report.lines())
    with pytest.raises(UserError, match=r"none of the 1 prompts has two different responses \(all responses are eq"):
        sample_candidates(Scripted(base.tokenizer, script), [prompt("w3")], SampleSettings(n=2, trials=1), journal)


def test_a_prompt_that_is_there_twice_is_drawn_once_into_the_journal(base, journal):
    sampler = Scripted(base.tokenizer, {"w3": [["a", "b"]]})
    records, _ = sample_candidates(sampler, [prompt("w3"), prompt("w3", id="again")], SampleSettings(n=2), journal)
    assert [record["id"] for record in records] == ["w3", "again"] and len(journal) == 1


def test_killed_and_started_again_gives_the_same(base, tmp_path):
    prompts = [prompt(f"w{i} w{i + 1} w{2 * i}") for i in range(3, 13)]
    settings = SampleSettings(n=2, max_new_tokens=6, batch_size=4, trials=2, max_similarity=0.3)
    sampler = ModelSampler(base.model, base.tokenizer)
    with Journal(tmp_path / "straight.jsonl") as journal:
        straight, whole = sample_candidates(sampler, prompts, settings, journal)
    assert whole.draws.get("2", 0) > 0
    for stop in range(1, len(prompts) + 3, 3):
        path = tmp_path / f"stopped{stop}.jsonl"
        with pytest.raises(KeyboardInterrupt), Journal(path) as journal:
            sample_candidates(sampler, prompts, settings, Stopping(journal, stop))
        with Journal(path) as journal:
            assert len(journal) == stop - 1
            again, report = sample_candidates(sampler, prompts, settings, journal)
        assert again == straight
        assert {**report.as_dict(), "seconds": 0} == {**whole.as_dict(), "seconds": 0}


class Stopping:
    """A journal whose n-th record does not come to be."""

    def __init__(self, journal, stop):
        self.journal, self.stop = journal, stop

    def __contains__(self, key):
        return key in self.journal

    def __getitem__(self, key):
        return self.journal[key]

    def settle(self, name, value, *, before):
        return self.journal.settle(name, value, before=before)

    def add(self, key, value):
        self.stop -= 1
        if self.stop == 0:
            raise KeyboardInterrupt
        self.journal.add(key, value)


def test_another_setting_seed_or_model_does_not_reuse_draws(base, journal):
    sampler = Scripted(base.tokenizer, {"w3": [["a", "b"]]})
    settings = SampleSettings(n=2)
    others = [{"n": 3}, {"temperature": 0.9}, {"top_p": 0.9}, {"max_new_tokens": 9}]
    for other in ({}, *others):
        sample_candidates(sampler, [prompt("w3")], settings.model_copy(update=other), journal)
    sample_candidates(sampler, [prompt("w3")], settings, journal, seed=1)
    sampler.identity = {"backend": "another"}
    sample_candidates(sampler, [prompt("w3")], settings, journal)
    assert len(sampler.asked) == len(journal) == 7
    # What only says when to stop, or how many go at once, asks nothing again.
    sample_candidates(sampler, [prompt("w3")], SampleSettings(n=2, batch_size=1, max_similarity=0.9), journal)
    assert len(sampler.asked) == 7


def test_the_file_is_read_as_candidates(base, journal, tmp_path):
    sampler = Scripted(base.tokenizer, {"w3": [["a", "b"]]})
    records, _ = sample_candidates(sampler, [prompt("w3", reference="r")], SampleSettings(n=2), journal)
    write_jsonl(tmp_path / "samples.jsonl", records)
    [read], _ = load_candidates(DataSource(path=str(tmp_path / "samples.jsonl")), PromptConfig())
    assert read == {key: records[0][key] for key in read}


def test_similarities_are_those_of_rouge_score():
    draw, words = random.Random(0), ["abc", "de", "fg", "hi", "jk", "lm", "no", "pq"]
    for _ in range(200):
        texts = [" ".join(draw.choices(words, k=draw.randrange(1, 40))) for _ in range(3)]
        expected = [_score_lcs(*map(str.split, pair)).fmeasure for pair in combinations(texts, 2)]
        assert similarities(texts) == expected


def test_rouge_l_of_any_script():
    assert similarities(["the cats sat", "the cat sat", "dogs"]) == [1.0, 0.0, 0.0]  # by their stems
    [alike] = similarities(["今天天气很好", "今天天气不好"])
    assert alike == pytest.approx(5 / 6)
    assert similarities(["!!!", "???"]) == [0.0] and similarities(["", ""]) == [1.0]

"""Generation against `model.generate`, and samples that do not depend on their batch."""

from __future__ import annotations

import itertools
from dataclasses import asdict

import pytest
import torch
from tiny_llama import PROMPTS, RANKING, SFT, VOCABULARY, load_tiny, stack_on

from tuna_peft.errors import UserError
from tuna_peft.models.generation import generate
from tuna_peft.models.generation.choose import _add_gumbel_noise, chooser
from tuna_peft.models.generation.generate import generate_responses, stream_responses

SAMPLED = {"n": 3, "temperature": 0.9, "top_p": 0.95, "max_new_tokens": 12, "seed": 5}


@pytest.fixture(scope="module")
def stack(base_path):
    base = load_tiny(base_path)
    return stack_on(base, sft=SFT, ranking=RANKING), base.tokenizer


def sampled(stack, prompts=PROMPTS, **options):
    model, tokenizer = stack
    found = list(stream_responses(model, tokenizer, prompts, **{**SAMPLED, **options}))
    return {one.index: asdict(one) for one in sorted(found, key=lambda one: one.index)}


def test_greedy_equals_generate_on_an_nf4_stack(stack):
    model, tokenizer = stack
    ours = generate_responses(model, tokenizer, PROMPTS, max_new_tokens=20, batch_size=2)
    for text, prompt in zip(ours, PROMPTS, strict=True):
        [ids] = model.generate(
            input_ids=torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=20, do_sample=False, use_cache=True, pad_token_id=2, eos_token_id=2,
        ).tolist()  # fmt: skip
        assert text == tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True)


def test_greedy_samples_of_a_prompt_share_its_cache_and_are_equal(stack, monkeypatch):
    read = []
    inner = generate._Decoder._read

    def spy(self, prompts, device):
        read.append(len(prompts))
        return inner(self, prompts, device)

    monkeypatch.setattr(generate._Decoder, "_read", spy)
    model, tokenizer = stack
    alone = generate_responses(model, tokenizer, PROMPTS, max_new_tokens=12)
    read.clear()
    for one in stream_responses(model, tokenizer, PROMPTS, n=4, max_new_tokens=12, batch_size=12):
        assert one.texts == [alone[one.index]] * 4
    assert read == [3]  # twelve sequences, three prompts read


@pytest.mark.parametrize("batch_size", [1, 6, 100])
def test_samples_do_not_depend_on_the_batch(stack, batch_size):
    assert sampled(stack, batch_size=batch_size) == sampled(stack)


def test_samples_do_not_depend_on_the_order_of_prompts(stack):
    straight, turned = sampled(stack), sampled(stack, PROMPTS[::-1])
    alone = sampled(stack, PROMPTS[1:2])
    for index in range(3):
        assert turned[2 - index]["texts"] == straight[index]["texts"]
    assert alone[0]["texts"] == straight[1]["texts"]


def test_samples_differ_by_number_and_by_seed(stack):
    one = sampled(stack)[0]["texts"]
    assert len(set(one)) == 3
    assert sampled(stack, seed="5/1")[0]["texts"] != one


def many_ends(stack, monkeypatch):
    """Ten prompts whose samples end after different numbers of tokens: every sixth token is EOS."""
    monkeypatch.setattr(stack[0].generation_config, "eos_token_id", list(range(2, VOCABULARY, 6)))
    return [[(5 * i + j) % (VOCABULARY - 3) + 3 for j in range(4 + 3 * i)] for i in range(10)]


@pytest.mark.parametrize(("n", "batch_size"), [(1, 4), (3, 8), (6, 8)])
def test_sequences_that_have_ended_are_replaced_and_samples_stay_the_same(stack, monkeypatch, n, batch_size):
    prompts = many_ends(stack, monkeypatch)
    alone = {index: sampled(stack, [prompt], n=n)[0] for index, prompt in enumerate(prompts)}
    assert len({length for one in alone.values() for length in one["lengths"]}) > 4
    passes, begun = [], []
    forward, begin = generate._Decoder._forward, generate._Decoder._begin
    monkeypatch.setattr(
        generate._Decoder, "_forward",
        lambda self, ids, seen, cache: passes.append(tuple(ids.shape)) or forward(self, ids, seen, cache),
    )  # fmt: skip
    monkeypatch.setattr(
        generate._Decoder, "_begin",
        lambda self, prompts, new, *on: begun.append([one.prompt for one in new]) or begin(self, prompts, new, *on),
    )  # fmt: skip
    together = sampled(stack, prompts, n=n, batch_size=batch_size)
    assert {index: {**one, "index": 0} for index, one in together.items()} == alone
    assert sorted(index for group in begun for index in set(group)) == sorted(range(10))  # each prompt is read once
    slots = max(batch_size // n, 1) * n
    assert max(rows for rows, width in passes) <= slots
    longest = [max(one["lengths"]) for one in together.values()]
    order, prompts_at_once = sorted(range(10), key=lambda index: -len(prompts[index])), slots // n
    batches = [order[start : start + prompts_at_once] for start in range(0, 10, prompts_at_once)]
    without = sum(max(longest[index] for index in batch) - 1 for batch in batches)
    steps = sum(width == 1 for _, width in passes)
    assert steps < without if prompts_at_once > 1 else steps == without


def test_an_interrupted_run_repeats_its_block_only(stack, monkeypatch):
    prompts = many_ends(stack, monkeypatch)
    monkeypatch.setattr(generate, "BATCHES_IN_BLOCK", 2)
    straight = sampled(stack, prompts, n=1, batch_size=2)
    order = sorted(range(10), key=lambda index: -len(prompts[index]))
    begun, begin = [], generate._Decoder._begin
    monkeypatch.setattr(
        generate._Decoder, "_begin",
        lambda self, prompts, new, *rest: begun.extend(one.prompt for one in new) or begin(self, prompts, new, *rest),
    )  # fmt: skip
    rest = sampled(stack, prompts, n=1, batch_size=2, done=set(order[:6]))
    assert set(begun) == set(order[4:])
    assert rest == {index: straight[index] for index in order[6:]}


@pytest.mark.parametrize("stop", [1, 2])
def test_a_resumed_run_gives_the_same_samples(stack, stop):
    straight = sampled(stack, batch_size=3)
    model, tokenizer = stack
    first = list(itertools.islice(stream_responses(model, tokenizer, PROMPTS, **SAMPLED, batch_size=3), stop))
    rest = sampled(stack, batch_size=3, done={one.index for one in first})
    assert sorted(rest) == sorted(set(straight) - {one.index for one in first})
    assert {**rest, **{one.index: asdict(one) for one in first}} == straight


def test_ends_at_any_of_several_eos_ids_and_marks_truncated_samples(stack):
    model, tokenizer = stack
    [free] = stream_responses(model, tokenizer, PROMPTS[:1], max_new_tokens=12)
    assert free.lengths == [12] and free.ended == [False]
    words = free.texts[0].split()
    stop = next(word for word in words if words.index(word) > 0)
    settings = model.generation_config
    before, settings.eos_token_id = settings.eos_token_id, [2, tokenizer.convert_tokens_to_ids(stop)]
    try:
        [cut] = stream_responses(model, tokenizer, PROMPTS[:1], max_new_tokens=12)
    finally:
        settings.eos_token_id = before
    assert cut.texts == [" ".join(words[: words.index(stop)])] and cut.ended == [True]
    assert cut.lengths == [words.index(stop) + 1]


def test_samples_stand_in_order_of_their_number_whichever_ends_first(stack, monkeypatch):
    def backwards(self, prompts, waiting, slots):
        for sequence in reversed(waiting):
            yield sequence, [3 + 10 * sequence.prompt + sequence.sample, 2]

    monkeypatch.setattr(generate._Decoder, "run", backwards)
    found = sampled(stack)
    assert [found[prompt]["texts"] for prompt in range(3)] == [
        ["w3", "w4", "w5"],
        ["w13", "w14", "w15"],
        ["w23", "w24", "w25"],
    ]


def test_frequencies_are_the_probabilities(stack):
    model, tokenizer = stack
    chosen = []
    for seed in range(20):
        [one] = stream_responses(
            model, tokenizer, PROMPTS[1:2], n=200, temperature=1.5, max_new_tokens=1, seed=seed, batch_size=200
        )
        chosen += [int(text.removeprefix("w") or 0) for text in one.texts]  # special tokens are no text
    logits = model(input_ids=torch.tensor(PROMPTS[1:2])).logits[0, -1].detach()
    expected = (logits / 1.5).softmax(-1) * len(chosen)
    common = (expected > 5) & (torch.arange(VOCABULARY) > 2)
    counts = torch.bincount(torch.tensor(chosen), minlength=VOCABULARY)
    chi_square = ((counts - expected) ** 2 / expected)[common].sum().item()
    assert common.sum() > 10
    assert chi_square < 2 * common.sum().item()  # its mean is their number, its deviation the root of twice that


def test_top_p_keeps_the_smallest_sufficient_set():
    choose = chooser(1.0, 0.6)
    logits = torch.tensor([[0.1, 0.5, 0.3, 0.1]]).log()
    drawn = {
        int(choose(logits, torch.tensor([key * 7919]), torch.tensor([step]))) for key in range(40) for step in range(5)
    }
    assert drawn == {1, 2}


def test_the_noise_is_standard_gumbel():
    keys, numbers = 50, 4000
    noise = torch.zeros(keys, numbers)
    _add_gumbel_noise(noise, torch.arange(keys) * 104729, torch.tensor([3]))
    noise = noise.double()
    # Five standard errors; the fourth moment of a Gumbel variable is 5.4 times its squared variance.
    variance, total = torch.pi**2 / 6, keys * numbers
    assert abs(noise.mean() - 0.5772) < 5 * (variance / total) ** 0.5
    assert abs(noise.var() - variance) < 5 * variance * (4.4 / total) ** 0.5
    rows = torch.corrcoef(noise)
    assert (rows - torch.eye(keys)).abs().max() < 5 / numbers**0.5  # near keys give unrelated numbers


def test_running_out_of_memory_splits_batches(stack, monkeypatch):
    straight = sampled(stack, batch_size=9)
    inner = generate._Decoder._forward

    def small(self, ids, seen, cache):
        if len(ids) > 2 and seen.shape[1] > len(PROMPTS[0]) + 3:
            raise torch.OutOfMemoryError
        return inner(self, ids, seen, cache)

    monkeypatch.setattr(generate._Decoder, "_forward", small)
    assert sampled(stack, batch_size=9) == straight

    def never(self, ids, seen, cache):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(generate._Decoder, "_forward", never)
    with pytest.raises(UserError, match="a prompt of 24 tokens does not fit"):
        sampled(stack)


def test_prompts_that_fill_the_context(stack):
    with pytest.raises(UserError, match="prompt 1: the prompt has no tokens"):
        sampled(stack, [[3], []])
    with pytest.raises(UserError, match="128 tokens and fills the model's context of 128"):
        sampled(stack, [[3] * 128])
    assert sampled(stack, [[3] * 126], temperature=0)[0]["lengths"] == [2, 2, 2]  # the context ends it

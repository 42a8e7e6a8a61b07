"""Text generation in batches, greedy or sampled; the cache of a prompt is computed once for all its samples.

Used to sample responses (`tuna_peft.feedback`), to answer benchmarks (`tuna_peft.evaluation`) and by `tuna-peft
generate`.

Shape suffixes: P prompts, B sequences, V vocabulary, T tokens of a prompt with its padding.
"""

from __future__ import annotations

import hashlib
import inspect
import itertools
import time
from collections import deque
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from tqdm.auto import tqdm
from transformers import DynamicCache, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer

from tuna_peft.errors import UserError
from tuna_peft.limits import context_length, prompts_per_batch, response_room
from tuna_peft.models.forward.scoring import without_peft
from tuna_peft.models.forward.segments import use_segments
from tuna_peft.models.generation.growing_cache import GrowingLayer


@dataclass(frozen=True)
class Generated:
    """The samples of one prompt.

    Attributes:
        index: Index of the prompt among those given.
        texts: The samples, without special tokens and surrounding white space.
        lengths: Number of generated tokens of each, EOS included.
        ended: Whether each ended with EOS; False where it was truncated.
    """

    index: int
    texts: list[str]
    lengths: list[int]
    ended: list[bool]


def generate_responses(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Sequence[int]], **options: Any
) -> list[str]:
    """One response per prompt, in the order of the prompts; greedy unless a `temperature` is given.

    Args:
        model: As in `stream_responses`, like all that follows.
        options: Keyword arguments of `stream_responses`, except `n`.
    """
    texts = [""] * len(prompts)
    for generated in stream_responses(model, tokenizer, prompts, **options):
        [texts[generated.index]] = generated.texts
    return texts


@torch.no_grad()
def stream_responses(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    n: int = 1,
    temperature: float = 0.0,
    top_p: float = 1.0,
    max_new_tokens: int = 128,
    seed: int | str = 0,
    batch_size: int = 32,
    done: Container[int] = frozenset(),
    description: str = "generating",
) -> Iterator[Generated]:
    """Yields the samples of a prompt as soon as the last of them ends; the longest prompts come first.

    A sample depends on the model, its prompt, `seed` and its number among the n: its random numbers are computed from
    these (see `_gumbel_noise`), not from its batch or from earlier samples. Batches of other shapes round matrix
    products differently, which can change a sample where two tokens are almost equally likely. To avoid that too, an
    interrupted run passes the same prompts again and says which are `done`: the batches stay the same.

    Args:
        model: Any causal LM, with or without adapters, on one device.
        tokenizer: Its tokenizer.
        prompts: Token ids, as training saw them (see `tuna_peft.data.texts.prompt_ids`).
        n: Samples per prompt.
        temperature: 0 is greedy.
        top_p: Nucleus sampling: sample from the smallest set of tokens with at least this total probability.
        max_new_tokens: Maximum tokens of a response; the end of the model's context also truncates it.
        seed: Any number or text.
        batch_size: Sequences (prompts times n) generated at once; halved when memory runs out.
        done: Indices of prompts whose samples are not needed.
        description: Label of the progress bar.

    Raises:
        UserError: A prompt is empty or fills the model's context, or one sequence alone does not fit into memory.
    """
    model.eval()
    decoder = _Decoder(model, tokenizer, _chooser(temperature, top_p), max_new_tokens)
    decoder.require_room(prompts)
    queue = deque(_batches(prompts, n, seed, batch_size, done))
    wanted = [index for index in range(len(prompts)) if index not in done]
    finished: dict[int, dict[int, list[int]]] = {}
    tokens, started = 0, time.monotonic()
    with tqdm(total=len(wanted), desc=description, unit=" prompts", leave=False, delay=2, disable=None) as bar:
        while queue:
            batch = queue.popleft()
            waiting = dict.fromkeys(batch)
            try:
                for sequence, ids in decoder.run(prompts, batch):
                    del waiting[sequence]
                    tokens += len(ids)
                    samples = finished.setdefault(sequence.prompt, {})
                    samples[sequence.sample] = ids
                    if len(samples) == n and sequence.prompt not in done:
                        del finished[sequence.prompt]
                        yield decoder.generated(sequence.prompt, [ids for _, ids in sorted(samples.items())])
                        bar.set_postfix_str(f"{tokens / (time.monotonic() - started):,.0f} tokens/s", refresh=False)
                        bar.update()
            except torch.OutOfMemoryError as error:
                if len(batch) == 1:
                    length = len(prompts[batch[0].prompt])
                    raise UserError(
                        f"a prompt of {length} tokens does not fit into memory with its response",
                        fix="Shorten the prompt, lower max_new_tokens, or quantize the base.",
                    ) from error
            if waiting:  # out of memory: split the rest of this batch and all that follow
                torch.cuda.empty_cache()
                queue.appendleft(list(waiting))
                queue = deque(part for entry in queue for part in _parts(entry, -(-len(batch) // 2)))


def context_of(model: torch.nn.Module) -> int | None:
    """Maximum tokens of a prompt with its response; None where the model's configuration gives no limit."""
    return context_length(without_peft(model).config)


class _Sequence(NamedTuple):
    """One sample to generate: its prompt's index, its number among the n, and the key of its random numbers."""

    prompt: int
    sample: int
    key: int


_Chooser = Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]


class _Decoder:
    """Generates one batch at a time with one model and one way to choose tokens."""

    def __init__(
        self, model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, choose: _Chooser, max_new_tokens: int
    ):
        self.model, self.tokenizer, self.choose, self.max_new_tokens = model, tokenizer, choose, max_new_tokens
        self.causal_lm = without_peft(model)
        use_segments(self.causal_lm)  # for its workaround: fast SDPA kernels on GPUs without FlashAttention
        self.context = context_of(model)
        takes = inspect.signature(self.causal_lm.forward).parameters
        self.takes_positions = "position_ids" in takes
        self.cache_name = "cache" if "cache" in takes else "past_key_values"  # renamed in transformers 5.24
        ends = getattr(self.causal_lm.generation_config, "eos_token_id", None)
        self.ends = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}

    def require_room(self, prompts: Sequence[Sequence[int]]) -> None:
        """UserError for a prompt without tokens, or without room for one more."""
        for index, prompt in enumerate(prompts):
            if not prompt:
                raise UserError("the prompt has no tokens", where=f"prompt {index}")
            if self.context is not None and len(prompt) >= self.context:
                raise UserError(
                    f"the prompt has {len(prompt)} tokens and fills the model's context of {self.context}",
                    where=f"prompt {index}",
                    fix="Shorten the prompt, or leave it out.",
                )

    def run(
        self, prompts: Sequence[Sequence[int]], batch: Sequence[_Sequence]
    ) -> Iterator[tuple[_Sequence, list[int]]]:
        """Yields each sequence with its tokens when it ends, and removes it from the batch."""
        device = next(self.model.parameters()).device
        # Each prompt is read once; its cache is then copied for all its samples.
        rows = list(dict.fromkeys(sequence.prompt for sequence in batch))
        cache, logits_PV, seen_PT = self._read([prompts[row] for row in rows], device)
        row_of = torch.tensor([rows.index(sequence.prompt) for sequence in batch], device=device)
        if len(rows) < len(batch):
            cache.batch_select_indices(row_of)
        logits_BV, seen_BT = logits_PV[row_of], seen_PT[row_of]
        del logits_PV
        keys_B = torch.tensor([sequence.key for sequence in batch], device=device)
        rooms = [response_room(self.max_new_tokens, len(prompts[each.prompt]), self.context) for each in batch]
        active = [(sequence, room, list[int]()) for sequence, room in zip(batch, rooms, strict=True)]
        for step in itertools.count():
            chosen_B = self.choose(logits_BV, keys_B, step)
            unfinished = []
            # `tolist` waits for the GPU once per step, for all sequences together.
            for number, ((sequence, max_new, ids), token) in enumerate(zip(active, chosen_B.tolist(), strict=True)):
                ids.append(token)
                if token in self.ends or len(ids) == max_new:
                    yield sequence, ids
                else:
                    unfinished.append(number)
            if not unfinished:
                return
            if len(unfinished) < len(active):
                active = [active[number] for number in unfinished]
                kept = torch.tensor(unfinished, device=device)
                cache.batch_select_indices(kept)
                chosen_B, keys_B, seen_BT = chosen_B[kept], keys_B[kept], seen_BT[kept]
            seen_BT = torch.cat([seen_BT, seen_BT.new_ones(len(active), 1)], dim=1)
            del logits_BV  # before the next ones, which are as large
            logits_BV = self._forward(chosen_B[:, None], seen_BT, cache).logits[:, -1]  # noqa: F841 - read above

    def generated(self, index: int, samples: list[list[int]]) -> Generated:
        """A prompt's samples as text."""
        ended = [ids[-1] in self.ends for ids in samples]
        bare = [ids[:-1] if end else ids for ids, end in zip(samples, ended, strict=True)]
        texts = [self.tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in bare]
        return Generated(index, texts, [len(ids) for ids in samples], ended)

    def _read(self, prompts: list[Sequence[int]], device: torch.device) -> tuple[Any, torch.Tensor, torch.Tensor]:
        """Prefill: the cache of the prompts, the logits `(P, V)` after them, and their attention mask `(P, T)`."""
        width, pad = max(map(len, prompts)), self.tokenizer.pad_token_id or 0
        ids_PT = torch.tensor([[pad] * (width - len(ids)) + list(ids) for ids in prompts], device=device)
        # From lengths, not from ids: the padding token may be EOS.
        seen_PT = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts], device=device)
        output = self._forward(ids_PT, seen_PT, self._new_cache())
        return output[self.cache_name], output.logits[:, -1], seen_PT

    def _new_cache(self) -> DynamicCache | None:
        """An empty cache; None for models that need another kind of cache, which they create themselves."""
        if not self.causal_lm._supports_default_dynamic_cache():
            return None
        cache = DynamicCache(config=self.causal_lm.config)
        cache.layers = [GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
        return cache

    def _forward(self, ids: torch.Tensor, seen: torch.Tensor, cache: Any) -> Any:
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": seen, self.cache_name: cache}
        if self.takes_positions:
            inputs["position_ids"] = (seen.cumsum(-1) - 1).clamp_min(0)[:, -ids.shape[1] :]
        return self.model(**inputs, use_cache=True, logits_to_keep=1)


def _batches(
    prompts: Sequence[Sequence[int]], n: int, seed: int | str, batch_size: int, done: Container[int]
) -> Iterator[list[_Sequence]]:
    """Prompts of similar length together, the longest first, so that running out of memory shows at once."""
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    for chosen in _parts(order, prompts_per_batch(batch_size, n)):
        if not all(index in done for index in chosen):
            yield [_Sequence(i, k, _key(seed, prompts[i], k)) for i in chosen for k in range(n)]


def _parts(items: list[Any], size: int) -> Iterator[list[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _key(seed: int | str, prompt: Sequence[int], sample: int) -> int:
    """64 bits that differ for every seed, prompt and sample."""
    text = f"{seed}\n{sample}\n{','.join(map(str, prompt))}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big", signed=True)


def _chooser(temperature: float, top_p: float) -> _Chooser:
    """The next token of each sequence from its logits `(B, V)`, its key and the number of the step."""
    if temperature == 0:
        return lambda logits_BV, keys_B, step: logits_BV.argmax(-1)

    def sample(logits_BV: torch.Tensor, keys_B: torch.Tensor, step: int) -> torch.Tensor:
        logits_BV = logits_BV.float() / temperature
        if top_p < 1:
            sorted_BV, order_BV = torch.sort(logits_BV.softmax(-1), dim=-1, descending=True, stable=True)
            beyond_BV = sorted_BV.cumsum(-1) - sorted_BV >= top_p  # the more likely tokens already add up to top_p
            logits_BV = logits_BV.masked_fill(beyond_BV.scatter(-1, order_BV, beyond_BV), -torch.inf)
        return (logits_BV + _gumbel_noise(keys_B, step, logits_BV.shape[-1])).argmax(-1)

    return sample


def _gumbel_noise(keys_B: torch.Tensor, step: int, vocabulary: int) -> torch.Tensor:
    """`(B, V)` standard Gumbel noise, each number a hash of (key, step, token); argmax(logits + noise) is a sample.

    The hash is SplitMix64 (Steele et al. 2014) of a counter. Unlike `torch.Generator` it has no state that depends on
    the rest of the batch, and CPU and GPU give the same numbers.
    """
    tokens_V = torch.arange(vocabulary, device=keys_B.device)
    bits_BV = keys_B[:, None] + (step * vocabulary + 1 + tokens_V) * _GOLDEN
    bits_BV = (bits_BV ^ _shifted(bits_BV, 30)) * _MIX1
    bits_BV = (bits_BV ^ _shifted(bits_BV, 27)) * _MIX2
    bits_BV = bits_BV ^ _shifted(bits_BV, 31)
    uniform_BV = (_shifted(bits_BV, 40).float() + 0.5) * 2.0**-24
    return -torch.log(-torch.log1p(-uniform_BV))


def _shifted(bits: torch.Tensor, by: int) -> torch.Tensor:
    """Logical shift to the right, which fills with zeros; torch's shift repeats the sign."""
    return (bits >> by) & ((1 << (64 - by)) - 1)


# SplitMix64's constants as signed 64-bit integers; products wrap around.
_GOLDEN, _MIX1, _MIX2 = (value - (1 << 64) for value in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))

"""Text generation in batches, greedy or sampled; the cache of a prompt is computed once for all its samples.

Used to sample responses (`tuna_peft.feedback`), to answer benchmarks (`tuna_peft.evaluation`) and by `tuna-peft
generate`.

Shape suffixes: P prompts, B sequences, V vocabulary, T tokens of a prompt with its padding.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import time
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.nn.functional import pad
from transformers import DynamicCache, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer

from tuna_peft.errors import UserError
from tuna_peft.limits import BATCHES_IN_BLOCK, context_length, prompts_per_batch, response_room
from tuna_peft.models.forward.scoring import without_peft
from tuna_peft.models.forward.segments import use_segments
from tuna_peft.models.generation.choose import Chooser, chooser
from tuna_peft.models.generation.dense import dense_weights, has_room_for_dense
from tuna_peft.models.generation.growing_cache import GrowingLayer
from tuna_peft.models.workers import split
from tuna_peft.progress import Progress


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
    dense: bool | None = None,
    description: str = "generating",
    watch: Callable[[int], object] | None = None,
) -> Iterator[Generated]:
    """Yields the samples of a prompt as soon as the last of them ends; the longest prompts come first.

    The prompts are processed in blocks of `BATCHES_IN_BLOCK` batches. Within a block, sequences that have ended are
    replaced by waiting ones, so the batch stays full until the block runs out of prompts.

    A sample depends on the model, its prompt, `seed` and its number among the n: its random numbers are computed from
    these (see `choose`), not from its batch or from earlier samples. Batches of other shapes round matrix products
    differently, which can change a sample where two tokens are almost equally likely. To avoid that too, an
    interrupted run passes the same prompts again and says which are `done`: only blocks that are done as a whole are
    skipped, so the batches stay the same. It also passes the same `dense`. Blocks are divided among the processes of a
    run, see `tuna_peft.models.workers`.

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
        dense: Whether a dense copy of the weights is held meanwhile, see `dense_weights`; by default if it fits into
            memory.
        description: Label of the progress bar.
        watch: For a single sequence: is given each token when it is chosen, except EOS. There is no progress bar then.

    Raises:
        UserError: A prompt is empty or fills the model's context, or one sequence alone does not fit into memory.
    """
    _require_room(prompts, context_of(model))
    wanted = sum(index not in done for index in range(len(prompts)))
    tokens, started = 0, time.monotonic()
    slots = prompts_per_batch(batch_size, n) * n
    with Progress(description, wanted, "prompts", off=watch is not None) as progress:
        for generated in split(
            model, _generating, _blocks(prompts, BATCHES_IN_BLOCK * slots // n, done), tokenizer=tokenizer, n=n,
            temperature=temperature, top_p=top_p, max_new_tokens=max_new_tokens, seed=seed, slots=slots, watch=watch,
            dense=has_room_for_dense(model) if dense is None else dense,
        ):  # fmt: skip
            if generated.index not in done:
                tokens += sum(generated.lengths)
                yield generated
                progress.update(speed=f"{tokens / (time.monotonic() - started):,.0f} tokens/s")


_Block = dict[int, Sequence[int]]
"""Token ids of prompts by index."""


@contextlib.contextmanager
def _generating(
    model: torch.nn.Module,
    *,
    tokenizer: PreTrainedTokenizerBase,
    n: int,
    temperature: float,
    top_p: float,
    max_new_tokens: int,
    seed: int | str,
    slots: int,
    dense: bool,
    watch: Callable[[int], object] | None,
) -> Iterator[Callable[[_Block], Iterator[Generated]]]:
    """See `tuna_peft.models.workers.Work`: a unit is a block of prompts."""
    model.eval()
    decoder = _Decoder(model, tokenizer, chooser(temperature, top_p), max_new_tokens, watch)

    def generate(block: _Block) -> Iterator[Generated]:
        nonlocal slots
        finished: dict[int, dict[int, list[int]]] = {index: {} for index in block}
        left = dict.fromkeys(_Sequence(i, k, _key(seed, ids, k)) for i, ids in block.items() for k in range(n))
        while left:
            try:
                for sequence, ids in decoder.run(block, list(left), slots):
                    del left[sequence]
                    samples = finished[sequence.prompt]
                    samples[sequence.sample] = ids
                    if len(samples) == n:
                        yield decoder.generated(sequence.prompt, [ids for _, ids in sorted(samples.items())])
            except torch.OutOfMemoryError as error:
                if slots == 1:
                    length = len(block[next(iter(left)).prompt])
                    raise UserError(
                        f"a prompt of {length} tokens does not fit into memory with its response",
                        fix="Shorten the prompt, lower max_new_tokens, or quantize the base.",
                    ) from error
                slots = -(-min(slots, len(left)) // 2)  # for all that follow
                torch.cuda.empty_cache()

    with dense_weights(model) if dense else contextlib.nullcontext():
        yield generate


def _require_room(prompts: Sequence[Sequence[int]], context: int | None) -> None:
    """UserError for a prompt without tokens, or without room for one more."""
    for index, prompt in enumerate(prompts):
        if not prompt:
            raise UserError("the prompt has no tokens", where=f"prompt {index}")
        if context is not None and len(prompt) >= context:
            raise UserError(
                f"the prompt has {len(prompt)} tokens and fills the model's context of {context}",
                where=f"prompt {index}",
                fix="Shorten the prompt, or leave it out.",
            )


def context_of(model: torch.nn.Module) -> int | None:
    """Maximum tokens of a prompt with its response; None where the model's configuration gives no limit."""
    return context_length(without_peft(model).config)


class _Sequence(NamedTuple):
    """One sample to generate: its prompt's index, its number among the n, and the key of its random numbers."""

    prompt: int
    sample: int
    key: int


@dataclass
class _Active:
    """A sequence that is being generated: `ids` after a prompt of `prompt` tokens, at most `room` of them."""

    sequence: _Sequence
    prompt: int
    room: int
    ids: list[int]


@dataclass
class _Batch:
    """Sequences that are generated together.

    Attributes:
        active: One entry for each row; None for a sequence that has ended, whose row stays until `rebuild`.
        cache: Keys and values.
        origin_B: Row of the cache for each sequence, before `expand`; later they are the same.
        logits_BV: Logits of the next token.
        seen_BT: Attention mask.
        keys_B: Keys of the random numbers.
        steps_B: Tokens generated so far.
    """

    active: list[_Active | None]
    cache: Any
    origin_B: torch.Tensor
    logits_BV: torch.Tensor
    seen_BT: torch.Tensor
    keys_B: torch.Tensor
    steps_B: torch.Tensor

    @property
    def grows(self) -> bool:
        """Whether sequences can be added: not to caches of other kinds, such as those of sliding windows."""
        return isinstance(self.cache, DynamicCache) and all(type(one) is GrowingLayer for one in self.cache.layers)

    def expand(self) -> None:
        """Copies the cache of each prompt for its samples."""
        if len({active.sequence.prompt for active in self.active if active}) < len(self.active):
            self.cache.batch_select_indices(self.origin_B)

    def rebuild(self, rows: list[int], more: _Batch | None = None) -> None:
        """Keeps these rows and adds those of `more`, which is not expanded."""
        kept = torch.tensor(rows, device=self.keys_B.device)
        parts = [(self, kept)] if more is None else [(self, kept), (more, torch.arange(len(more.active)).to(kept))]
        self.active = [self.active[row] for row in rows] + (more.active if more else [])
        if self.grows:
            width = max(active.prompt + len(active.ids) for active in self.active if active)
            for number, layer in enumerate(self.cache.layers):
                if more is None:
                    layer.rebuild(kept, width)
                else:
                    layer.rebuild(kept, width, more.cache.layers[number], more.origin_B)
                    more.cache.layers[number].reset()
            seen = [batch.seen_BT[index, -width:] for batch, index in parts]
            self.seen_BT = torch.cat([pad(each, (width - each.shape[1], 0)) for each in seen])
        else:
            self.cache.batch_select_indices(kept)
            self.seen_BT = self.seen_BT[kept]
        for name in ("logits_BV", "keys_B", "steps_B"):
            setattr(self, name, torch.cat([getattr(batch, name)[index] for batch, index in parts]))


class _Decoder:
    """Generates one batch at a time with one model and one way to choose tokens."""

    def __init__(
        self,
        model: torch.nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        choose: Chooser,
        max_new_tokens: int,
        watch: Callable[[int], object] | None = None,
    ):
        self.model, self.tokenizer, self.choose, self.max_new_tokens = model, tokenizer, choose, max_new_tokens
        self.watch = watch
        self.causal_lm = without_peft(model)
        use_segments(self.causal_lm)  # for its workaround: fast SDPA kernels on GPUs without FlashAttention
        self.context = context_of(model)
        takes = inspect.signature(self.causal_lm.forward).parameters
        self.takes_positions = "position_ids" in takes
        self.cache_name = "cache" if "cache" in takes else "past_key_values"  # renamed in transformers 5.24
        ends = getattr(self.causal_lm.generation_config, "eos_token_id", None)
        self.ends = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}

    def run(self, prompts: _Block, waiting: Sequence[_Sequence], slots: int) -> Iterator[tuple[_Sequence, list[int]]]:
        """Generates `slots` sequences at a time and yields each with its tokens when it ends.

        A sequence that has ended stays in the batch until a quarter of it has: then the next ones take these places,
        and the cache is copied once for all of them.
        """
        device = next(self.model.parameters()).device
        batch, waiting = self._begin(prompts, waiting[:slots], device), waiting[slots:]
        batch.expand()
        while True:
            chosen_B = self.choose(batch.logits_BV, batch.keys_B, batch.steps_B)
            # `tolist` waits for the GPU once per step, for all sequences together.
            for row, token in enumerate(chosen_B.tolist()):
                if (active := batch.active[row]) is not None:
                    active.ids.append(token)
                    if self.watch is not None and token not in self.ends:
                        self.watch(token)
                    if token in self.ends or len(active.ids) == active.room:
                        batch.active[row] = None
                        yield active.sequence, active.ids
            rows = [row for row, active in enumerate(batch.active) if active is not None]
            if not rows:
                if not waiting:
                    return
                del batch  # before the next one, which is as large
                batch, waiting = self._begin(prompts, waiting[:slots], device), waiting[slots:]
                batch.expand()
                continue
            alive_B1 = torch.tensor([[active is not None] for active in batch.active], device=device)
            batch.seen_BT = torch.cat([batch.seen_BT, alive_B1.to(batch.seen_BT.dtype)], dim=1)
            del batch.logits_BV  # before the next ones, which are as large
            batch.logits_BV = self._forward(chosen_B[:, None], batch.seen_BT, batch.cache).logits[:, -1]
            batch.steps_B = batch.steps_B + 1
            count = _whole_prompts(waiting, slots - len(rows)) if batch.grows else 0
            if count and (count >= slots // 4 or count == len(waiting)):
                batch.rebuild(rows, self._begin(prompts, waiting[:count], device))
                waiting = waiting[count:]
            elif len(batch.active) - len(rows) >= max(len(batch.active) // 4, 1):
                batch.rebuild(rows)

    def _begin(self, prompts: _Block, sequences: Sequence[_Sequence], device: torch.device) -> _Batch:
        """A batch of these sequences after their prompts. Each prompt is read once, for all its samples."""
        places = list(dict.fromkeys(sequence.prompt for sequence in sequences))
        cache, logits_PV, seen_PT = self._read([prompts[place] for place in places], device)
        origin_B = torch.tensor([places.index(sequence.prompt) for sequence in sequences], device=device)
        lengths = [len(prompts[sequence.prompt]) for sequence in sequences]
        return _Batch(
            [
                _Active(sequence, length, response_room(self.max_new_tokens, length, self.context), [])
                for sequence, length in zip(sequences, lengths, strict=True)
            ],
            cache, origin_B, logits_PV[origin_B], seen_PT[origin_B],
            torch.tensor([sequence.key for sequence in sequences], device=device), torch.zeros_like(origin_B),
        )  # fmt: skip

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


def _blocks(prompts: Sequence[Sequence[int]], size: int, done: Container[int]) -> Iterator[_Block]:
    """Prompts of similar length together, the longest first, so that running out of memory shows at once."""
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    for chosen in (order[start : start + size] for start in range(0, len(order), size)):
        if not all(index in done for index in chosen):
            yield {index: prompts[index] for index in chosen}


def _whole_prompts(waiting: Sequence[_Sequence], room: int) -> int:
    """How many of the first sequences fit into `room` without dividing a prompt's, which would be read twice."""
    count = min(len(waiting), room)
    while 0 < count < len(waiting) and waiting[count].prompt == waiting[count - 1].prompt:
        count -= 1
    return count


def _key(seed: int | str, prompt: Sequence[int], sample: int) -> int:
    """64 bits that differ for every seed, prompt and sample."""
    text = f"{seed}\n{sample}\n{','.join(map(str, prompt))}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big", signed=True)

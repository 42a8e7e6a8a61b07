"""The tokenizer: byte-level BPE, trained on the generator's own text."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING

from pico_world import documents, template
from tuna_peft.assets import pico_lexicon

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

VOCAB_SIZE = 1280
MAX_LENGTH = 512
PAD, BOS, EOS = "<pad>", "<s>", "</s>"
_TRAINING_DOCUMENTS = 30_000


def train(seed: int) -> PreTrainedTokenizerFast:
    """A fast tokenizer that writes `<s>` first, as LLaMA's does.

    The three headings of the prompt template are single tokens: the prompt gets shorter by a quarter, and no merge
    can ever cross from prompt to response.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    headings = (template.INSTRUCTION_HEADING, template.INPUT_HEADING, template.RESPONSE_HEADING)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(headings),
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_text(seed), trainer)
    tokenizer.add_tokens([AddedToken(heading, special=False, normalized=False) for heading in headings])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=MAX_LENGTH,
        clean_up_tokenization_spaces=False,
        chat_template=template.CHAT_TEMPLATE,
    )


def _text(seed: int) -> Iterator[str]:
    """Documents, and every word of the lexicon as it stands at a line's start and inside a line."""
    for document in itertools.islice(documents.stream(seed), _TRAINING_DOCUMENTS):
        yield document.head + document.body
    for word in (*pico_lexicon.WORDS, *pico_lexicon.NAMES, *pico_lexicon.CITIES, *pico_lexicon.OPPOSITE_OF):
        yield from (f"{word}, {word}" for _ in range(100))

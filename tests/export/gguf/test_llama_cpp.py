"""GGUF files in llama.cpp itself, against transformers and PEFT: `make verify-gguf` installs it and prints the table.

llama.cpp comes prebuilt in the npm package `node-llama-cpp`; without it in `build/llama-cpp` these tests skip.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from chat_templates import PUBLISHED
from llama_family import FAMILY, ROPE_LINEAR, ROPE_LLAMA3, ROPE_YARN, TEXTS_FOR_LLAMA_CPP, write_model
from node_llama_cpp import IS_INSTALLED, LLAMA_CPP, NEW_TOKENS, ask
from ollama import render, template_of
from peft import PeftModel
from test_modelfile import SYSTEM, TALK, tokenizer_with
from tiny_llama import load_tiny, stack_on
from transformers import AutoModelForCausalLM, AutoTokenizer

from tuna_peft.data.templates import ALPACA_NO_INPUT
from tuna_peft.export.chat_template import chat_template_of
from tuna_peft.export.combine import combine_stack
from tuna_peft.export.gguf.adapter import export_gguf_adapter
from tuna_peft.export.gguf.model import export_gguf
from tuna_peft.export.merge import merge_stack
from tuna_peft.models.base.load import resolve_model_path
from tuna_peft.models.stack.files import save_stack

ROOT = Path(__file__).parents[3]
LLAMA2 = ROOT.parent / "shared" / "data" / "tokenizers" / "llama2-7b"
STORIES = ROOT.parent / "shared" / "data" / "checkpoints" / "stories260K"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not IS_INSTALLED, reason=f"no llama.cpp in {LLAMA_CPP}: run `make verify-gguf`"),
]

SOURCES = {
    "pico-LLaMA": (
        resolve_model_path("builtin:pico-llama"),
        [
            "### Instruction:\nHow many of these are fruits?\n\n### Input:\napple, dog, pear\n\n### Response:\n",
            "### Instruction:\nWhat is 3 plus 4?\n\n### Response:\n",
        ],
    ),
    "stories260K": (str(STORIES), ["Once upon a time, there was a little girl", "The dog ran to the big tree. It"]),
}


@torch.no_grad()
def expect(model: torch.nn.Module, prompts: list[list[int]]) -> tuple[list[torch.Tensor], list[list[int]]]:
    """Logits and greedy continuations (to the end of sequence) by transformers."""
    logits, continuations = [], []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        logits.append(model(input_ids=ids).logits[0].double())
        made = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW_TOKENS
        )
        continuations.append(made[0, len(prompt) :].tolist())
    return logits, continuations


def divergence(expected: list[torch.Tensor], found: list[torch.Tensor]) -> tuple[float, float]:
    """Mean KL over all positions, and the largest difference of a logit."""
    p, q = torch.cat(expected), torch.cat(found)
    kl = (p.softmax(-1) * (p.log_softmax(-1) - q.log_softmax(-1))).sum(-1).mean().item()
    return kl, (p - q).abs().max().item()


def same_start(left: list[list[int]], right: list[list[int]]) -> str:
    """How many greedy tokens agree before the first that does not, of how many."""
    equal = 0
    for ours, theirs in zip(left, right, strict=True):
        agree = [a == b for a, b in zip(ours, theirs, strict=False)]
        equal += agree.index(False) if False in agree else len(agree)
    return f"{equal}/{sum(map(len, left))}"


def load(folder: str | Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()


@pytest.fixture(scope="module", params=SOURCES)
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str, Path]:
    """A base, and a stack of three adapters on it in NF4, of different ranks and scalings."""
    name = request.param
    base, _ = SOURCES[name]
    if not Path(base).is_dir():
        pytest.skip(f"no {base}: the real data is not here")
    folder = tmp_path_factory.mktemp(name)
    settings = {"target_modules": "all-linear", "lora_alpha": 16}
    live = stack_on(
        load_tiny(base, "nf4"),
        sft={"r": 8, **settings},
        probabilistic={"r": 4, **settings},
        contextual={"r": 4, "use_rslora": True, **settings},
    )
    save_stack(live, folder / "stack", {"template": "alpaca"})
    return name, base, folder


def prompts_of(name: str, base: str) -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(base)
    return [tokenizer(text).input_ids for text in SOURCES[name][1]]


def test_merged_models(source: tuple[str, str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    name, base, folder = source
    prompts = prompts_of(name, base)
    merge_stack(folder / "stack", folder / "merged", dtype="float32", device="cpu")
    types = ["f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"]
    report = export_gguf(folder / "merged", folder / "gguf", types=types)
    expected, greedy = expect(load(folder / "merged"), prompts)
    tokenizer = AutoTokenizer.from_pretrained(base)
    for type, file in zip(types, report.files, strict=True):
        answer = ask(folder / "gguf" / file, prompts, texts=TEXTS_FOR_LLAMA_CPP)
        format_kl, _ = divergence(expected, expect(load(folder / "gguf", gguf_file=file), prompts)[0])
        kl, largest = divergence(expected, answer.logits)
        with capsys.disabled():
            print(
                f"\n{name:12} merged {type:5} {report.files[file] / 2**20:6.2f} MiB  KL {kl:8.1e}, of the weights "
                f"alone {format_kl:8.1e}  largest logit difference {largest:7.1e}  "
                f"greedy tokens agree {same_start(greedy, answer.continuations)}",
                end="",
            )
        assert answer.adds_bos
        for text, tokens in zip(TEXTS_FOR_LLAMA_CPP, answer.tokens, strict=True):
            assert tokens == tokenizer(text, add_special_tokens=False).input_ids, text
        if type == "f32":
            assert answer.continuations == greedy
        # llama.cpp rounds activations as it finds the weights: to 16 bits, and to 8 where weights are quantised.
        assert kl <= (1e-9 if type == "f32" else 3 * format_kl + (5e-3 if type.startswith("q") else 1e-5))


def test_base_with_gguf_adapter(source: tuple[str, str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    name, base, folder = source
    prompts = prompts_of(name, base)
    [model] = export_gguf(base, folder / "base-gguf", types=["f32"], name="base").files
    combine_stack(folder / "stack", folder / "combined")
    plain = PeftModel.from_pretrained(load(base), str(folder / "combined")).eval()
    expected, greedy = expect(plain, prompts)
    for origin in ("stack", "combined"):
        for type in ("f32", "f16"):
            [adapter] = export_gguf_adapter(folder / origin, folder / "lora", type=type).files
            answer = ask(folder / "base-gguf" / model, prompts, lora=folder / "lora" / adapter)
            kl, largest = divergence(expected, answer.logits)
            with capsys.disabled():
                print(
                    f"\n{name:12} base f32 + {origin:8} as adapter {type}  KL {kl:8.1e}  largest logit difference "
                    f"{largest:7.1e}  greedy tokens agree {same_start(greedy, answer.continuations)}",
                    end="",
                )
            assert kl < {"f32": 1e-9, "f16": 1e-5}[type]
            if type == "f32":
                assert answer.continuations == greedy
    without, _ = divergence(expected, ask(folder / "base-gguf" / model, prompts).logits)
    assert without > 1e-5  # the adapter does something


@pytest.mark.skipif(not LLAMA2.is_dir(), reason=f"no {LLAMA2}: the real data is not here")
def test_the_chat_template_gives_the_tokens_of_training(tmp_path: Path) -> None:
    """LLaMA 2's SentencePiece: transformers needs a space behind a written BOS, llama.cpp puts one there itself."""
    folder = write_model(tmp_path / "model", "llama", vocab_size=32000)
    for file in LLAMA2.glob("tokenizer*.json"):
        shutil.copyfile(file, folder / file.name)
    own = AutoTokenizer.from_pretrained(folder)
    template = chat_template_of({"template": "alpaca"}, own)
    assert template is not None
    assert "bos_token + ' '" in template
    (folder / "chat_template.jinja").write_text(template)
    [file_name] = export_gguf(folder, tmp_path / "gguf", types=["q4_0"]).files
    stored = gguf.GGUFReader(tmp_path / "gguf" / file_name).fields["tokenizer.chat_template"].contents()
    message = [{"role": "user", "content": "Name three fruits."}]
    prompt = own.apply_chat_template(message, chat_template=stored, tokenize=False)
    trained = own(ALPACA_NO_INPUT.replace("{instruction}", "Name three fruits.")).input_ids
    answer = ask(tmp_path / "gguf" / file_name, [], texts=[prompt, prompt.removeprefix("<s>")])
    assert answer.tokens == [trained, trained[1:]]


@pytest.mark.parametrize("name", [*PUBLISHED, "metaspace llama-2", "metaspace mistral"])
def test_ollama_prompts_have_the_tokens_of_the_chat_template(tmp_path: Path, name: str) -> None:
    *kind, published = name.split()
    tokenizer = tokenizer_with(published, *kind)
    folder = write_model(tmp_path / "model", "llama", vocab_size=len(tokenizer) + 5)
    tokenizer.save_pretrained(folder)
    stack = {"base": {"model": "x/y", "revision": None}, "prompt": {"template": "chat"}}
    (folder / "tuna_export.json").write_text(json.dumps({"stack": stack}))
    [file] = export_gguf(folder, tmp_path / "gguf", types=["f32"]).files
    template = template_of(tmp_path / "gguf" / "Modelfile")
    own = AutoTokenizer.from_pretrained(folder)
    assert template is not None
    talks = [TALK[:5]] if "gemma-2" in name else [TALK[:5], [SYSTEM, *TALK[:5]]]
    answer = ask(tmp_path / "gguf" / file, [], texts=[render(template, talk) for talk in talks])
    begin = [own.bos_token_id] if answer.adds_bos else []
    for talk, tokens in zip(talks, answer.tokens, strict=True):
        assert begin + tokens == own.apply_chat_template(talk, add_generation_prompt=True, return_dict=False)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        *((family, {}) for family in FAMILY),
        ("llama-tied", {"rope_parameters": ROPE_LLAMA3}),
        ("llama", {"rope_parameters": ROPE_LINEAR}),
        ("llama", {"rope_parameters": ROPE_YARN}),
        ("qwen2", {"rope_parameters": ROPE_YARN}),
    ],
    ids=lambda value: value if isinstance(value, str) else value.get("rope_parameters", {}).get("rope_type", "plain"),
)
def test_every_family(
    tmp_path: Path, family: str, changes: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_model(tmp_path / "model", family, **changes)
    [file] = export_gguf(folder, tmp_path / "gguf", types=["f32"]).files
    tokenizer = AutoTokenizer.from_pretrained(folder)
    # Past what was the context before its extension; within Mistral's sliding window.
    prompts = [[(7 * i + 3) % len(tokenizer) for i in range(100)]]
    model = load(folder)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    expected, _ = expect(model, prompts)
    answer = ask(tmp_path / "gguf" / file, prompts, texts=TEXTS_FOR_LLAMA_CPP)
    kl, largest = divergence(expected, answer.logits)
    rope = changes.get("rope_parameters", {}).get("rope_type", "no scaling")
    with capsys.disabled():
        print(f"\nrandom {family:11} {rope:10}  KL {kl:8.1e}  largest logit difference {largest:7.1e}", end="")
    assert answer.adds_bos == (tokenizer("a").input_ids[0] == tokenizer.bos_token_id)
    for text, tokens in zip(TEXTS_FOR_LLAMA_CPP, answer.tokens, strict=True):
        assert tokens == tokenizer(text, add_special_tokens=False).input_ids, text
    assert kl < (1e-5 if family == "gemma3" else 1e-8)  # llama.cpp looks GELU up in a table of fp16

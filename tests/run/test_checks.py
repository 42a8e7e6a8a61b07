"""What a run and a dry run refuse before any weight is loaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from families import SMALL
from safetensors.torch import save_file

from tuna_peft.errors import UserError
from tuna_peft.models.base.load import load_config_and_tokenizer, resolve_model_path
from tuna_peft.recipe.load import load_recipe
from tuna_peft.recipe.resolved import resolve_stages
from tuna_peft.run.checks import check_base, check_options
from tuna_peft.run.dry_run import describe_recipe
from tuna_peft.run.inputs import encode_rows

PICO = Path(resolve_model_path("builtin:pico-llama"))
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
FAMILIES = {
    "mixtral": ("MixtralConfig", EXPERTS),
    "qwen3-moe": ("Qwen3MoeConfig", {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2,
                                     "moe_intermediate_size": 64}),
    "gpt2": ("GPT2Config", {"n_embd": 64, "n_layer": 2, "n_head": 4}),
    "mamba": ("MambaConfig", {"state_size": 8}),
    "llama": ("LlamaConfig", {}),
}  # fmt: skip


@pytest.fixture
def base(tmp_path):
    """Makes a folder with a configuration and pico-LLaMA's tokenizer, and weights that no check reads."""

    def make(family: str, **config) -> str:
        folder = tmp_path / family
        name, extra = FAMILIES[family]
        getattr(transformers, name)(**{**SMALL, "vocab_size": 1280, **extra}).save_pretrained(folder)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(PICO / file, folder / file)
        save_file({"any": torch.zeros(1)}, folder / "model.safetensors")
        stored = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**stored, **config}))
        return str(folder)

    return make


def checked(recipe_file, *overrides):
    recipe = load_recipe(recipe_file, overrides, check=False)
    return check_base(recipe, resolve_stages(recipe))


@pytest.mark.parametrize("family", ["mixtral", "qwen3-moe"])
def test_experts_are_refused_with_the_targets_that_work(recipe_file, base, family):
    model = f"base.model={base(family)}"
    with pytest.raises(UserError, match=r"not a linear layer\n.*\[k_proj, o_proj, q_proj, v_proj\]"):
        checked(recipe_file, model)
    checked(recipe_file, model, "lora.target_modules=[k_proj, o_proj, q_proj, v_proj]")


def test_weights_that_are_not_there_are_noticed_before_loading(recipe_file, base):
    folder = base("llama")
    checked(recipe_file, f"base.model={folder}")
    Path(folder, "model.safetensors").unlink()
    with pytest.raises(UserError, match="the folder has no weights in safetensors"):
        checked(recipe_file, f"base.model={folder}")


def test_conv1d_is_refused_while_merging_is_on(recipe_file, base):
    model = f"base.model={base('gpt2')}"
    with pytest.raises(UserError, match="has a Conv1D, not a Linear, at 'transformer.h.0.attn.c_attn'"):
        checked(recipe_file, model)
    checked(recipe_file, model, "export.merge.enabled=false")


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ("[q_proj, embed_tokens]", "embed_tokens', which is a Embedding and not a linear layer"),
        ("[k_projj]", "k_projj"),
        ("[lm_head]", "LoRA on the head"),
    ],
)
def test_targets_that_cannot_be_trained(recipe_file, targets, message):
    with pytest.raises(UserError, match=message):
        checked(recipe_file, f"lora.target_modules={targets}")


def test_a_base_without_attention(recipe_file, base):
    with pytest.raises(UserError, match="mamba has (no attention layers|layers of type linear_attention)"):
        checked(recipe_file, f"base.model={base('mamba')}")


@pytest.mark.parametrize("method", ["gptq", "awq", "compressed-tensors", "fp8", "mxfp4", "bitsandbytes"])
def test_a_base_that_is_stored_quantized(recipe_file, base, method):
    model = f"base.model={base('llama', quantization_config={'quant_method': method, 'bits': 4})}"
    with pytest.raises(UserError, match=rf"already quantized \({method}\)"):
        checked(recipe_file, model)
    if method != "bitsandbytes":
        with pytest.raises(UserError, match="already quantized"):
            checked(recipe_file, model, "export.merge.enabled=false")


def test_a_pad_token_without_a_row_is_replaced_by_eos(base):
    folder = base("llama", vocab_size=1279)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert tokenizer.pad_token_id >= 1279
    tokenizer.save_pretrained(folder)
    _, loaded = load_config_and_tokenizer(folder)
    assert loaded.pad_token_id == loaded.eos_token_id


def test_an_eos_token_without_a_row(base):
    with pytest.raises(UserError, match="EOS token '.*' has id 2, and the model has 2 rows"):
        load_config_and_tokenizer(base("llama", vocab_size=2))


def test_what_a_base_lacks_is_said(base):
    unknown = base("llama", model_type="llama99", architectures=["Llama99ForCausalLM"])
    with pytest.raises(UserError, match=r"llama99.*does not know it\n.*Upgrade transformers"):
        load_config_and_tokenizer(unknown)
    without = Path(base("llama"))
    for file in without.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(UserError, match="the folder has no tokenizer files"):
        load_config_and_tokenizer(str(without))


@pytest.mark.parametrize(
    ("stage", "option", "message"),
    [
        ("sft", "assistant_only_loss: true", "needs conversations"),
        ("sft", "padding_free: true", "does not enforce max_length"),
        ("sft", "activation_offloading: true", "does not work with a stack"),
        ("sft", "dataloader_persistent_workers: true", "needs workers"),
        ("sft", "save_strategy: best", "needs an evaluation"),
        ("sft", "lr_scheduler_type: warmup_stable_decay", "num_decay_steps"),
        ("sft", "lr_scheduler_kwargs: {nope: 1}", "nope"),
        ("sft", "optim_args: x", "optim adamw_torch"),
        ("probabilistic", "torch_compile: true", "`compile` compiles each layer for any number of tokens"),
        ("probabilistic", "report_to: nope", "report_to: nope is not supported"),
    ],
)
def test_options_that_cannot_be(recipe_file, tmp_path, stage, option, message):
    recipe = load_recipe(recipe_file, [f"stages.{stage}.train={{{option}}}"], check=False)
    with pytest.raises(UserError, match=message) as error:
        describe_recipe(recipe, tmp_path / "run")
    assert error.value.where == f"stages.{stage}.train"


def test_packages_that_are_missing(recipe_file, tmp_path, monkeypatch):
    from tuna_peft.training import stage_options

    monkeypatch.setattr(stage_options, "is_liger_kernel_available", lambda: False)
    recipe = load_recipe(recipe_file, ["stages.sft.train={use_liger_kernel: true}"], check=False)
    with pytest.raises(UserError, match="use_liger_kernel: the package is not installed"):
        check_options(recipe, resolve_stages(recipe), tmp_path, on_cpu=True)


def test_a_dry_run_checks_the_base_too(recipe_file, base, tmp_path):
    recipe = load_recipe(recipe_file, [f"base.model={base('mixtral')}"])
    with pytest.raises(UserError, match="not a linear layer"):
        describe_recipe(recipe, tmp_path / "run")


@pytest.mark.parametrize(
    "task",
    ["superni: {path: natural-instructions}", "lmentry: {path: lmentry}",
     "vicuna: {path: questions, judge: {model: m}}", "lm_eval: {tasks: [x], include_path: mine}"],
)  # fmt: skip
def test_benchmarks_that_do_not_exist(recipe_file, task):
    with pytest.raises(UserError, match="there is no file or folder"):
        load_recipe(recipe_file, [f"evaluation.tasks={{{task}}}"])


@pytest.mark.parametrize("stage", [0, 1])
def test_tokens_of_the_data_that_the_model_has_no_row_for(recipe_file, base, tmp_path, stage):
    folder = base("llama")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<image>"])
    tokenizer.save_pretrained(folder)
    rows = (tmp_path / "ranked.jsonl").read_text()
    recipe = load_recipe(recipe_file, [f"base.model={folder}"])
    source, prompt = resolve_stages(recipe)[stage], recipe.prompt
    config, loaded = load_config_and_tokenizer(folder)
    encode_rows(source, source.source, prompt, loaded, config)  # a token that the data does not use is no mistake
    (tmp_path / "ranked.jsonl").write_text(rows.replace("good", "good<image>"))
    with pytest.raises(UserError, match=r"row 0.*'<image>' has id \d+, and the model has 1,280 rows"):
        encode_rows(source, source.source, prompt, loaded, config)


def test_a_dry_run_finds_missing_graders_without_running_them(recipe_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_own_grader.py").write_text("raise RuntimeError('run')")
    graded = "evaluation.tasks={{graded: {{path: ranked.jsonl, grader: '{}'}}}}"
    describe_recipe(load_recipe(recipe_file, [graded.format("my_own_grader:grade")]), tmp_path / "run")
    for missing in ("no_such_grader:grade", "builtin:pic"):
        recipe = load_recipe(recipe_file, [graded.format(missing)])
        with pytest.raises(UserError, match=f"no grader '{missing}'"):
            describe_recipe(recipe, tmp_path / "run")

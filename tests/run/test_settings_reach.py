"""Every setting of a recipe arrives where a model is loaded, responses are drawn, or something is written or sent.

Spies stand at the end of each path. `odd` gives every field a value that is not its default and fails for a field
without one: a new field is followed to its end here, or the test fails.
"""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from spies import Seen, spy

from tuna_peft.data.config import PromptConfig
from tuna_peft.errors import UserError
from tuna_peft.evaluation.session import Question
from tuna_peft.export.gguf import model as gguf_model
from tuna_peft.feedback import local_model
from tuna_peft.feedback.settings import LocalModelSettings, ScoreSettings
from tuna_peft.models.base.load import load_config_and_tokenizer
from tuna_peft.models.stack import any_model, trial
from tuna_peft.recipe.evaluation_schema import (
    EvaluationSettings,
    GradedTask,
    LMentryTask,
    LMEvalTask,
    RankingTask,
    SuperNITask,
    VicunaTask,
)
from tuna_peft.recipe.feedback_schema import StageSample
from tuna_peft.recipe.resolved import resolve_stages
from tuna_peft.recipe.schema import (
    BaseSettings,
    ExportSettings,
    LoraOverride,
    LoraSettings,
    MergeSettings,
    PushSettings,
    QuantizationSettings,
    Recipe,
)
from tuna_peft.run import checks, evaluate, exports, held_out, pipeline, rank_samples, samplers, tasks, train_stage
from tuna_peft.run.inputs import Inputs
from tuna_peft.run.processes import Processes


def odd(model, /, *, left=(), **values):
    """Settings without any default, but for the fields called `left`, which another test follows."""
    settings = model.model_validate(values)
    usual = {name for name, field in model.model_fields.items() if getattr(settings, name) == field.default}
    assert usual == set(left), f"fields of {model.__name__} that nobody follows"
    return settings


def small(**changes):
    stage = {"name": "one", "type": "ranking", "data": {"path": "x.jsonl"}}
    return Recipe.model_validate(
        {"name": "small", "seed": 7, "base": {"model": "builtin:pico-llama"}, "stages": [stage], **changes}
    )


BASE = {"model": "some/base", "revision": "v9", "dtype": "bfloat16", "device": "cpu", "trust_remote_code": True}


@pytest.mark.parametrize(("compute", "found"), [("float16", torch.float16), ("auto", torch.bfloat16)])
def test_base_and_quantization_arrive_where_weights_are_loaded(monkeypatch, compute, found):
    calls = spy(monkeypatch, pipeline, "load_base", None)
    quantization = odd(
        QuantizationSettings, method="fp4", double_quant=False, compute_dtype=compute,
        left=["compute_dtype"] if compute == "auto" else [],
    )  # fmt: skip
    recipe = SimpleNamespace(base=odd(BaseSettings, **BASE), quantization=quantization)
    pipeline._load_base(recipe, Processes(on_cpu=True))
    [(args, options)] = calls
    stored = options.pop("quantization_config")
    assert (*args, options) == ("some/base", {name: value for name, value in BASE.items() if name != "model"})
    assert (stored.bnb_4bit_quant_type, stored.bnb_4bit_use_double_quant) == ("fp4", False)
    assert (stored.bnb_4bit_compute_dtype, stored.bnb_4bit_quant_storage) == (found, torch.uint8)


def test_base_and_lora_arrive_at_the_checks_before_weights(monkeypatch):
    recipe = small(base=BASE, lora={"r": 3})
    loaded = load_config_and_tokenizer("builtin:pico-llama")
    read, built = (
        spy(monkeypatch, checks, "load_config_and_tokenizer", loaded),
        spy(monkeypatch, trial, "trial_stack"),
    )
    with pytest.raises(Seen):
        checks.check_base(recipe, resolve_stages(recipe))
    assert read == [(("some/base",), {"revision": "v9", "trust_remote_code": True})]
    [((config, adapters), options)] = built
    assert config is loaded[0] and options == {"trust_remote_code": True}
    assert {name: lora.r for name, lora in adapters.items()} == {"one": 3}


LORA = {"r": 3, "alpha": 5, "dropout": 0.25, "target_modules": ["v_proj"], "use_rslora": True, "start": "below"}


def test_lora_arrives_at_peft_and_a_stage_overrides_it():
    config = train_stage.lora_config(odd(LoraSettings, **LORA))
    assert (config.r, config.lora_alpha, config.lora_dropout) == (3, 5, 0.25)
    assert (config.target_modules, config.use_rslora, config.task_type) == ({"v_proj"}, True, "CAUSAL_LM")
    for name, value in odd(LoraOverride, **LORA).model_dump().items():
        stage = {"name": "one", "type": "sft", "data": {"path": "x.json"}, "lora": {name: value}}
        [resolved] = resolve_stages(small(stages=[stage]))
        assert resolved.lora == LoraSettings(**{name: value})  # and nothing else


def test_the_seed_arrives_at_the_adapter_the_trainer_the_samples_and_the_held_out_prompts(monkeypatch, tmp_path):
    recipe = small()
    [stage] = resolve_stages(recipe)
    seeds = spy(monkeypatch, train_stage, "set_seed")
    with pytest.raises(Seen):
        train_stage.train_stage(None, None, None, recipe, stage, tmp_path)
    assert seeds == [((7,), {})]
    config = train_stage.stage_config(recipe, stage, tmp_path, on_cpu=True)
    assert (config.seed, config.run_name, config.output_dir) == (7, "small-one", str(tmp_path))
    records = [{"prompt": f"p{i}", "completions": ["a", "b"]} for i in range(30)]
    placed = [("", record) for record in records]
    chosen = [held_out.hold_out([stage], lambda _: placed, seed).prompts for seed in (7, 7, 8)]
    assert chosen[0] == chosen[1] != chosen[2] and len(chosen[2]) == 3


@pytest.mark.parametrize(("limit", "fits"), [(10, False), (11, True), (None, True)])
def test_samples_fit_with_their_prompt_and_eos(monkeypatch, limit, fits):
    monkeypatch.setattr(rank_samples, "prompt_ids", lambda prompt, *_: [1] * len(prompt))
    data = {"prompts": {"path": "x.jsonl"}, "sample": {"max_new_tokens": 6}, "judge": {"function": "builtin:pico"}}
    train = {"max_length": limit}
    [stage] = resolve_stages(small(stages=[{"name": "one", "type": "ranking", "data": data, "train": train}]))
    with nullcontext() if fits else pytest.raises(UserError, match="need 11 tokens, and max_length is 10"):
        rank_samples.check_feedback(stage, [{"prompt": "abc"}, {"prompt": "abcd"}], None)


SAMPLE = {
    "n": 3, "temperature": 0.7, "top_p": 0.9, "max_new_tokens": 5, "max_similarity": 0.5, "hotter_by": 0.2,
    "trials": 2, "batch_size": 6, "backend": "vllm", "from": "base",
}  # fmt: skip


def test_samples_are_drawn_with_the_settings_of_the_stage(monkeypatch, tmp_path):
    sample = odd(StageSample, **SAMPLE, left=["server"])  # see test_sample_server.py
    data = {"prompts": {"path": "x.jsonl"}, "sample": SAMPLE, "judge": {"function": "builtin:pico"}}
    recipe = small(base=BASE, stages=[{"name": "one", "type": "ranking", "data": data}])
    [stage] = resolve_stages(recipe)
    assert stage.feedback.sample == sample and stage.samples_from == ()
    run = SimpleNamespace(recipe=recipe, path=tmp_path, stage_folder=lambda name: tmp_path)
    opened = []

    @contextmanager
    def engine(*args, **options):
        opened.append((args, options))
        yield "the sampler", None

    monkeypatch.setattr(rank_samples, "vllm_sampler", engine)
    drawn = spy(monkeypatch, rank_samples, "sample_candidates")
    with pytest.raises(Seen):
        rank_samples._sample(run, None, None, stage, sample, ["a prompt"])
    [((sampler, prompts, given, _), options)] = drawn
    assert (sampler, prompts, given, options) == ("the sampler", ["a prompt"], sample, {"seed": "7/one"})
    where = {"quantization": "nf4", "revision": "v9", "trust_remote_code": True}
    assert opened == [(("some/base", None), where)]


@pytest.mark.parametrize("moved", [None, "elsewhere"])
def test_vllm_gets_the_base_of_a_stack_in_its_revision_unless_it_has_moved(monkeypatch, tmp_path, moved):
    manifest = SimpleNamespace(base={"model": "some/base", "revision": "v9"}, prompt={"template": "alpaca"},
                               quantization=None)  # fmt: skip
    monkeypatch.setattr(samplers, "local_stack", lambda model: tmp_path)
    monkeypatch.setattr(samplers, "read_manifest", lambda folder, upto: manifest)
    combined = spy(monkeypatch, samplers, "combine_stack", None)
    tokenizers = spy(monkeypatch, samplers.AutoTokenizer, "from_pretrained", SimpleNamespace(chat_template=None))
    engines = spy(monkeypatch, samplers, "VllmSampler")
    with (
        pytest.raises(Seen),
        samplers.vllm_sampler("a stack", "sft", moved, "nf4", "mine", trust_remote_code=True),
    ):
        pass
    base, revision = (moved, None) if moved else ("some/base", "v9")
    assert combined[0][1] == {"upto": "sft"}
    assert tokenizers == [((base,), {"revision": revision, "trust_remote_code": True})]
    [((path, _), options)] = engines
    adapter = options.pop("adapter")
    assert path == base and adapter == combined[0][0][1]
    assert options == {"revision": revision, "quantized": False, "trust_remote_code": True}


def test_teachers_and_judges_of_this_machine_are_loaded_as_the_recipe_says(monkeypatch, tmp_path):
    loaded = spy(monkeypatch, any_model, "load_base")
    given = {"model": "some/judge", "revision": "v9", "quantization": "fp4", "trust_remote_code": True}
    with pytest.raises(Seen):
        local_model.load_local_model(odd(LocalModelSettings, **given), "cpu")
    [(args, options)] = loaded
    assert options.pop("quantization_config").bnb_4bit_quant_type == "fp4"
    assert (*args, options) == ("some/judge", {"revision": "v9", "device": "cpu", "trust_remote_code": True})
    teachers = spy(monkeypatch, rank_samples, "score_with_model")
    score = ScoreSettings(model="some/teacher")
    with pytest.raises(Seen):
        rank_samples._rank(SimpleNamespace(judge=None, score=score), [], tmp_path / "j.jsonl", "a device")
    assert teachers[0][1] == {"device": "a device"}


def test_an_evaluated_model_is_loaded_as_the_command_says(monkeypatch, tmp_path):
    loading = evaluate.Loading("its base", "fp4", "cuda:1", True)
    assert None not in vars(loading).values()
    calls = spy(monkeypatch, evaluate, "load_any_model")
    with pytest.raises(Seen):
        evaluate.evaluate_target("a/model", EvaluationSettings(), tmp_path, loading=loading)
    assert calls == [(("a/model",), vars(loading))]


# Evaluation tasks


QUESTION = Question("q", "text", "text", ["right"], record={})
DATA = {"path": "builtin:pico-llama/heldout.jsonl", "limit": 2}
SOURCE = ("weights", "format", "name", "split", "revision", "streaming", "header", "columns", "group_by", "markers",
          "add_reference", "length_penalty", "on_bad_row")  # fmt: skip


@dataclass
class Result:
    task: str


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """Reads the tasks, runs the first, and returns the named arguments with which it is measured."""

    def run(name, function, settings):
        calls = spy(monkeypatch, tasks, function, Result(name))
        given = SimpleNamespace(
            **{key: None for key in ("ranking", "graded", "superni", "lmentry", "vicuna", "lm_eval")}
        )
        setattr(given, name, settings)
        config, tokenizer = load_config_and_tokenizer("builtin:pico-llama")
        session = SimpleNamespace(
            model=torch.nn.Linear(1, 1),
            tokenizer=None,
            size=lambda task, rows: {("ranking", 1, 2): 5}[task, rows[0][0], sum(rows[0][1])],
            stage="base",
            folder=tmp_path,
        )
        data = tasks.read_tasks(given, PromptConfig(), tokenizer, config, ["base"])
        assert data.tasks[0].run(session) == Result(name)
        return calls[0][1], data.tasks[0].settings

    return run


def test_the_ranking_task(measured, monkeypatch):
    encoded = Dataset.from_list([{"prompt_ids": [1], "completions_ids": [[2], [3]], "ranks": [0, 1]}])
    counts = {"read": 1, "skipped": {}, "responses": 2, "comparisons": 0, "duplicates_merged": 0, "omitted": 0,
              "contradictions": 0, "first_contradiction": None}  # fmt: skip
    read = spy(monkeypatch, tasks, "encode_source", (encoded, counts))
    settings = odd(RankingTask, **DATA, max_length=99, overflow="skip", margin=0.3, left=SOURCE)
    options, kept = measured("ranking", "evaluate_ranking", settings)
    assert (options["margin"], options["batch_size"], kept["margin"]) == (0.3, 5, 0.3)
    assert read[0][0][0] is settings and read[0][1] == {"max_length": 99, "overflow": "skip"}


def test_the_graded_task(measured, monkeypatch):
    grader = spy(monkeypatch, tasks, "load_grader", "a grader")
    settings = odd(GradedTask, **DATA, grader="my:grader", max_new_tokens=9, left=SOURCE)
    options, kept = measured("graded", "evaluate_graded", settings)
    assert grader[0][0][0] == "my:grader" and len(options["questions"]) == 2
    assert (options["grade"], options["max_new_tokens"]) == ("a grader", 9)
    assert (kept["grader"], kept["max_new_tokens"]) == ("my:grader", 9)


def test_the_superni_task(measured, monkeypatch):
    read = spy(monkeypatch, tasks, "read_superni", ([], ["unusable"]))
    asked = spy(monkeypatch, tasks, "superni_questions", ([QUESTION], ["too few"]))
    settings = odd(SuperNITask, wrap=False, path="ni", tasks=["task1"], per_task=3, shots=[4], max_new_tokens=9)
    options, kept = measured("superni", "evaluate_superni", settings)
    assert [str(value) for value in read[0][0]] == ["ni", "['task1']", "3"]
    (_, shots, template), _ = asked[0]
    assert (shots, template.render("x")) == (4, "x")  # unwrapped
    assert (options["shots"], options["max_new_tokens"], kept["max_new_tokens"]) == (4, 9, 9)
    assert options["excluded"] == ["unusable", "too few"]


def test_the_lmentry_task(measured, monkeypatch):
    read = spy(monkeypatch, tasks, "read_lmentry", ([QUESTION], ["unusable"]))
    settings = odd(LMentryTask, wrap=False, path="lm", tasks=["homophones"], per_template=2, first_sentence=True,
                   max_new_tokens=9)  # fmt: skip
    options, kept = measured("lmentry", "evaluate_lmentry", settings)
    (folder, template, names, most), _ = read[0]
    assert (str(folder), template.render("x"), names, most) == ("lm", "x", ["homophones"], 2)
    assert (options["first_sentence"], options["max_new_tokens"], options["excluded"]) == (True, 9, ["unusable"])
    assert (kept["first_sentence"], kept["max_new_tokens"]) == (True, 9)


@pytest.mark.parametrize("judge", [{"function": "builtin:pico"}, {"model": "some/judge", "attempts": 2}])
def test_the_vicuna_task(measured, monkeypatch, tmp_path, judge):
    read = spy(monkeypatch, tasks, "read_vicuna_questions", ([QUESTION], []))
    monkeypatch.setattr(tasks, "read_vicuna_answers", lambda file: ({"q": "theirs"}, []))
    (tmp_path / "theirs.jsonl").touch()
    settings = odd(VicunaTask, wrap=False, path="v", against=str(tmp_path / "theirs.jsonl"), max_new_tokens=9,
                   judge=judge)  # fmt: skip
    options, _ = measured("vicuna", "evaluate_vicuna", settings)
    assert str(read[0][0][0]) == "v" and read[0][0][1].render("x") == "x"
    assert (options["against"], options["max_new_tokens"]) == ({"q": "theirs"}, 9)
    # The judge is asked in both orders where there is an order, and a missing verdict is counted, not fatal.
    judged = spy(monkeypatch, tasks, "judge_pairs", ([1], None))
    assert options["judge"](["a row"]) == [1]
    [((rows, asked, journal), more)] = judged
    assert (rows, asked.both_orders, asked.on_no_answer) == (["a row"], "model" in judge, "skip")
    assert asked.model_dump(include=set(judge)) == judge
    assert journal.is_relative_to(tmp_path) and more["device"] == "cpu"


def test_the_lm_eval_task(measured, monkeypatch, tmp_path):
    monkeypatch.setattr(tasks, "require_harness", lambda: None)
    settings = odd(LMEvalTask, tasks=["arc"], include_path=str(tmp_path), num_fewshot=3, limit=4)
    options, kept = measured("lm_eval", "evaluate_harness", settings)
    assert options == kept == settings.model_dump()


# Exports


def test_exports_are_written_as_the_recipe_says(monkeypatch, tmp_path):
    merge = odd(MergeSettings, enabled=True, dtype="float32", base="original", left=["enabled"])
    push = {"repo": "me/x"}
    settings = odd(ExportSettings, combine_rank=2, merge=merge, divergence_prompts=1, gguf=["q8_0"], push=push,
                   left=["combine", "gguf_base"])  # fmt: skip
    recipe = small(base={**BASE, "device": "cpu"}, export=settings.model_dump())
    saved = {}
    run = SimpleNamespace(recipe=recipe, path=tmp_path, processes=SimpleNamespace(sharding=None),
                          load=saved.get, save=saved.__setitem__)  # fmt: skip
    combined, merged = (spy(monkeypatch, exports, name, 0) for name in ("combine_stack", "merge_stack"))
    written = spy(monkeypatch, gguf_model, "export_gguf", SimpleNamespace(files={}))
    monkeypatch.setattr(exports, "_as_dict", lambda report: {})
    measured = spy(monkeypatch, exports, "check_exports")
    rows = Dataset.from_list([{"input_ids": [i, 5]} for i in range(3)])
    with pytest.raises(Seen):
        exports.export_stack(run, Inputs(stages={"one": rows}))
    stack, loading = tmp_path / "stack", {"device": "cpu", "trust_remote_code": True}
    assert combined == [((stack, tmp_path / "combined"), {"rank": 2})]
    options = {"dtype": "float32", "base": "original", "load_dtype": "bfloat16", "allow_lost_update": True}
    assert merged == [((stack, tmp_path / "merged"), {**options, **loading})]
    assert written[0][0] == (tmp_path / "merged", tmp_path / "gguf")
    assert (written[0][1]["types"], written[0][1]["name"], written[0][1]["stack_dir"]) == (["q8_0"], "small", stack)
    [((folder, folders, prompts), options)] = measured
    assert (folder, list(folders), prompts) == (stack, [tmp_path / "combined", tmp_path / "merged"], [[0, 5]])
    assert options == {"dtype": "bfloat16", **loading}


def test_a_run_is_pushed_as_the_recipe_says(monkeypatch, tmp_path):
    push = odd(PushSettings, repo="me/x", what="merged", private=False, revision="v9", pull_request=True,
               base_id="some/base", license="mit", data_license="CC0")  # fmt: skip
    calls = spy(monkeypatch, exports, "push")
    run = SimpleNamespace(recipe=small(export={"push": push.model_dump()}), path=tmp_path, load=lambda name: None)
    with pytest.raises(Seen):
        exports.publish(run)
    wanted = {"kind": "merged", "create_pr": True, **push.model_dump(exclude={"repo", "what", "pull_request"})}
    assert calls == [((tmp_path, "me/x"), wanted)]

"""The harness's table in our shape, and a real run of it where it is installed."""

import importlib.util
import json
import sys
import types

import pytest
from tiny_llama import write_base, write_stack

from tuna_peft.errors import UserError
from tuna_peft.evaluation import harness
from tuna_peft.evaluation.harness import table_as_result
from tuna_peft.recipe.evaluation_schema import EvaluationSettings
from tuna_peft.run.evaluate import evaluate_target

FOUND = {
    "results": {
        "tiny": {"alias": "tiny", "acc,none": 0.5, "acc_stderr,none": 0.1, "f1,strict": 0.25,
                 "f1_stderr,strict": "N/A", "ppl,none": "N/A"},
    },
    "n-samples": {"tiny": {"original": 10, "effective": 8}},
    "samples": {"tiny": [{"doc_id": 3, "acc": 1.0, "target": 0, "arguments": [["w3", " w4"]], "resps": [[-1.0]]}]},
}  # fmt: skip


def test_the_table_is_taken_over():
    result = table_as_result(FOUND)
    assert (result.main, list(result.metrics)) == ("tiny: acc", ["tiny: acc", "tiny: f1 (strict)"])
    accuracy, f1 = result.metrics.values()
    assert (accuracy.value, accuracy.count) == (0.5, 8)
    assert accuracy.low == pytest.approx(0.5 - 0.196, abs=1e-4) and accuracy.high == pytest.approx(0.696, abs=1e-4)
    assert (f1.value, f1.low) == (0.25, None)
    assert result.excluded[0].names == ["tiny: ppl"]
    [prompt] = result.prompts
    assert (prompt.id, prompt.scores, prompt.prompt) == ("3", {"tiny: acc": 1.0}, "w3")
    with pytest.raises(UserError, match="measured nothing"):
        table_as_result({"results": {}})


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="needs the extra lm-eval")
def test_the_harness_itself_on_a_stack(tmp_path):
    write_stack(tmp_path / "stack", write_base(tmp_path / "base"), "none")
    rows = [{"question": f"w{i + 3} w4", "choices": ["w5", "w6 w7"], "label": i % 2} for i in range(6)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "tiny_choice.yaml").write_text(
        "task: tiny_choice\ndataset_path: json\ntest_split: train\noutput_type: multiple_choice\n"
        f"dataset_kwargs: {{data_files: {tmp_path / 'rows.jsonl'}}}\n"
        "doc_to_text: question\ndoc_to_choice: choices\ndoc_to_target: label\n"
        "metric_list: [{metric: acc}, {metric: acc_norm}]\n"
    )
    settings = EvaluationSettings.model_validate(
        {"tasks": {"lm_eval": {"tasks": ["tiny_choice"], "include_path": str(tmp_path)}}}
    )
    results = evaluate_target(str(tmp_path / "stack"), settings, tmp_path / "out")
    for stage in ("base", "sft", "ranking"):
        result = results[stage]["lm_eval"]
        assert result.metrics["tiny_choice: acc"].count == 6 and len(result.prompts) == 6
    settings.tasks.lm_eval.tasks = ["no_such_task"]
    with pytest.raises(UserError, match="the harness has no task no_such_task"):
        evaluate_target(str(tmp_path / "stack"), settings, tmp_path / "other")


def test_every_setting_reaches_the_harness(monkeypatch):
    calls = {}

    class Noted:
        def __init__(self, **options):
            calls[type(self).__name__] = options
            self.all_tasks = ["arc"]

    names = {"": {"simple_evaluate": lambda **options: calls.setdefault("evaluate", options)},
             ".models": {}, ".models.huggingface": {"HFLM": type("HFLM", (Noted,), {})},
             ".tasks": {"TaskManager": type("TaskManager", (Noted,), {})}}  # fmt: skip
    for name, content in names.items():
        module = types.ModuleType(f"lm_eval{name}")
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, f"lm_eval{name}", module)
    monkeypatch.setattr(harness, "table_as_result", lambda found: "result")
    monkeypatch.setattr(harness, "context_of", {"m": 512}.get)
    sizes = {("lm_eval", (511, (1,))): 3}  # by the longest text that the harness leaves
    session = types.SimpleNamespace(model="m", tokenizer="t", size=lambda task, rows: sizes[task, rows[0]])
    options = {"tasks": ["arc"], "include_path": "mine", "num_fewshot": 2, "limit": 4}
    assert harness.evaluate_harness(session, **options) == "result"
    assert calls["TaskManager"] == {"include_path": "mine"}
    assert calls["HFLM"] == {"pretrained": "m", "tokenizer": "t", "batch_size": 3}
    asked = calls["evaluate"]
    assert (asked["tasks"], asked["num_fewshot"], asked["limit"]) == (["arc"], 2, 4)

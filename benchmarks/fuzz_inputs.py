"""Generators of bad inputs for `benchmarks.fuzz`: each writes files into a folder and returns a command line.

Most inputs are wrong by construction. Where an input may be right after all (random damage can hit a comment), the
case says why it may be accepted.
"""

from __future__ import annotations

import io
import json
import random
import string
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from tuna_peft.files import sha256

NAN, INFINITY = float("nan"), float("inf")
DAMAGE = "random damage may miss everything that matters"


@dataclass(frozen=True)
class Case:
    """One input.

    Attributes:
        what: What is wrong, for the list of failures.
        command: Arguments of `tuna-peft`; relative paths start in the folder of the case.
        may_pass: Why exit code 0 may be right; None if the input has to be rejected.
    """

    what: str
    command: list[str]
    may_pass: str | None = None


Generator = Callable[[random.Random, Path], Case]

# Values of a wrong type or size for nearly every field.
ODD: list[Any] = [
    None, True, -1, 0, 1 << 70, -1e308, NAN, INFINITY, "", "x" * 5000, "\x1b[2Jx", "\u202ex", "../..", "/dev/null", [],
    {}, [[]], {"a": {"a": 1}}, [None], "null", "NaN", "!!python/object:os.system", "\0", "${HOME}", "é\U0001f41f",
]  # fmt: skip
ROW = {"prompt": "What is two and two?", "completions": ["four", "five", "six"], "scores": [3.0, 2.0, 1.0], "id": "a"}


def damaged(draw: random.Random, content: bytes) -> bytes:
    """The content with some bytes cut, repeated, replaced, inserted or shuffled."""
    data = bytearray(content)
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(len(data) + 1)
        length = draw.choice([1, 1, 2, 5, 40])
        kind = draw.randrange(6)
        if kind == 0:
            del data[at:]
        elif kind == 1:
            del data[at : at + length]
        elif kind == 2:
            data[at:at] = data[at : at + length] * draw.choice([1, 3, 200])
        elif kind == 3:
            data[at:at] = draw.choice(
                [b"\0", b"\xff", b"{", b"[", b'"', b"\n", b": ", b"\xed\xa0\x80", b"&a *a", b"\t"]
            )
        elif kind == 4:
            data[at : at + length] = draw.randbytes(length)
        else:
            data[at : at + 1] = draw.choice([b"9" * 400, b"1e999", b"NaN", b"-", b"[" * 3000, b"\\ud800", b"\x1b[31m"])
    return bytes(data)


# Recipes


def _recipe() -> dict[str, Any]:
    return {
        "name": "fuzz",
        "base": {"model": "builtin:pico-llama"},
        "quantization": {"method": "nf4"},
        "lora": {"r": 8, "alpha": 16, "target_modules": ["q_proj"]},
        "stages": [
            {"name": "sft", "type": "sft", "data": {"path": "data.jsonl"}, "train": {"learning_rate": 1e-3}},
            {"name": "rank", "type": "ranking", "data": {"path": "data.jsonl", "limit": 1}, "train": {"margin": 0.1}},
        ],
        "evaluation": {"tasks": {"ranking": {"path": "data.jsonl"}}},
        "export": {"combine": True, "merge": {"enabled": False}},
    }


def _paths(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    keys = value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    return [path, *(inner for key in keys for inner in _paths(value[key], (*path, key)))]


def _set(root: Any, path: tuple[Any, ...], value: Any) -> Any:
    if not path:
        return value
    parent = root
    for key in path[:-1]:
        parent = parent[key]
    parent[path[-1]] = value
    return root


# What of `ODD` a field of the recipe rightly accepts; `run --dry-run` must reject everything else.
_NULL_IS_DEFAULT = "null is the default here, as documented"
_RIGHT: dict[tuple[Any, ...], Callable[[Any], str | None]] = {
    ("quantization", "method"): lambda value: None,
    ("lora", "r"): lambda value: "any rank from 1 on" if type(value) is int and value >= 1 else None,
    ("lora", "alpha"): lambda value: "any alpha from 1 on" if type(value) is int and value >= 1 else None,
    ("lora", "target_modules", 0): lambda value: "a name of a module; checked with the model" if value else None,
    ("lora", "target_modules"): lambda value: None,
    ("base", "model"): lambda value: "a Hub id; a dry run asks nobody" if isinstance(value, str) and value else None,
    ("name",): lambda value: "a name" if isinstance(value, str) and value else None,
    ("export", "combine"): lambda value: "a truth value" if value is True or value == 0 else None,
    ("export", "merge", "enabled"): lambda value: "a truth value" if value is True or value == 0 else None,
    ("stages", 1, "data", "limit"): lambda value: _NULL_IS_DEFAULT if value is None else
    "more than there are" if type(value) is int and value > 0 else None,
    ("evaluation",): lambda value: _NULL_IS_DEFAULT if value in (None, {}) else None,
    ("evaluation", "tasks", "ranking"): lambda value: _NULL_IS_DEFAULT if value is None else None,
}  # fmt: skip
_OPTIONAL = {(), ("quantization",), ("lora",), ("export",), ("export", "merge"), ("evaluation", "tasks")}


def _accepts(path: tuple[Any, ...], value: Any) -> str | None:
    if value == {} and (path in _OPTIONAL - {()} or path[-1:] == ("train",)):
        return "an empty section means its defaults"
    if path[-1:] == ("path",) or path[-1:] == ("learning_rate",) or path[-1:] == ("margin",):
        ok_path = path[-1] == "path" and isinstance(value, str) and value.isidentifier()
        return "a Hub data set; a dry run asks nobody" if ok_path else None
    if path[-1:] == ("name",) and path[0] == "stages":
        return "a name of a stage" if value == "null" else None
    return _RIGHT.get(path, lambda value: None)(value)


def _write_data(folder: Path) -> None:
    (folder / "data.jsonl").write_text("".join(json.dumps({**ROW, "id": str(n)}) + "\n" for n in range(3)))


def _write_recipe(folder: Path, content: bytes) -> list[str]:
    _write_data(folder)
    (folder / "recipe.yaml").write_bytes(content)
    return ["run", "recipe.yaml", "--dry-run"]


def recipe_value(draw: random.Random, folder: Path) -> Case:
    """A recipe with one odd value."""
    recipe = _recipe()
    path, value = draw.choice(_paths(recipe)), draw.choice(ODD)
    text = json.dumps(_set(recipe, path, value)).replace("NaN", ".nan").replace("Infinity", ".inf")
    return Case(
        f"{'.'.join(map(str, path))} = {value!r:.40}", _write_recipe(folder, text.encode()), _accepts(path, value)
    )


def recipe_damage(draw: random.Random, folder: Path) -> Case:
    """A recipe with damaged bytes."""
    import yaml

    content = yaml.safe_dump(_recipe(), sort_keys=False).encode()
    return Case("damaged bytes of a recipe", _write_recipe(folder, damaged(draw, content)), DAMAGE)


def recipe_bomb(draw: random.Random, folder: Path) -> Case:
    """YAML that grows, loops or asks for code."""
    number = draw.randrange(10, 10_000)
    text = draw.choice(
        [
            "a: &a [x, x]\n" + "".join(f"b{n}: &b{n} [*{'a' if not n else f'b{n - 1}'}, *a]\n" * 1 for n in range(40)),
            "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 10)),
            "a: &a\n  b: *a\n",
            "name: !!python/object/apply:os.system [touch owned]\n",
            "name: !!int abc\n",
            f"name: {'[' * number}\n",
            f"seed: {'9' * number}\n",
            'name: "\\ud800"\n',
            "<<: [1, 2]\n",
            "extends: recipe.yaml\n",
            "extends: /dev/zero\n",
            "extends: [a, b]\n",
            "---\na: 1\n---\nb: 2\n",
            "? {a: 1}\n: b\n",
            "name: x\nname: y\n",
            "%YAML 9.9\n---\nname: x\n",
            "\ufeff" * number,
            "- " * number,
        ]
    )
    return Case(f"YAML {text[:40]!r}", _write_recipe(folder, text.encode("utf-8", "surrogatepass")))


def override(draw: random.Random, folder: Path) -> Case:
    """An override with an odd key or value."""
    command = _write_recipe(folder, json.dumps(_recipe()).encode())
    key = draw.choice(
        ["seed", "lora.r", "stages.sft.train.learning_rate", "stages.rank.train.margin", "stages.sft.data.limit",
         "stages.sft.name", "export.gguf", "base.dtype", "evaluation.batch_size", "stages.none.train.x", "a.b.c", "",
         ".", "stages..x", "stages[0].lora.r", "__class__", "stages.sft.train.no_such_field"]
    )  # fmt: skip
    value = draw.choice(
        ["[", "{a", "*a", "!!int x", ".nan", ".inf", "-1", "'", "[[", "{}", "\x1b[2J", "- a", "9" * 400]
    )
    right = key == "seed" and value == "-1" and "any integer is a seed"
    return Case(f"override {key}={value:.20}", [*command, f"{key}={value}"], right or None)


# Data


def data_value(draw: random.Random, folder: Path) -> Case:
    """A record with one odd value, between good ones."""
    key, value = draw.choice(["prompt", "completions", "scores", "ranks", "id", "reference"]), draw.choice(ODD)
    row = {**ROW, key: value}
    right = None
    if key in ("id", "reference") and (value is None or isinstance(value, str) or key == "id"):
        right = "an id is anything, a reference any text"
    elif key == "prompt" and isinstance(value, str) and value.strip():
        right = "a prompt is any text"
    elif key == "ranks" and value is None or key == "scores" and value is None and draw.random() < 0:
        right = "scores alone are enough"
    lines = [json.dumps(ROW), json.dumps(row), json.dumps(ROW)]
    if draw.random() < 0.5:
        (folder / "x.jsonl").write_text("\n".join(lines))
        name = "x.jsonl"
    else:
        (folder / "x.json").write_text(f"[{', '.join(lines)}]")
        name = "x.json"
    return Case(f"{key} = {value!r:.40}", ["data", "inspect", name], right)


def data_element(draw: random.Random, folder: Path) -> Case:
    """A record with one odd response or score."""
    key, value = draw.choice(["completions", "scores"]), draw.choice(ODD)
    row = {**ROW, key: [*ROW[key][:2], value]}  # type: ignore[index]
    text = key == "completions" and isinstance(value, str) and value.strip() != ""
    number = key == "scores" and isinstance(value, (int, float)) and abs(value) < INFINITY
    (folder / "x.jsonl").write_text(json.dumps(row) + "\n")
    right = "any text is a response, any finite number a score" if text or number else None
    return Case(f"{key}[2] = {value!r:.40}", ["data", "inspect", "x.jsonl"], right)


def data_shape(draw: random.Random, folder: Path) -> Case:
    """A file of a wrong shape."""
    many, good = draw.choice([2000, 60_000]), json.dumps(ROW)
    name, text = draw.choice(
        [
            (
                "x.jsonl",
                json.dumps({**ROW, "completions": [str(n) for n in range(many)], "scores": list(range(many))}),
            ),
            ("x.jsonl", good.replace('"scores"', '"scores": [1, 2, 3], "scores"')),
            ("x.json", f"[{good}, {good.replace('{', '{{', 1)}]"),
            ("x.json", f"[{good}" + "," * many),
            ("x.jsonl", "[" * many),
            ("x.jsonl", good.replace("3.0", "7" * many)),
            ("x.jsonl", good.replace('"a"', '"\\ud800"')),
            ("x.csv", ",".join(f"c{n}" for n in range(many)) + "\n" + ",".join("x" for _ in range(many))),
            ("x.csv", '"' * many),
            ("x.csv", "prompt,completions,scores\n" + "a," * many),
            ("x.tsv", "\t" * many + "\n"),
            ("x.json", json.dumps({"a": [1] * many})),
            ("x.json", json.dumps({"key" * many: 1})),
            ("x.jsonl", "\n" * many),
            ("x.jsonl", "\0" * many),
            ("x.jsonl", good[: draw.randrange(1, len(good) - 1)]),
            ("x.parquet", good),
            ("x.txt", good),
        ]
    )
    (folder / name).write_text(text)
    return Case(f"{name} {text[:40]!r}", ["data", draw.choice(["inspect", "inspect"]), name])


def data_damage(draw: random.Random, folder: Path) -> Case:
    """A good file of any kind with damaged bytes."""
    name, content = draw.choice(_good_files())
    (folder / name).write_bytes(damaged(draw, content))
    return Case(f"damaged bytes of {name}", ["data", "convert", name, "out.jsonl"], DAMAGE)


@cache
def _good_files() -> list[tuple[str, bytes]]:
    import pyarrow
    import pyarrow.parquet

    rows = [{**ROW, "id": str(n)} for n in range(5)]
    parquet = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), parquet)
    pairs = "prompt,chosen,rejected\n" + "".join(f'p{n},"a, b",c\n' for n in range(5))
    return [
        ("x.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode()),
        ("x.json", json.dumps(rows).encode()),
        ("x.csv", pairs.encode()),
        ("x.tsv", pairs.replace(",", "\t").encode()),
        ("x.parquet", parquet.getvalue()),
    ]


# Adapters and manifests


def _write_stack(folder: Path, config: dict[str, Any], tensors: dict[str, Any], manifest: dict[str, Any]) -> None:
    """A stack of two adapters without its base, with hashes that match."""
    from safetensors.torch import save_file

    entries = []
    for name in ("sft", "rank"):
        inside = folder / "stack" / name
        inside.mkdir(parents=True)
        (inside / "adapter_config.json").write_text(json.dumps(config if name == "rank" else _adapter_config()))
        save_file(tensors if name == "rank" else _tensors(), inside / "adapter_model.safetensors")
        files = ("adapter_config.json", "adapter_model.safetensors")
        entries.append({"name": name, "path": name, "sha256": {file: sha256(inside / file) for file in files}})
    base = {"model": "org/base", "revision": None, "fingerprint": None}
    whole = {"base": base, "quantization": None, "adapters": entries, "prompt": {"template": "alpaca"}, "format": 1}
    (folder / "stack" / "stack.json").write_text(json.dumps({**whole, **manifest}))


def _adapter_config() -> dict[str, Any]:
    return {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}


def _tensors() -> dict[str, Any]:
    import torch

    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    return {key.format("A"): torch.ones(2, 6), key.format("B"): torch.ones(6, 2)}


def adapter_config(draw: random.Random, folder: Path) -> Case:
    """An adapter whose configuration has one odd value; its hashes match."""
    key = draw.choice(["peft_type", "r", "lora_alpha", "target_modules", "rank_pattern", "alpha_pattern", "bias"])
    value = draw.choice(ODD)
    _write_stack(folder, {**_adapter_config(), key: value}, _tensors(), {})
    empty = key.endswith("_pattern") and not value
    # combine takes the modules from the tensors; what `target_modules` says is copied for PEFT to check.
    modules = key == "target_modules" and (value is None or isinstance(value, (str, list)))
    right = "an empty pattern is none" if empty else "the tensors say which modules there are" if modules else None
    return Case(f"adapter {key} = {value!r:.40}", ["combine", "stack", "out"], right)


def adapter_tensors(draw: random.Random, folder: Path) -> Case:
    """An adapter with wrong tensors; its hashes match."""
    import torch

    tensors = _tensors()
    key = draw.choice(list(tensors))
    what = draw.choice(
        ["nan", "infinity", "missing", "none", "transposed", "rank", "int", "name", "4d", "scalar", "empty"]
    )
    if what == "none":
        tensors = {}
    elif what == "missing":
        del tensors[key]
    elif what == "name":
        tensors[draw.choice(["x", "lora_A", "base_model.model.x.lora_magnitude_vector.weight"])] = tensors.pop(key)
    else:
        tensors[key] = {
            "nan": torch.full_like(tensors[key], NAN),
            "infinity": torch.full_like(tensors[key], -INFINITY),
            "transposed": tensors[key].T.contiguous(),
            "rank": torch.ones(3, 3),
            "int": torch.ones(tensors[key].shape, dtype=torch.int8),
            "4d": tensors[key][..., None, None].contiguous(),
            "scalar": torch.tensor(1.0),
            "empty": torch.ones(0, 0),
        }[what]
    _write_stack(folder, _adapter_config(), tensors, {})
    return Case(f"tensors: {what}", ["combine", "stack", "out"])


def manifest(draw: random.Random, folder: Path) -> Case:
    """A manifest with one odd value."""
    key, value = (
        draw.choice(["base", "quantization", "adapters", "prompt", "format", "load_dtype", "other"]),
        draw.choice(ODD),
    )
    _write_stack(folder, _adapter_config(), _tensors(), {key: value})
    optional = (key in ("quantization", "load_dtype") and value is None) or (
        key in ("prompt", "quantization") and value == {}
    )
    return Case(
        f"stack.json {key} = {value!r:.40}",
        ["combine", "stack", "out"],
        "null or {}: unknown, as documented" if optional else None,
    )


def stack_damage(draw: random.Random, folder: Path) -> Case:
    """A stack with damaged bytes, with or without matching hashes."""
    _write_stack(folder, _adapter_config(), _tensors(), {})
    file = draw.choice(["stack.json", "rank/adapter_config.json", "rank/adapter_model.safetensors"])
    path = folder / "stack" / file
    content = damaged(draw, path.read_bytes())
    changed = content != path.read_bytes()
    path.write_bytes(content)
    honest = file == "stack.json" or draw.random() < 0.3
    if not honest:  # a stranger can write the hashes, too
        data = json.loads((folder / "stack/stack.json").read_text())
        data["adapters"][1]["sha256"][Path(file).name] = sha256(path)
        (folder / "stack/stack.json").write_text(json.dumps(data))
    must_fail = honest and changed and file != "stack.json"
    return Case(f"damaged {file}", ["combine", "stack", "out"], None if must_fail else DAMAGE)


# Folders of runs, journals, results


def checkpoint(draw: random.Random, folder: Path) -> Case:
    """A run's folder with a damaged checkpoint or recipe: a dry run says how far it is."""
    command = _write_recipe(folder, json.dumps(_recipe()).encode())
    inside = (
        folder / "out" / "stages" / "sft" / draw.choice(["checkpoint-5", "checkpoint-1a", "checkpoint-99999999999"])
    )
    inside.mkdir(parents=True)
    (inside / "trainer_state.json").write_bytes(damaged(draw, b'{"global_step": 5, "log_history": []}'))
    if draw.random() < 0.5:
        (folder / "out" / "recipe.yaml").write_bytes(damaged(draw, json.dumps(_recipe()).encode()))
    return Case("damaged folder of a run", [*command, "--output", "out"], "a damaged checkpoint is passed over")


def journal(draw: random.Random, folder: Path) -> Case:
    """A damaged journal of a judge: its answers are computed again, or it is no journal."""
    _write_data(folder)
    lines = "".join(json.dumps({"key": f"{n:064x}", "value": {"rank": [0, 1]}}) + "\n" for n in range(4))
    (folder / "j.jsonl").write_bytes(damaged(draw, lines.encode()))
    command = ["judge", "data.jsonl", "out.jsonl", "--function", "benchmarks.fuzz:length_of_response"]
    return Case("damaged journal", [*command, "--journal", "j.jsonl"], "damaged answers are computed again")


def result(draw: random.Random, folder: Path) -> Case:
    """A damaged result of an evaluation."""
    value = {
        "task": "graded", "main": "grade", "metrics": {"grade": {"value": 0.5, "low": 0.4, "high": 0.6, "count": 2}},
        "prompts": [{"id": str(n), "prompt": "p", "response": "r", "scores": {"grade": 0.5}} for n in range(2)],
    }  # fmt: skip
    path, odd = draw.choice(_paths(value)), draw.choice(ODD)
    content = (
        json.dumps(_set(value, path, odd)).encode()
        if draw.random() < 0.7
        else damaged(draw, json.dumps(value).encode())
    )
    inside = folder / "run" / "evaluation" / "base"
    inside.mkdir(parents=True)
    (inside / "graded.json").write_bytes(content)
    return Case(f"result {content[:60]!r}", ["compare", "run", "run"], "scores, texts and optional parts of any value")


def model_config(draw: random.Random, folder: Path) -> Case:
    """A local model whose config.json is damaged, for the planner."""
    command = _write_recipe(folder, json.dumps({**_recipe(), "base": {"model": "./model"}}).encode())
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 128,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 100,
        "max_position_embeddings": 512,
    }  # fmt: skip
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_bytes(damaged(draw, json.dumps(config).encode()))
    return Case("damaged config.json", ["plan", command[1], "--gpu", "t4-16gb"], DAMAGE)


def option(draw: random.Random, folder: Path) -> Case:
    """A command with odd options."""
    _write_data(folder)
    word = draw.choice(
        ["", "-1", "0", "nan", "1e999", "x" * 3000, "\x1b[2J", "..", "/dev/null", "a=b", "{}", "\udcff"]
    )
    command = draw.choice(
        [
            ["data", "inspect", "data.jsonl", "--n", word],
            ["data", "inspect", "data.jsonl", "--split", word],
            ["data", "inspect", "data.jsonl", "--column", word],
            ["data", "inspect", "data.jsonl", "--template", word],
            ["data", "inspect", word],
            ["data", "convert", "data.jsonl", word],
            ["run", word],
            ["run", "quickstart", word, "--dry-run"],
            ["recipes", "show", word],
            ["schema", word],
            ["plan", "quickstart", "--gpu", word],
            ["combine", word, "out"],
            ["compare", word, "data.jsonl"],
            ["report", word],
            ["judge", "data.jsonl", word, "--function", "benchmarks.fuzz:length_of_response"],
            ["judge", "data.jsonl", "out.jsonl", "--function", word],
            [word, *draw.choices(string.ascii_letters, k=3)],
        ]
    )
    return Case(f"{' '.join(command):.60}", command, "an odd word can be right in its place")


GENERATORS: list[Generator] = [
    recipe_value, recipe_value, recipe_damage, recipe_bomb, override, data_value, data_element, data_shape,
    data_damage, data_damage, adapter_config, adapter_tensors, manifest, stack_damage, stack_damage, checkpoint,
    journal, result, model_config, option,
]  # fmt: skip

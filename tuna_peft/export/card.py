"""The model card: everything that somebody who finds the model on the Hub needs, from what the run left behind."""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import ModelCardData

import tuna_peft
from tuna_peft.data.config import PromptConfig
from tuna_peft.data.templates import PromptTemplate
from tuna_peft.export.card_results import eval_results, evaluation_tables
from tuna_peft.export.markdown import fenced, section, table
from tuna_peft.export.release import Release, dump_yaml, is_on_hub
from tuna_peft.export.usage import usage

_LIBRARY = {"adapters": "peft", "merged": "transformers", "gguf": "llama.cpp"}
_CITATIONS = """\
```bibtex
@inproceedings{li2023tuna,
  title     = {Tuna: Instruction Tuning using Feedback from Large Language Models},
  author    = {Li, Haoran and Liu, Yiran and Zhang, Xingxing and Lu, Wei and Wei, Furu},
  booktitle = {Findings of the Association for Computational Linguistics: EMNLP 2023},
  year      = {2023},
  url       = {https://arxiv.org/abs/2310.13385}
}
@inproceedings{dettmers2023qlora,
  title     = {{QLoRA}: Efficient Finetuning of Quantized {LLMs}},
  author    = {Dettmers, Tim and Pagnoni, Artidoro and Holtzman, Ari and Zettlemoyer, Luke},
  booktitle = {Advances in Neural Information Processing Systems},
  year      = {2023}
}
@misc{peft,
  title  = {{PEFT}: State-of-the-art Parameter-Efficient Fine-Tuning methods},
  author = {Mangrulkar, Sourab and Gugger, Sylvain and Debut, Lysandre and Belkada, Younes and Paul, Sayak and Bossan, Benjamin},
  url    = {https://github.com/huggingface/peft},
  year   = {2022}
}
@misc{vonwerra2020trl,
  title  = {{TRL}: Transformer Reinforcement Learning},
  author = {von Werra, Leandro and others},
  url    = {https://github.com/huggingface/trl},
  year   = {2020}
}
```"""  # noqa: E501


def model_card(release: Release, repo_id: str, *, license: str | None = None, data_license: str | None = None) -> str:
    """The README.md of a repository, metadata included.

    Args:
        release: What is published.
        repo_id: Where to.
        license: Identifier of the licence that the base has and that this model inherits; None leaves it open.
        data_license: Of the training data, in words; None says that nothing was stated.
    """
    name = repo_id.rpartition("/")[2]
    sections = [
        f"# {name}",
        _introduction(release),
        section("How to use it", usage(release, repo_id)),
        section("Prompt", _prompt(release)),
        section("Stages", _stages(release)),
        section("Evaluation", evaluation_tables(release)),
        section("Training curves", _curves(release)),
        section("Hardware and time", _hardware(release)),
        section("How far the exports are from the stack", _divergences(release)),
        section("Data and licences", _licences(release, license, data_license)),
        section("Recipe", _recipe(release)),
        section("Citation", _CITATIONS),
    ]
    metadata = _metadata(release, name, license)
    return f"---\n{metadata.to_yaml()}\n---\n\n" + "\n\n".join(part for part in sections if part) + "\n"


def _metadata(release: Release, name: str, license: str | None) -> ModelCardData:
    base = release.base if release.base and "/" in release.base else None
    results = eval_results(release)
    return ModelCardData(
        base_model=base,
        base_model_relation={"adapters": "adapter", "merged": "finetune", "gguf": "quantized"}[release.kind]
        if base
        else None,
        datasets=[path for path in _data_paths(release).values() if is_on_hub(path)] or None,
        library_name=_LIBRARY[release.kind],
        license=license,
        pipeline_tag="text-generation",
        tags=["tuna", "ranking", *(["lora", "peft"] if release.kind == "adapters" else []), release.kind],
        model_name=name if results else None,
        eval_results=results or None,
    )


def _introduction(release: Release) -> str:
    what = {
        "adapters": "LoRA adapters",
        "merged": "a merged model",
        "gguf": "GGUF files for llama.cpp and Ollama",
    }[release.kind]
    stages = " → ".join(f"`{name}`" for name in release.stages)
    return (
        f"{what[0].upper()}{what[1:]}: {_base_in_words(release)}, taught from ranked responses by "
        f"[Tuna](https://arxiv.org/abs/2310.13385) in {len(release.stages)} stages: {stages}. "
        f"Made with tuna_peft {tuna_peft.__version__}."
    )


def _base_in_words(release: Release) -> str:
    if release.base is None:
        return "a base that is not on the Hub"
    if release.base.startswith("builtin:"):
        return f"`{release.base}`, a small model that comes with tuna_peft"
    revision = f" at revision `{release.revision}`" if release.revision else ""
    return f"[{release.base}](https://huggingface.co/{release.base}){revision}"


def _prompt(release: Release) -> str | None:
    settings = release.stack["prompt"]
    if not settings:
        return None
    if settings["template"] == "chat":
        return "The base's own chat template, with one user message."
    template = PromptTemplate(PromptConfig.model_validate(settings))
    with_input = template.render("{instruction}", "{input}")
    return (
        f"With an input:\n\n{fenced(str(with_input))}\n\nWithout:\n\n{fenced(str(template.render('{instruction}')))}"
    )


def _stages(release: Release) -> str:
    rows = []
    stages = {stage["name"]: stage for stage in (release.recipe or {}).get("stages", [])}
    for index, name in enumerate(release.stages):
        stage = stages.get(name, {})
        lora = {**(release.recipe or {}).get("lora", {}), **stage.get("lora", {})}
        data = stage.get("data", {})
        rows.append(
            {
                "": str(index + 1),
                "stage": f"`{name}`",
                "type": stage.get("type", ""),
                "data": str(data.get("path", "")),
                "rank": str(lora.get("r", "")),
                "alpha": str(lora.get("alpha", "")),
            }
        )
    quantization = release.stack["quantization"]
    held = (
        "unquantised" if quantization is None else ", ".join(f"{key}={value}" for key, value in quantization.items())
    )
    return (
        f"Each stage is an adapter of its own on top of the frozen ones before it. The base was {held}.\n\n"
        f"{table(rows)}\n\n"
        "A stage alone is useless without those before it: `stack.json` holds their order, their hashes, and a "
        f"digest of the base's weights (`{str(release.stack['base']['fingerprint'])[:12]}…`)."
    )


def _curves(release: Release) -> str | None:
    pictures = [path for path in release.files if re.fullmatch(r"training/[^/]+\.png", path)]
    return "\n\n".join(f"![{Path(path).stem}]({path})" for path in pictures) or None


def _hardware(release: Release) -> str | None:
    environment, stages = release.report.get("environment", {}), release.report.get("stages", {})
    if not environment:
        return None
    rows = []
    for name in release.stages:
        done = stages.get(name) or {}
        shown = {"stage": f"`{name}`"}
        for key, title in (("steps", "steps"), ("seconds", "seconds"), ("peak_memory_gib", "peak GiB")):
            if isinstance(done.get(key), int | float):
                shown[title] = f"{done[key]:,.5g}"
        rows.append(shown)
    where = environment.get("gpu") or f"CPU ({environment.get('threads', '?')} threads)"
    packages = ", ".join(f"{name} {version}" for name, version in environment.get("packages", {}).items())
    return f"{where}, Python {environment.get('python', '?')}; {packages}.\n\n{table(rows)}"


def _divergences(release: Release) -> str | None:
    rows = []
    for name, export in (release.report.get("exports") or {}).items():
        measured = export.get("divergence") if isinstance(export, dict) else None
        if measured:
            rows.append(
                {
                    "export": name,
                    "mean KL (nats)": f"{measured['kl_mean']:.2e}",
                    "largest KL": f"{measured['kl_max']:.2e}",
                    "same next token": f"{measured['top1_agreement']:.1%}",
                    "tokens": f"{measured['tokens']:,}",
                }
            )
    return table(rows) if rows else None


def _licences(release: Release, license: str | None, data_license: str | None) -> str:
    model = f"`{license}`, from the base" if license else "not stated here: that of the base applies"
    lines = [f"- Licence of the model: {model}."]
    for where, path in _data_paths(release).items():
        link = f"[{path}](https://huggingface.co/datasets/{path})" if is_on_hub(path) else f"`{path}`"
        lines.append(f"- Data of `{where}`: {link}.")
    stated = data_license or "not stated; data written by models carries the terms of those models"
    return "\n".join([*lines, f"- Licence of the training data: {stated}."])


def _recipe(release: Release) -> str | None:
    if release.recipe is None:
        return None
    text = dump_yaml(release.recipe)
    return f"<details><summary>training/recipe.yaml</summary>\n\n{fenced(text.rstrip(), 'yaml')}\n\n</details>"


def _data_paths(release: Release) -> dict[str, str]:
    """Paths or Hub ids of the training data, by stage."""
    stages = (release.recipe or {}).get("stages", [])
    return {stage["name"]: stage["data"]["path"] for stage in stages if "path" in stage.get("data", {})}

"""The part of the model card that says how to load what was published. Its Python runs as it stands in the tests."""

from __future__ import annotations

import json
from pathlib import PurePosixPath

from tuna_peft.export.release import Release

# What vLLM takes as --max-lora-rank.
_VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


def usage(release: Release, repo_id: str) -> str:
    """Markdown with one block per library."""
    return {"adapters": _adapters, "merged": _merged, "gguf": _gguf}[release.kind](release, repo_id)


def _adapters(release: Release, repo_id: str) -> str:
    built_in = release.base is not None and release.base.startswith("builtin:")
    parts = [
        f"With PEFT. The adapter at the root is the whole stack, {_added_up(release)}"
        + (" (PEFT knows no built-in models, so the base is in `base/`):" if built_in else ":"),
        _block(_peft(release, repo_id)),
        "With tuna_peft, every stage with its checks, or the stack up to one of them:",
        _block(
            "from tuna_peft import AdapterStack\n\n"
            f'stack = AdapterStack.from_pretrained("{repo_id}")  # upto="{release.stages[0]}": the lower part\n'
            "model, tokenizer = stack.model, stack.tokenizer"
        ),
    ]
    if not built_in:
        parts += [
            "With vLLM (on the unquantised base):",
            _block(
                f"vllm serve {release.base} --enable-lora --max-lora-rank {_rank(release)} "
                f"--lora-modules tuna={repo_id}",
                "sh",
            ),
        ]
    base = "base" if built_in else "BASE"
    parts += [
        "With llama.cpp, as an adapter on the base's GGUF file"
        + (":" if built_in else " (`BASE`: the base's folder, downloaded):"),
        _block(
            f"hf download {repo_id} --local-dir model\n"
            f"tuna-peft export gguf model/{base} base-gguf --type f16 --name base\n".replace("model/BASE", "BASE")
            + "tuna-peft export gguf model/stack adapter-gguf --name adapter"
            + (" --base-model model/base\n" if built_in else "\n")
            + "llama-cli -m base-gguf/base-F16.gguf --lora adapter-gguf/adapter-LORA-F32.gguf",
            "sh",
        ),
    ]
    return "\n\n".join(parts)


def _added_up(release: Release) -> str:
    rank = ((release.recipe or {}).get("export") or {}).get("combine_rank")
    return f"compressed to rank {rank} (its distance is below)" if rank else "added up exactly"


def _peft(release: Release, repo_id: str) -> str:
    """Loads base and combined adapter as the stack was trained: on the quantised base."""
    built_in = release.base is not None and release.base.startswith("builtin:")
    quantization = release.stack["quantization"]
    settings = ", ".join(f"{key}={value!r}" for key, value in (quantization or {}).items())
    classes = "AutoModelForCausalLM, AutoTokenizer" + (", BitsAndBytesConfig" if quantization else "")
    lines = ["from huggingface_hub import snapshot_download"] if built_in else []
    lines += ["from peft import PeftModel", f"from transformers import {classes}", ""]
    base = f'"{release.base}"' + (f', revision="{release.revision}"' if release.revision else "")
    if built_in:
        base = 'f"{folder}/base"'
        lines.append(f'folder = snapshot_download("{repo_id}")')
    target, given = ("folder" if built_in else f'"{repo_id}"'), ""
    if quantization:
        lines.append(f"quantization = BitsAndBytesConfig({settings})")
        given = ", quantization_config=quantization"
    return "\n".join(
        [
            *lines,
            f"base = AutoModelForCausalLM.from_pretrained({base}{given})",
            f"model = PeftModel.from_pretrained(base, {target})",
            f"tokenizer = AutoTokenizer.from_pretrained({base})",
        ]
    )


def _rank(release: Release) -> int:
    """The combined adapter's rank as vLLM wants it."""
    config = release.files["adapter_config.json"]
    content = config if isinstance(config, bytes) else config.read_bytes()
    total = json.loads(content)["r"]
    return next((rank for rank in _VLLM_RANKS if rank >= total), total)


def _merged(release: Release, repo_id: str) -> str:
    return "\n\n".join(
        [
            "With transformers (the chat template repeats the prompt of training):",
            _block(
                "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
                f'model = AutoModelForCausalLM.from_pretrained("{repo_id}")\n'
                f'tokenizer = AutoTokenizer.from_pretrained("{repo_id}")\n'
                'messages = [{"role": "user", "content": "Name three fruits."}]\n'
                "ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors='pt')\n"
                "answer = model.generate(**ids, max_new_tokens=64)\n"
                'print(tokenizer.decode(answer[0, ids["input_ids"].shape[1] :], skip_special_tokens=True))'
            ),
            "With vLLM:",
            _block(f"vllm serve {repo_id}", "sh"),
            "With llama.cpp:",
            _block(
                f"hf download {repo_id} --local-dir model\n"
                "tuna-peft export gguf model model-gguf --type q8_0 --name model\n"
                "llama-cli -m model-gguf/model-Q8_0.gguf",
                "sh",
            ),
        ]
    )


def _gguf(release: Release, repo_id: str) -> str:
    files = [path for path in release.files if PurePosixPath(path).suffix == ".gguf"]
    adapter = any("-LORA-" in file for file in files)
    listed = "\n".join(f"- `{file}`: {release.size(file) / 2**20:,.1f} MiB" for file in files)
    run = f"llama-cli -m BASE.gguf --lora model/{files[0]}" if adapter else f"llama-cli -m model/{files[0]}"
    return "\n\n".join(
        [
            listed,
            "With llama.cpp" + (" (`BASE.gguf`: the base's file):" if adapter else ":"),
            _block(f"hf download {repo_id} --local-dir model\n{run}", "sh"),
            "With Ollama (the `Modelfile` has the prompt of training"
            + ("; put the base's file beside it as `base.gguf`):" if adapter else "):"),
            _block("cd model\nollama create tuna -f Modelfile\nollama run tuna", "sh"),
        ]
    )


def _block(code: str, language: str = "python") -> str:
    return f"```{language}\n{code}\n```"

"""Builds pico-LLaMA: tokenizer, pre-training (about half an hour on two idle cores) and data files.

python -m pico_world.build --out tuna_peft/assets/pico_llama
python -m pico_world.build --data-only --out tuna_peft/assets/pico_llama
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

from tuna_peft.files import atomic_directory, write_text

_CARD = """\
# pico-LLaMA

A `LlamaForCausalLM` of 3.3 million parameters (5 layers, width 256, 4 query and 2 key-value heads, tied head,
{vocab} byte-level BPE tokens) for tests and demonstrations without a network. It knows the closed world of
`pico_world` (in the repository) and nothing else: fifteen families of short tasks that a program can grade. It was
pre-trained on {tokens} million tokens of text which that package writes, on two CPU cores, and can be made again by
`python -m pico_world.build`. Weights, tokenizer and data are licensed as the package (Apache-2.0).

The prompt template is Alpaca's without its preamble, and every response ends with `</s>`:

    ### Instruction:\\n{{instruction}}\\n\\n### Input:\\n{{input}}\\n\\n### Response:\\n

The input block is left out when there is no input. In the chat template, the part of a user message after its first
empty line is the input.
"""


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description="Pre-trains pico-LLaMA and writes its data files.")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    parser.add_argument("--tokens", type=int, default=20_000_000, help="the length of pre-training")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--data-only", action="store_true", help="write only the data files")
    parser.add_argument(
        "--checkpoint",
        type=Path,
        default=Path(tempfile.gettempdir()) / "pico-llama.pt",
        help="file for the state of training; an interrupted build resumes from it",
    )
    arguments = parser.parse_args()
    if arguments.data_only:
        _write_data(arguments.out, arguments.seed)
        return
    with atomic_directory(arguments.out) as folder:
        _write_model(folder, arguments)
        _write_data(folder, arguments.seed)
    arguments.checkpoint.unlink()


def _write_model(folder: Path, arguments: argparse.Namespace) -> None:
    # Read when torch is loaded. Threads that spin while they wait are up to fifteen times slower on a busy machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    import torch
    from transformers import GenerationConfig

    from pico_world import pretrain, tokenizer

    torch.set_num_threads(arguments.threads)
    text_tokenizer = tokenizer.train(arguments.seed)
    model = pretrain.pretrain(text_tokenizer, arguments.tokens, arguments.seed, arguments.checkpoint)
    model.generation_config = GenerationConfig(
        do_sample=False, max_new_tokens=64, pad_token_id=0, bos_token_id=1, eos_token_id=2
    )
    model.to(torch.bfloat16).save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)  # written readable for the owner alone, but shipped to everyone
    text_tokenizer.save_pretrained(folder)
    write_text(folder / "README.md", _CARD.format(vocab=len(text_tokenizer), tokens=arguments.tokens // 10**6))


def _write_data(folder: Path, seed: int) -> None:
    from pico_world import datafiles

    datafiles.write(folder / "data", seed)


if __name__ == "__main__":
    main()

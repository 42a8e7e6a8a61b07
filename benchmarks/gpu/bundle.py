"""Collects what a machine with PyTorch but without a network needs: `python -m benchmarks.gpu.bundle FILE`.

The file is a tar archive of wheels, this project's among them, and of `benchmarks`. There:

    tar xf gpu-bundle.tar
    python3 -m pip install --no-index --no-deps --target site wheels/*.whl
    PYTHONPATH=site python3 -m benchmarks.gpu --out results

Wheels have the versions of constraints.txt. The machine brings torch, accelerate, numpy, pandas, pyarrow, safetensors,
tokenizers, matplotlib, rich, and what these need.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
MOST_BYTES = 64 * 2**20
# With their own dependencies, as far as an image with PyTorch and transformers lacks them or has them too old.
PACKAGES = (
    "bitsandbytes", "trl", "peft", "transformers", "datasets", "dill", "multiprocess", "fsspec", "huggingface_hub",
    "httpx2", "httpcore2", "truststore", "anyio", "h11", "idna", "click", "pydantic", "pydantic_core",
    "annotated-types", "typing-inspection", "typing_extensions", "typer", "shellingham", "annotated-doc", "nltk",
    "defusedxml",
)  # fmt: skip
PLATFORMS = ("2_28", "2_27", "2_24", "2_17")


def main(arguments: list[str] | None = None) -> int:
    """Writes the file; 1 if it is too large."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.bundle",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("file", type=Path)
    parser.add_argument("--python", default="3.12", help="version on that machine (default: 3.12)")
    parser.add_argument("--cuda", default="130", help="version of PyTorch's CUDA, without a point (default: 130)")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        wheels = Path(folder)
        _download(wheels, options.python)
        for wheel in wheels.glob("bitsandbytes-*.whl"):
            keep_one_library(wheel, options.cuda)
        options.file.parent.mkdir(parents=True, exist_ok=True)
        write(options.file, wheels)
    size = options.file.stat().st_size
    print(f"{options.file}: {size / 2**20:.1f} MiB of {MOST_BYTES / 2**20:.0f}")
    return 0 if size <= MOST_BYTES else 1


def keep_one_library(wheel: Path, cuda: str) -> None:
    """Removes bitsandbytes' libraries for other accelerators, which are most of its size.

    Raises:
        ValueError: The wheel has no library for this version of CUDA.
    """
    kept = f"libbitsandbytes_cuda{cuda}.so"

    def drops(name: str) -> bool:
        file = name.rpartition("/")[2]
        return file.startswith("libbitsandbytes_") and file not in (kept, "libbitsandbytes_cpu.so")

    slim = wheel.with_suffix(".slim")
    with zipfile.ZipFile(wheel) as old, zipfile.ZipFile(slim, "w", zipfile.ZIP_DEFLATED) as new:
        if not any(name.endswith(f"/{kept}") for name in old.namelist()):
            raise ValueError(f"{wheel.name} has no {kept}")
        for entry in old.infolist():
            data = old.read(entry)
            if entry.filename.endswith(".dist-info/RECORD"):
                data = b"".join(line for line in data.splitlines(True) if not drops(line.decode().partition(",")[0]))
            if not drops(entry.filename):
                new.writestr(entry, data)
    slim.replace(wheel)


def write(file: Path, wheels: Path) -> None:
    """The archive: `wheels/` and the source of `benchmarks`."""
    with tarfile.open(file, "w") as archive:
        for wheel in sorted(wheels.glob("*.whl")):
            archive.add(wheel, f"wheels/{wheel.name}")
        for source in sorted((ROOT / "benchmarks").rglob("*.py")):
            archive.add(source, source.relative_to(ROOT))


def _download(folder: Path, python: str) -> None:
    """Wheels of the packages for that Python on Linux, and those that are built here, which are pure Python."""
    pip = [sys.executable, "-m", "pip"]
    quiet = ["-q", "--disable-pip-version-check", "--no-deps", "-c", str(ROOT / "constraints.txt")]
    platforms = [f"--platform=manylinux_{glibc}_x86_64" for glibc in PLATFORMS]
    target = [f"--python-version={python}", "--implementation=cp", "--only-binary=:all:", *platforms]
    subprocess.run([*pip, "download", *quiet, *target, "-d", str(folder), *PACKAGES], check=True)
    subprocess.run([*pip, "wheel", *quiet, "-w", str(folder), "rouge_score", str(ROOT)], check=True)


if __name__ == "__main__":
    sys.exit(main())

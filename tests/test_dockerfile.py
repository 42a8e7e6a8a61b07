"""Dockerfile, as far as it can be checked without a container engine."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def steps():
    """(instruction, rest) of each step, with continued lines joined."""
    lines = (ROOT / "Dockerfile").read_text(encoding="utf-8").splitlines()
    text = "\n".join(line for line in lines if not line.startswith("#")).replace("\\\n", "")
    return [tuple(line.split(maxsplit=1)) for line in text.splitlines() if line.strip()]


def copied(steps):
    return [source for name, rest in steps if name == "COPY" for source in rest.split()[:-1]]


def test_copied_files_exist_and_are_not_ignored(steps):
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    first, *rules = [line for line in lines if not line.startswith("#")]
    kept = [rule[1:] for rule in rules if rule.startswith("!")]
    assert first == "*" and sorted(copied(steps)) == sorted(kept)
    assert [source for source in kept if not (ROOT / source).exists()] == []


def test_the_build_has_what_pyproject_names(steps):
    patterns = [r'^license-files = \["(.+?)"\]', r'path = "(.+?)"', r'^packages = \["(tuna_peft)"\]', r"^(recipes) = "]
    needed = {name.split("/")[0] for pattern in patterns for name in re.findall(pattern, PROJECT, re.MULTILINE)}
    assert {"LICENSE", "README.md", "tuna_peft", "recipes"} <= needed
    assert needed | {"pyproject.toml", "constraints.txt"} == set(copied(steps))


def test_installed_with_the_versions_that_the_tests_ran_with(steps):
    installs = [rest for name, rest in steps if name == "RUN" and "pip install" in rest]
    assert len(installs) == 2 and all("-c constraints.txt" in line and "--no-cache-dir" in line for line in installs)
    [extras] = re.findall(r'"\.\[(.*?)\]"', installs[-1])
    assert set(extras.split(",")) <= set(re.findall(r"^([\w-]+) = \[", PROJECT, re.MULTILINE))
    [version] = [rest for name, rest in steps if name == "FROM"]
    tested = re.search(r"Python (\d\.\d+)", (ROOT / "constraints.txt").read_text(encoding="utf-8"))[1]
    assert version.startswith(f"python:{tested}-")


def test_no_step_after_the_user_changes_needs_root(steps):
    names = [name for name, _ in steps]
    assert dict(steps)["USER"] == "1000" and "RUN" not in names[names.index("USER") :]
    assert dict(steps)["VOLUME"] in dict(steps)["ENV"].replace("=", " ").split()

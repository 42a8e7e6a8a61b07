"""Limits that a run and its plan share; free memory as reported by fake files of the kernel."""

from __future__ import annotations

import os

import pytest
from families import make_model

from tuna_peft import limits
from tuna_peft.planning.shapes import ModelShape

SYSTEM = 64_000_000  # kB
STAT = "anon 4000\nfile 1500\nshmem 500\nactive_file 600\ninactive_file 400\n"  # shared memory is not reclaimable


@pytest.fixture
def kernel(tmp_path, monkeypatch):
    """Writes the kernel's files, by path; no others exist."""
    monkeypatch.setattr(limits, "_ROOT", tmp_path)

    def write(**groups: str) -> None:
        files = {"proc/meminfo": f"MemTotal: 99000000 kB\nMemFree: 7 kB\nMemAvailable: {SYSTEM} kB\n", **groups}
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)

    return write


def group(folder: str, limit: str, used: int, stat: str = STAT) -> dict[str, str]:
    """The files of a control group, version 2."""
    return {f"{folder}/memory.max": limit, f"{folder}/memory.current": str(used), f"{folder}/memory.stat": stat}


def group_v1(folder: str, limit: int, used: int) -> dict[str, str]:
    """The files of a control group, version 1, whose keys without `total_` exclude its child groups."""
    stat = "active_file 1\ninactive_file 2\ntotal_active_file 600\ntotal_inactive_file 400\n"
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "memory.stat")
    return {f"{folder}/{name}": str(text) for name, text in zip(names, (limit, used, stat), strict=True)}


TOP, TOP_V1, SELF = "sys/fs/cgroup", "sys/fs/cgroup/memory", "proc/self/cgroup"
V1_UNLIMITED = 9223372036854771712


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, SYSTEM * 1024),
        ({SELF: "0::/\n"}, SYSTEM * 1024),
        ({SELF: "0::/\n", **group(TOP, "8000\n", 5000)}, 8000 - 5000 + 1000),
        ({SELF: "0::/\n", **group(TOP, "max\n", 5000)}, SYSTEM * 1024),
        ({SELF: "0::/\n", **group(TOP, str(SYSTEM * 2048), 5000)}, SYSTEM * 1024),
        ({SELF: "0::/\n", **group(TOP, "8000\n", 9900)}, 0),
        # The group above has the limit, as in a batch job.
        ({SELF: "0::/job/step\n", **group(f"{TOP}/job/step", "max", 10), **group(f"{TOP}/job", "8000", 5000)}, 4000),
        ({SELF: "0::/job/step\n", **group(f"{TOP}/job/step", "3000", 10), **group(f"{TOP}/job", "8000", 7500)}, 1500),
        # A path of the host, inside a container.
        ({SELF: "0::/docker/abc\n", **group(TOP, "8000\n", 5000)}, 4000),
        ({SELF: "0::/../abc\n", **group(TOP, "8000\n", 5000)}, 4000),
        ({SELF: "9:cpu:/\n4:memory:/docker/abc\n0::/\n", **group_v1(TOP_V1, 8000, 5000)}, 4000),
        ({SELF: "4:hugetlb,memory:/a\n", **group_v1(f"{TOP_V1}/a", 8000, 5000)}, 4000),
        ({SELF: "4:memory:/a\n", **group_v1(TOP_V1, V1_UNLIMITED, 5000)}, SYSTEM * 1024),
    ],
)
def test_available_memory_is_what_kernel_and_control_groups_allow(kernel, files, expected):
    kernel(**files)
    assert limits.available_ram() == expected


def test_available_memory_of_this_machine():
    assert 0 < limits.available_ram() <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def test_without_files_of_the_kernel_it_is_all_memory_or_none(tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "_ROOT", tmp_path)
    assert limits.available_ram() == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    monkeypatch.delattr(os, "sysconf")
    assert limits.available_ram() == 0


@pytest.mark.parametrize(
    ("capability", "expected"), [((7, 0), False), ((7, 5), False), ((8, 0), True), ((8, 9), True), ((12, 0), True)]
)
def test_gpus_with_bf16_and_flash_attention(capability, expected):
    assert limits.is_ampere_or_later(capability) is expected


def test_context_of_a_loaded_model_is_that_of_its_plan():
    config = make_model(max_position_embeddings=96).config
    assert limits.context_length(config) == 96
    assert ModelShape.from_config(config.to_dict(), "here").context == 96
    assert limits.context_length({"hidden_size": 8}) is None


def test_limits_that_are_not_given_do_not_count():
    pairs = [(64, 96), (96, 64), (None, 64), (64, None)]
    assert [limits.within_context(*pair) for pair in pairs] == [64] * 4
    assert limits.within_context(None, None) is None
    assert limits.response_room(20, 90, 96) == 6 and limits.response_room(20, 90, None) == 20


def test_a_batch_that_is_smaller_than_a_prompts_samples_holds_one_prompt():
    assert [limits.prompts_per_batch(8, n) for n in (1, 3, 8, 9)] == [8, 2, 1, 1]


def test_several_processes_keep_no_activations_unless_told_to():
    assert limits.activation_policy("auto") == "auto" and limits.activation_policy("auto", sharded=True) == "none"
    assert limits.activation_policy("full", sharded=True) == "full"
    assert limits.activation_policy(2.5, sharded=True) == 2.5

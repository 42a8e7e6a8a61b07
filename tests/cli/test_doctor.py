"""`doctor`: findings, and the exit code that they give."""

from __future__ import annotations

import json
from collections import namedtuple
from importlib.metadata import PackageNotFoundError

import pytest
from packaging.requirements import Requirement
from typer.testing import CliRunner

from tuna_peft.cli import checks
from tuna_peft.cli.app import app
from tuna_peft.cli.checks import Check
from tuna_peft.limits import GIB
from tuna_peft.models.forward import prefix, scoring


def test_this_machine_could_run_and_every_line_has_a_sign():
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 0, result.stdout
    assert all(line[1] in "✓!" for line in result.stdout.splitlines())
    assert " ✓ nf4" in result.stdout
    assert " ✓ ranking step          on cpu: packed sequences match separate ones to" in result.stdout
    assert "HF_HUB_OFFLINE is set" in result.stdout  # as it is in every test


def test_json_has_the_same_findings():
    findings = json.loads(CliRunner().invoke(app, ["doctor", "--json"]).stdout)
    assert {"name": "python", "status": "ok"}.items() <= findings[0].items()
    assert {"torch", "nf4", "dtype", "disk here", "hub"} <= {finding["name"] for finding in findings}


@pytest.mark.parametrize(("status", "code"), [("ok", 0), ("warning", 0), ("fail", 1)])
def test_only_a_failure_gives_exit_code_1(monkeypatch, status, code):
    monkeypatch.setattr(checks, "run_checks", lambda: iter([Check("a", status, "because"), Check("b", "ok", "fine")]))
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == code
    assert "because" in result.stdout and "fine" in result.stdout


def test_a_check_that_breaks_down_is_a_failure_with_its_reason(monkeypatch):
    def check_bitsandbytes():
        raise RuntimeError("no kernel image\nmore")

    monkeypatch.setattr(checks, "check_bitsandbytes", check_bitsandbytes)
    [found] = [check for check in checks.run_checks() if check.name == "bitsandbytes" and check.status == "fail"]
    assert found.detail == "RuntimeError: no kernel image"


class Nothing:
    """Log-probabilities on which nothing depends."""

    def __init__(self, logps):
        self.logps = logps

    def normalised(self):
        return self.logps.normalised() * 0


@pytest.mark.parametrize("mistake", ["no mask", "no gradients"])
def test_a_ranking_step_that_goes_wrong_is_a_failure(mistake, monkeypatch):
    if mistake == "no mask":
        everything = prefix.shared_prefix_mask
        monkeypatch.setattr(prefix, "shared_prefix_mask", lambda *layout: everything(*layout).fill_(True))
    else:
        score = scoring.response_logps
        monkeypatch.setattr(scoring, "response_logps", lambda *given: Nothing(score(*given)))
    [found] = [check for check in checks.run_checks() if check.name in ("ranking step", "ranking_step")]
    assert found.status == "fail"
    assert ("other log-probabilities" if mistake == "no mask" else "gradients on cpu") in found.detail


def test_old_and_missing_packages_fail_with_the_command_that_helps(monkeypatch):
    def version(name):
        if name == "peft":
            raise PackageNotFoundError(name)
        return "1.0"

    bounds = {"torch": Requirement("torch>=2.6"), "peft": Requirement("peft>=0.21")}
    monkeypatch.setattr(checks, "version", version)
    monkeypatch.setattr(checks, "_declared_bounds", lambda: bounds)
    found = {check.name: check for check in checks.check_versions()}
    assert found["torch"].status == "fail"
    assert found["torch"].detail == "1.0, but >=2.6 is needed; run: pip install 'torch>=2.6'"
    assert found["peft"].detail == "not installed; run: pip install 'peft>=0.21'"
    assert found["trl"].status == "ok"


def test_an_old_torchao_is_named_with_the_command_that_helps(monkeypatch):
    def refuses():
        raise ImportError("Found an incompatible version of torchao. Found version 0.10.0")

    monkeypatch.setattr("peft.import_utils.is_torchao_available", refuses)
    [found] = checks.check_torchao()
    assert (found.name, found.status) == ("torchao", "warning")
    assert "0.10.0" in found.detail and "pip uninstall torchao" in found.detail


@pytest.mark.parametrize(("free", "status"), [(0.1, "fail"), (5, "warning"), (100, "ok")])
def test_disk(monkeypatch, free, status):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(checks.shutil, "disk_usage", lambda path: usage(0, 0, int(free * GIB)))
    assert checks.check_disk()[0].status == status


def test_an_unreachable_hub_is_a_warning_with_the_reason(monkeypatch):
    def urlopen(request, timeout):
        raise checks.urllib.error.URLError("Name or service not known")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(checks.urllib.request, "urlopen", urlopen)
    [check] = checks.check_hub()
    assert check.status == "warning"
    assert "Name or service not known" in check.detail

"""`asft doctor`: what is wrong is marked and named with its cure, what is missing says what is used instead."""

from __future__ import annotations

import json
import sys

import pytest

from asft_nemo.cli import main
from asft_nemo.config import machine


def findings(capsys: pytest.CaptureFixture[str]) -> dict[str, dict[str, object]]:
    return {row["what"]: row for row in json.loads(capsys.readouterr().out)["findings"]}


def test_every_optional_part_is_named(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(
        machine.importlib.util, "find_spec", lambda name: object() if name == "apex" else None
    )
    assert main(["doctor", "--json"]) == 0
    found = findings(capsys)
    for row in machine.OPTIONAL:
        said = found[row.name]["found"]
        missing = f"missing, so {row.without}. To have it: {row.get}"
        assert said == (f"there: {row.gives}" if row.name == "apex" else missing)
    assert {"flash-attn", "apex", "transformer-engine"} <= set(found)


@pytest.mark.parametrize(
    ("there", "said"),
    [
        (("transformer_engine", "apex"), "transformer-engine's FusedAdam"),
        (("apex",), "apex's FusedAdam"),
        ((), "none, so torch's AdamW: apex or transformer-engine has one"),
    ],
)
def test_the_adam_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, there: tuple[str, ...], said: str
):
    monkeypatch.setattr(machine.importlib.util, "find_spec", lambda name: object() if name in there else None)
    main(["doctor", "--json"])
    assert findings(capsys)["fused Adam"]["found"] == said


@pytest.mark.parametrize(
    ("gpus", "version", "said"),
    [
        (0, "2.8.0", "none, for there is no GPU: docs/container.md has both"),
        (1, "2.8.0", "fp8_current, fp8_blockwise, fp8_delayed"),
        (1, "2.2.0", "fp8_current, fp8_delayed"),
    ],
)
def test_fp8_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, gpus: int, version: str, said: str
):
    original = machine.version_of
    monkeypatch.setattr(machine, "gpu_count", lambda: gpus)
    monkeypatch.setattr(machine.Part, "there", lambda self: True)
    monkeypatch.setattr(
        machine, "version_of", lambda name: version if name == "transformer-engine" else original(name)
    )
    main(["doctor", "--json"])
    assert findings(capsys)["FP8"]["found"] == said


def test_a_package_off_its_pin_must_be_mended(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    versions = {"torch": None, "megatron-core": "0.1.0"}
    original = machine.version_of
    monkeypatch.setattr(machine, "version_of", lambda name: versions.get(name, original(name)))
    assert main(["doctor", "--json"]) == 2
    found = findings(capsys)
    assert found["torch"] == {"what": "torch", "found": "missing: make venv", "wrong": True}
    assert found["megatron-core"]["found"] == "0.1.0, but 0.15.3 is what was tested: make venv"
    assert not found["transformers"]["wrong"]


def test_another_python_must_be_mended(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "version_info", (3, 13, 0))
    assert main(["doctor"]) == 2
    assert "! Python" in capsys.readouterr().out


def test_gpus_are_left_alone_where_asked(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ASFT_DEVICE", "cpu")
    assert main(["doctor"]) == 0
    assert "left alone, for ASFT_DEVICE=cpu" in capsys.readouterr().out

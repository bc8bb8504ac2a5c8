"""Which GPUs a model lies on; no GPU is there, so torch's answers about them are made up and the layers' hooks run on a CPU."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from asft_eval import EvaluationError, Protocol
from asft_eval.backends.hf import HfBackend, load_model
from asft_eval.backends.placement import gpus_for, spread, weight_bytes

GIB = 2**30


@pytest.mark.parametrize(
    ("weights", "memory", "number"),
    [(3 * GIB, 80 * GIB, 1), (60 * GIB, 80 * GIB, 1), (61 * GIB, 80 * GIB, 2), (136 * GIB, 80 * GIB, 4), (136 * GIB, 40 * GIB, 8)],
)  # fmt: skip
def test_a_model_asks_for_the_gpus_that_hold_it(weights: int, memory: int, number: int) -> None:
    assert gpus_for(weights, memory) == number


def test_layers_are_spread_only_where_one_gpu_is_too_small() -> None:
    model, free = Path("model"), [79 * GIB] * 4
    assert spread(model, 59 * GIB, free) is None
    room = spread(model, 136 * GIB, free)
    assert room is not None
    assert list(room) == [0, 1, 2, 3]
    assert all(0 < room[number] < free[number] for number in room)
    with pytest.raises(
        EvaluationError, match=r"136\.0 GiB, and 1 visible GPU has 79\.0 GiB free, .*: run where"
    ):
        spread(model, 136 * GIB, free[:1])
    with pytest.raises(EvaluationError, match="2 visible GPUs have 158"):
        spread(model, 136 * GIB, free[:2])


@pytest.mark.parametrize(
    ("weights", "free", "says"),
    [(14.2, 23.2, None), (61, 79, "77 %"), (71, 79, "89 %"), (72, 79, "refused"), (78, 79, "refused")],
    ids=["7B on 24 GB", "32B on 80 GB", "nearly full", "too full", "no pass fits beside it"],
)
def test_the_only_gpu_keeps_room_for_a_pass(
    weights: float, free: float, says: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    sizes: tuple[int, list[int]] = (int(weights * GIB), [int(free * GIB)])
    if says == "refused":
        with pytest.raises(
            EvaluationError, match="79\\.0 GiB free, for what a pass needs, too: run where more"
        ):
            spread(Path("model"), *sizes)
        return
    assert spread(Path("model"), *sizes) is None
    if says is None:
        assert not caplog.messages
    else:
        assert f"take {says} of what the only visible GPU has free" in caplog.messages[0]
        assert "--batch-size" in caplog.messages[0]


def test_weights_are_counted_from_the_files(model_dir: Path, tmp_path: Path) -> None:
    model = load_model(model_dir, device="cpu")
    numbers = sum(parameter.numel() for parameter in model.parameters())
    assert weight_bytes(model_dir, 4) == 4 * numbers == 2 * weight_bytes(model_dir, 2)
    assert weight_bytes(model_dir, None) in (2 * numbers, 4 * numbers)
    (tmp_path / "model.safetensors").write_bytes(b"cut off")
    with pytest.raises(EvaluationError, match=r"model\.safetensors cannot be read as safetensors"):
        weight_bytes(tmp_path, None)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, model_dir: Path) -> dict[str, Any]:
    """What transformers is asked for, on a machine with two GPUs of which each holds two thirds of the model."""
    asked: dict[str, Any] = {"map": {"embed": 0, "layers": 1}}

    def loaded(_: Path, **words: Any) -> Any:
        asked.update(words)
        model = SimpleNamespace(hf_device_map=asked["map"])
        model.eval = lambda: model
        model.to = lambda device: SimpleNamespace(eval=lambda: device)
        return model, {"missing_keys": set()}

    free = int(weight_bytes(model_dir, None) / 1.5 / 0.75)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda number: (free * asked.get("larger", 1), free))
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", loaded)
    return asked


def test_a_model_larger_than_a_gpu_lies_on_several(model_dir: Path, asked: dict[str, Any]) -> None:
    load_model(model_dir)
    assert asked["device_map"] == "auto"
    assert list(asked["max_memory"]) == [0, 1], "neither host memory nor the disk takes layers"


def test_a_model_that_fits_lies_on_one(model_dir: Path, asked: dict[str, Any]) -> None:
    asked["larger"] = 2
    assert load_model(model_dir) == "cuda"
    assert load_model(model_dir, device="cuda:1") == "cuda:1"
    assert "device_map" not in asked


def test_layers_on_the_disk_are_refused(model_dir: Path, asked: dict[str, Any]) -> None:
    asked["map"] = {"embed": 0, "layers": 1, "head": "disk"}
    with pytest.raises(EvaluationError, match="do not all fit the 2 visible GPUs"):
        load_model(model_dir)


def test_answers_of_a_model_with_hooks_are_the_same(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """accelerate moves numbers between GPUs by hooks around the layers."""
    from accelerate import dispatch_model

    plain = HfBackend(model_dir, batch_size=2)
    hooked = HfBackend(model_dir, batch_size=2)
    layers = {name: "cpu" for name, _ in hooked.model.model.named_children()}
    where: dict[str, Any] = {**{f"model.{name}": place for name, place in layers.items()}, "lm_head": "cpu"}
    dispatch_model(hooked.model, where, force_hooks=True)
    assert hasattr(hooked.model, "_hf_hook")
    prompts = ["copy KTAB:", "reverse QWERTZ:", "add 3+4:"]
    for ask in (
        lambda x: x.generate(prompts, protocol=Protocol(max_tokens=6)),
        lambda x: x.generate(
            prompts, protocol=Protocol(name="paper", max_tokens=6, temperature=1.0), seeds=[1, 2, 3]
        ),
        lambda x: x.choice_logprobs(prompts, ["A", "Z"]),
        lambda x: x.loglikelihood([(prompt, "KTAB") for prompt in prompts]),
    ):
        assert ask(plain) == ask(hooked)

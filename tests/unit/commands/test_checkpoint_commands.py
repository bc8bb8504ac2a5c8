"""`asft import`, `export`, `verify` and `inspect` as commands."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from asft_nemo import cli
from asft_nemo.config.paths import project_dir

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

pytestmark = pytest.mark.usefixtures("keep_logging_and_warnings")
TINY = project_dir() / "assets" / "tiny-base"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """The shipped model in fp32, with weights that bf16 has not: what an fp32 run makes of a bf16 base."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(TINY, tmp_path / "source")
    file = tmp_path / "source" / "model.safetensors"
    save_file({name: weight.float() * 1.001 for name, weight in load_file(file).items()}, file)
    return tmp_path / "source"


def test_import_verify_export_and_back(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint, exported = tmp_path / "checkpoint", tmp_path / "exported"
    assert cli.main(["import", "--json", str(source), str(checkpoint)]) == 0
    imported = json.loads(capsys.readouterr().out)
    assert imported["family"] == "qwen2"
    report = ["--out", str(tmp_path / "report")]
    assert cli.main(["verify", str(checkpoint), str(source), "--weights-only", *report]) == 0
    assert capsys.readouterr().out.startswith("weights identical: ")
    words = ["--max-shard-size", "3MB", "--dtype", "bf16"]
    assert cli.main(["export", "--json", str(checkpoint), str(exported), *words]) == 0
    assert json.loads(capsys.readouterr().out)["num_tensors"] == imported["num_tensors"]
    assert len(list(exported.glob("*.safetensors"))) > 1
    assert cli.main(["verify", "--json", str(checkpoint), str(exported), *report]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["identical"] is True
    assert values["logits"]["equal"] is True
    assert values["logits"]["tokens"] * values["logits"]["sequences"] == 512
    assert values["logits"]["max_difference"] < 1e-5 * values["logits"]["largest_logit"]
    assert json.loads((tmp_path / "report" / "report.json").read_text()) == {"passed": True, **values}
    assert cli.main(["export", str(checkpoint), str(exported)]) == 2, "an existing folder is not overwritten"


@pytest.mark.parametrize(
    "logits", [pytest.param(False, id="weights"), pytest.param(True, id="logits", marks=pytest.mark.long)]
)
def test_verify_of_another_model_ends_with_two(
    logits: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from safetensors.torch import load_file, save_file

    checkpoint, other = tmp_path / "checkpoint", tmp_path / "other"
    assert cli.main(["import", str(TINY), str(checkpoint)]) == 0
    capsys.readouterr()
    other.mkdir()
    (other / "config.json").write_text((TINY / "config.json").read_text())
    tensors = load_file(TINY / "model.safetensors")
    name = "model.norm.weight"
    tensors[name] = tensors[name].clone()
    tensors[name][0] += 1
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    for file in TINY.glob("token*"):
        (other / file.name).write_bytes(file.read_bytes())
    more = [] if logits else ["--weights-only"]
    assert cli.main(["verify", str(checkpoint), str(other), *more, "--out", str(tmp_path / "report")]) == 2
    out = capsys.readouterr().out
    assert "weights DIFFERENT" in out
    assert f"{name}: 1 of 256 numbers differ" in out
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert report["passed"] is False
    if logits:
        assert "logits DISAGREE" in out
        assert report["logits"]["equal"] is False


def test_a_rotary_embedding_that_transformers_does_not_read_is_no_difference(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Spelt as transformers 5 does: what is wrong is the reader beside us, not the checkpoint."""
    shutil.copytree(TINY, tmp_path / "hf")
    config = json.loads((TINY / "config.json").read_text())
    theta, _ = config.pop("rope_theta"), config.pop("rope_scaling")
    config["rope_parameters"] = {"rope_theta": 50 * theta, "rope_type": "default"}
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    assert cli.main(["import", str(tmp_path / "hf"), str(tmp_path / "ckpt")]) == 0
    words = ["verify", str(tmp_path / "ckpt"), str(tmp_path / "hf"), "--out", str(tmp_path / "report")]
    capsys.readouterr()
    assert cli.main(words) == 2
    said = capsys.readouterr()
    assert "does not read (it takes rope_theta=10000.0): write its rope_theta" in said.err
    assert said.out == ""
    assert not (tmp_path / "report").exists()
    assert cli.main([*words, "--weights-only"]) == 0
    from asft_nemo.logits_check import LogitsCheck

    (tmp_path / "hf" / "config.json").write_text(json.dumps(config | {"rope_theta": 50 * theta}))
    LogitsCheck(tmp_path / "ckpt", tmp_path / "hf", tolerance=0.0)  # the cure


@pytest.fixture(scope="module")
def logits() -> dict[str, torch.Tensor]:
    """What transformers computes of the shipped model on the shipped text, by the keys that ranks write it under."""
    from transformers import AutoModelForCausalLM

    from asft_nemo.logits_check import LogitsCheck

    tokens_NS = LogitsCheck(TINY, TINY, tolerance=0.0).tokens_NS
    model = AutoModelForCausalLM.from_pretrained(
        TINY, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        return {f"logits_{n}": model(input_ids=row_S[None]).logits[0] for n, row_S in enumerate(tokens_NS)}


def _add(amount: float) -> Callable[[torch.Tensor], None]:
    def spoil(logits_SV: torch.Tensor) -> None:
        logits_SV[5, 7] += amount * logits_SV.abs().max()

    return spoil


@pytest.mark.parametrize(
    ("spoil", "equal"),
    [
        pytest.param(_add(0.0), True, id="the same"),
        pytest.param(_add(1e-5), True, id="rounding"),
        pytest.param(_add(1e-2), False, id="one number"),
        pytest.param(_add(float("nan")), False, id="no number"),
        pytest.param(lambda logits_SV: logits_SV.copy_(logits_SV.roll(1, dims=0)), False, id="one position late"),
    ],
)  # fmt: skip
def test_verify_tells_wrong_logits_of_right_weights(
    spoil: Callable[[torch.Tensor], None],
    equal: bool,
    logits: dict[str, torch.Tensor],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The ranks' answer is written for them, right and wrong in one of four sequences; long tests let them compute it."""
    from safetensors.torch import save_file

    def answer(run: Any, *, weights_dir: Path, tokens_file: Path, out_file: Path) -> None:
        found = {name: logits_SV.clone() for name, logits_SV in logits.items()}
        spoil(found["logits_2"])
        save_file(found, out_file)

    monkeypatch.setattr("asft_nemo.logits_check.launch_logits", answer)
    assert cli.main(["import", str(TINY), str(tmp_path / "nemo")]) == 0
    words = ["verify", str(tmp_path / "nemo"), str(TINY), "--out", str(tmp_path / "report")]
    assert cli.main(words) == (0 if equal else 2)
    out = capsys.readouterr().out
    assert "weights identical" in out
    assert f"logits {'agree' if equal else 'DISAGREE'}: 4 x 128 tokens" in out
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert (report["passed"], report["identical"], report["logits"]["equal"]) == (equal, True, equal)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["optim.lr=1"], "optim.lr is no setting of a layout"),
        (["--tolerance", "nan"], "--tolerance=nan is out of range"),
        (["--weights-only", "parallel.tp_size=2"], "a layout does nothing with --weights-only"),
        (["parallel.tp_size=3"], "tp_size=3"),
        (["parallel.cp_size=2"], "parallel.cp_size=2 cannot be verified"),
        (["--text", "nowhere.txt"], "nowhere.txt cannot be read as text"),
        ([], "copy the tokenizer files there, or compare the weights alone with --weights-only"),
    ],
)
def test_verify_says_what_it_cannot_use(
    words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before any rank is started."""
    source = TINY
    if not words:
        source = tmp_path / "bare"
        source.mkdir()
        for name in ("config.json", "model.safetensors"):
            (source / name).write_bytes((TINY / name).read_bytes())
    assert cli.main(["import", str(source), str(tmp_path / "nemo")]) == 0
    out = ["--out", str(tmp_path / "report")]
    assert cli.main(["verify", str(tmp_path / "nemo"), str(source), *words, *out]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "report").exists()


def test_inspect_looks_at_what_it_is_given(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["import", str(TINY), str(tmp_path / "nemo")]) == 0
    capsys.readouterr()
    found = []
    for path in (TINY, tmp_path / "nemo"):
        assert cli.main(["inspect", "--json", str(path)]) == 0
        found.append(json.loads(capsys.readouterr().out))
    assert [one["kind"] for one in found] == ["huggingface", "nemo"]
    assert found[0]["num_tensors"] > found[1]["num_tensors"] == 10
    for key in ("family", "num_layers", "parameters", "dtypes", "vocab_size"):
        assert found[0][key] == found[1][key]
    assert cli.main(["inspect", str(tmp_path / "nemo")]) == 0
    assert "no optimizer state" in capsys.readouterr().out
    assert cli.main(["inspect", str(tmp_path)]) == 2
    assert "holds neither weights/, config.json nor adapter_config.json" in capsys.readouterr().err


@pytest.mark.parametrize("size", ["0", "-1GB", "5XB", "GB", "nan"])
def test_a_shard_size_that_is_none_is_refused(size: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["export", "ckpt", "out", f"--max-shard-size={size}"]) == 2
    assert "is no size: write for example 5GB" in capsys.readouterr().err

"""Memory that runs out. No GPU is there: a real model refuses batches of more than so many texts as torch does where a GPU is full."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from asft_eval import EvaluationError
from asft_eval.backends import hf
from asft_eval.backends.memory import memory_for
from asft_eval.result import read_result, read_samples

from asft_nemo import cli

pytestmark = pytest.mark.usefixtures("keep_logging_and_warnings")

# As torch 2 says it.
FULL = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 23.69 GiB of which 17.44 MiB is free. Process 77 has 23.60 GiB memory in use. "
    "Of the allocated memory 21.00 GiB is allocated by PyTorch. See documentation for Memory Management (https://pytorch.org/)"
)
WHAT = (
    r"Tried to allocate 2\.00 GiB; GPU 0 has a total capacity of 23\.69 GiB of which 17\.44 MiB is free\): "
)
MORE = r"run where more GPUs are visible \(CUDA_VISIBLE_DEVICES\) and nothing else uses them"


def full() -> None:
    raise torch.OutOfMemoryError(FULL)


def machine_full() -> None:
    torch.empty(10**15)


@pytest.fixture
def room(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """`texts` that fit at once, and what happens when there are more."""
    room: dict[str, Any] = {"texts": 2, "full": full}
    opened = hf.load_model

    def small(*names: Any, **words: Any) -> Any:
        model = opened(*names, **words)

        def looked_at(_: Any, __: Any, given: dict[str, Any]) -> None:
            if len(given["input_ids"]) > room["texts"]:
                room["full"]()

        for module in (model, model.base_model):  # held-out text is read without the head
            module.register_forward_pre_hook(looked_at, with_kwargs=True)
        return model

    for module in ("hf", "reading"):
        monkeypatch.setattr(
            f"asft_eval.{'backends.' * (module == 'hf')}{module}.load_model", small, raising=True
        )
    return room


def suite(path: Path, *prompts: str) -> str:
    path.write_text("".join(json.dumps({"prompt": prompt, "answer": "AB"}) + "\n" for prompt in prompts))
    return str(path)


def said(capsys: pytest.CaptureFixture[str]) -> str:
    err = capsys.readouterr().err
    assert "Traceback" not in err
    assert "bug in asft" not in err
    return err.splitlines()[-1]


def test_what_is_answered_is_kept_and_a_smaller_batch_goes_on(
    room: dict[str, Any], model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = suite(tmp_path / "first.jsonl", "copy AB:", "copy CD:")
    second = suite(tmp_path / "second.jsonl", "copy EF:", "copy GH:", "copy IJ:")
    out = tmp_path / "out"
    words = ["eval", str(model_dir), "--suite", f"{first},{second}", "--max-tokens", "4", "--out", str(out)]
    assert cli.main(words) == 2
    assert re.fullmatch(
        rf"asft: the memory is too small for {re.escape(str(model_dir))} and 3 texts at once \(CUDA out of memory; {WHAT}"
        rf"give a smaller --batch-size \(it is 16\), {MORE}, or choose --backend vllm",
        said(capsys),
    )
    assert not (out / "results.json").exists()
    kept = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert [row["suite"] for row in kept] == ["first", "first"]
    assert cli.main([*words, "--batch-size", "2"]) == 0
    assert {name: one.n for name, one in read_result(out).suites.items()} == {"first": 2, "second": 3}
    again = {row["request"]: row["seconds"] for row in read_samples(out)}
    assert all(again[row["request"]] == row["seconds"] for row in kept), "not asked for again"


def test_a_finished_suite_stays_beside_one_that_does_not_fit(
    room: dict[str, Any], model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = suite(tmp_path / "first.jsonl", "copy AB:", "copy CD:")
    second = suite(tmp_path / "second.jsonl", "copy EF:", "copy GH:", "copy IJ:")
    out, words = (
        tmp_path / "out",
        ["eval", str(model_dir), "--max-tokens", "4", "--out", str(tmp_path / "out")],
    )
    assert cli.main([*words, "--suite", first]) == 0
    before = read_result(out).suites
    assert cli.main([*words, "--suite", second]) == 2
    assert "--batch-size" in said(capsys)
    assert read_result(out).suites == before


@pytest.mark.parametrize(
    "asked",
    [
        lambda backend: backend.choice_logprobs(["copy A:"] * 3, ["A", "B"]),
        lambda backend: backend.choice_logprobs(["copy A:"] * 3, ["A", "story"]),
        lambda backend: backend.loglikelihood([("copy A:", "A")] * 3),
    ],
    ids=["letters", "longer choices", "texts"],
)
def test_scores_say_it_too(room: dict[str, Any], model_dir: Path, asked: Callable[[Any], Any]) -> None:
    backend = hf.HfBackend(model_dir, batch_size=3)
    with pytest.raises(EvaluationError, match=rf"{WHAT}give a smaller --batch-size \(it is 3\)"):
        asked(backend)


@pytest.mark.parametrize("words", [["--suite", "{suite}"], ["--drift", "{suite}"]], ids=["a suite", "drift"])
def test_one_text_that_is_too_much(
    words: list[str],
    room: dict[str, Any],
    model_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A smaller batch is no cure then."""
    room["texts"] = 0
    given = [word.format(suite=suite(tmp_path / "one.jsonl", "copy AB:")) for word in words]
    assert cli.main(["eval", str(model_dir), *given, "--out", str(tmp_path / "out")]) == 2
    sentence = said(capsys)
    assert re.search(WHAT + MORE, sentence), sentence
    assert "--batch-size" not in sentence
    assert not (tmp_path / "out").exists()


def test_a_machine_without_a_gpu(room: dict[str, Any], model_dir: Path) -> None:
    room["full"] = machine_full
    with pytest.raises(
        EvaluationError,
        match=r"give a smaller --batch-size \(it is 3\), or run on a machine with more memory$",
    ):
        hf.HfBackend(model_dir, batch_size=3).loglikelihood([("copy A:", "A")] * 3)


@pytest.mark.parametrize("where", ["to", "from_pretrained"])
def test_weights_that_do_not_fit(where: str, model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    owner = torch.nn.Module if where == "to" else transformers.AutoModelForCausalLM
    monkeypatch.setattr(owner, where, lambda *_, **__: full())
    with pytest.raises(EvaluationError, match=rf"too small to load .*{WHAT}{MORE}$"):
        hf.load_model(model_dir, device="cpu")


def test_other_failures_stay_what_they_are() -> None:
    with pytest.raises(RuntimeError, match="size mismatch"), memory_for("for it"):
        raise RuntimeError("size mismatch")
    with pytest.raises(EvaluationError, match="CUBLAS_STATUS_ALLOC_FAILED"), memory_for("for it"):
        raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")

"""A model that computes NaN has no answer: every way of asking it says so, nothing is written, and NaN in a result is not read."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from asft_eval import EvaluationError
from asft_eval.backends import OWN, Done, ignore
from asft_eval.backends.fake import FakeBackend
from asft_eval.backends.hf import HfBackend
from asft_eval.calibration import of_choices
from asft_eval.judge import Duel
from asft_eval.judge_model import ModelJudge
from asft_eval.protocols import protocols
from asft_eval.reading import read_texts
from asft_eval.result import read_samples
from asft_eval.run import evaluate
from asft_eval.types import Example, Suite
from safetensors.torch import load_file, save_file

from asft_nemo import cli

pytestmark = pytest.mark.usefixtures("keep_logging_and_warnings")
SAYS = r"gives no answers, its logits are not numbers \(NaN or infinite\): its weights are damaged or too large for their dtype, give another checkpoint"
LETTERS = Suite("letters", "1", "choice", (Example("1", "copy", "A"),), choices=(" A", " B"))


def broken(model_dir: Path, folder: Path, change: Callable[[Any], None]) -> Path:
    shutil.copytree(model_dir, folder)
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def lost(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every logit is NaN."""
    return broken(
        model_dir, tmp_path_factory.mktemp("lost") / "m", lambda x: x["model.norm.weight"].fill_(math.nan)
    )


@pytest.fixture(scope="module")
def holed(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> HfBackend:
    """Logits are NaN after a text with a Q, which few texts have."""
    from transformers import AutoTokenizer

    opener: Any = AutoTokenizer
    (letter,) = opener.from_pretrained(model_dir)("Q")["input_ids"]
    folder = tmp_path_factory.mktemp("holed") / "m"
    broken(model_dir, folder, lambda x: x["model.embed_tokens.weight"][letter].fill_(math.nan))
    return HfBackend(folder, batch_size=2)


@pytest.mark.parametrize(
    "asked",
    [["--suite", "medmcqa", "--limit", "2"], ["--suite", "{suite}"], ["--suite", "{suite}", "--protocol", "paper"],
     ["--drift", "{text}"], ["--drift", "{text}", "--base", "{base}"]],
    ids=["choices", "greedy", "drawn", "drift", "drift from a base"],
)  # fmt: skip
def test_the_command_says_it_and_writes_nothing(
    asked: list[str], lost: Path, model_dir: Path, data_dir: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
):  # fmt: skip
    monkeypatch.setenv("ASFT_DATA_DIR", str(data_dir))
    suite, text = tmp_path / "copy.jsonl", tmp_path / "text.jsonl"
    suite.write_text('{"prompt": "copy AB:", "answer": "AB"}\n')
    text.write_text('{"text": "copy AB: AB and more"}\n')
    words = [word.format(suite=suite, text=text, base=model_dir) for word in asked]
    assert cli.main(["eval", str(lost), *words, "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert str(lost) in said
    assert re.search(SAYS, said.splitlines()[-1]), said
    assert "Traceback" not in said
    assert not (tmp_path / "out").exists() or list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("protocol", ["greedy", "paper"])
def test_nan_that_only_some_texts_meet(protocol: str, holed: HfBackend, tmp_path: Path):
    """What was answered before is kept; the rest is no answer."""
    (how,) = protocols(protocol, max_tokens=3, seed=0)
    found: dict[int, str] = {}
    seeds = [1, 2, 3] if how.temperature > 0 else []
    with pytest.raises(EvaluationError, match=SAYS):
        holed.generate(
            ["copy ABCDEFGHIJKLMNOPRST:", "copy BCDEFGHIJKLMNOPRST:", "Q"],
            protocol=how,
            seeds=seeds,
            done=lambda place, answer: found.update({place: answer.text}),
        )
    assert set(found) == {0, 1}


def test_nan_in_the_log_probabilities_of_some_texts(holed: HfBackend):
    for choices in (["A", "B"], ["A", "story"]):  # one token each, and longer
        with pytest.raises(EvaluationError, match=SAYS):
            holed.choice_logprobs(["copy A:", "copy Q:"], choices)
    with pytest.raises(EvaluationError, match=SAYS):
        holed.loglikelihood([("copy Q:", "A")])


def test_nan_in_the_middle_of_held_out_text(holed: HfBackend, model_dir: Path, tmp_path: Path):
    ids = [holed.tokenizer(text)["input_ids"] for text in ("copy AB: AB and so on", "copy Q: more")]
    folder = Path(holed.model.name_or_path)
    with pytest.raises(EvaluationError, match=SAYS):
        read_texts(folder, model_dir, [(one, 1) for one in ids], pad_id=1, batch_size=1)
    with pytest.raises(EvaluationError, match=SAYS):
        read_texts(model_dir, folder, [(one, 1) for one in ids], pad_id=1, batch_size=1)


class NoNumbers(FakeBackend):
    """A backend that does not look."""

    def choice_logprobs(
        self, prompts: Sequence[str], choices: Sequence[str], *, done: Done[list[float]] = ignore
    ) -> list[list[float]]:
        """NaN."""
        del choices
        for place in range(len(prompts)):
            done(place, [math.nan, math.nan])
        return []


def test_no_backends_nan_becomes_a_letter(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(EvaluationError, match=SAYS):
        evaluate(model, [LETTERS], backend=NoNumbers(str), out_dir=tmp_path / "o", max_tokens=1)
    assert (tmp_path / "o" / "samples.jsonl").read_text() == ""
    with pytest.raises(EvaluationError, match="not a number"):
        of_choices([{"logprobs": [math.nan, math.nan], "correct": True}])


def test_a_judge_of_nan_decides_nothing(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from asft_eval import judge_model

    monkeypatch.setattr(judge_model, "open_backend", lambda *_: NoNumbers(str))
    monkeypatch.setattr(judge_model, "as_chat", lambda _, prompts: prompts)
    judge = ModelJudge(str(model), backend="hf", options=OWN)
    with pytest.raises(EvaluationError, match=SAYS):
        judge.decide([Duel("1", "Say hello.", "Hi.", "Hello!")], outputs=tmp_path / "outputs.json")


def test_nan_in_a_result_is_refused_and_asked_again(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    suite = replace(LETTERS, examples=(*LETTERS.examples, Example("2", "other", "B")))
    settings: dict[str, Any] = {"out_dir": tmp_path / "o", "max_tokens": 1}
    evaluate(model, [suite], backend=FakeBackend(lambda _: " A"), **settings)
    file = tmp_path / "o" / "samples.jsonl"
    whole = file.read_text()
    file.write_text(whole.replace("0.0, -Infinity", "NaN, NaN", 1))
    assert file.read_text() != whole
    words = ["compare", f"a={tmp_path / 'o'}", f"b={tmp_path / 'o'}", "--out", str(tmp_path / "c")]
    assert cli.main(words) == 2
    assert "line 1 of" in (said := capsys.readouterr().err)
    assert "is damaged (NaN is no number): evaluate with this directory as --out again" in said
    again = FakeBackend(lambda _: " A")
    evaluate(model, [suite], backend=again, **settings)
    assert again.asked == ["copy"]
    assert [row["logprobs"] for row in read_samples(tmp_path / "o")] == [[0.0, -math.inf]] * 2
    results = tmp_path / "o" / "results.json"
    written = json.loads(results.read_text())
    written["suites"]["letters"]["calibration"]["ece"] = math.nan
    results.write_text(json.dumps(written))
    assert cli.main(words) == 2
    assert "results.json is damaged (NaN is no number)" in capsys.readouterr().err

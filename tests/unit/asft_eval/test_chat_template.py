"""Chat templates and tokenizers that fail: one sentence of the command, and no judge without a template."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from asft_eval import EvaluationError
from asft_eval.backends import OWN
from asft_eval.judge import Duel
from asft_eval.judge_model import ModelJudge
from asft_eval.suites.prompts import as_chat

from asft_nemo import cli


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{% if %}", "TemplateSyntaxError: "),
        ("{{ raise_exception('a system turn, please') }}", "TemplateError: a system turn, please"),
        ("{{ messages[0]['content'] + 1 }}", "TypeError: "),
    ],
)
def test_a_chat_template_that_fails_is_one_sentence(
    template: str, says: str, model_dir: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str], keep_logging_and_warnings: None,
):  # fmt: skip
    folder = tmp_path / "model"
    shutil.copytree(model_dir, folder)
    (folder / "chat_template.jinja").write_text(template)
    suite = tmp_path / "copy.jsonl"
    suite.write_text('{"prompt": "copy AB:", "answer": "AB"}\n')
    words = ["eval", str(folder), "--suite", str(suite), "--prompt", "chat", "--out", str(tmp_path / "out")]
    assert cli.main(words) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert f"the chat template in {folder} does not take a user's question ({says}" in said
    assert said.endswith("correct it, or choose another prompt variant, e.g. alpaca")


def test_a_damaged_tokenizer_and_a_template_that_fails_make_no_base_model(model_dir: Path, tmp_path: Path):
    """A judge without a template is asked in plain words; one whose template fails is not."""
    folder = tmp_path / "model"
    shutil.copytree(model_dir, folder)
    (folder / "chat_template.jinja").write_text("{% if %}")
    judge = ModelJudge(str(folder), backend="hf", options=OWN)
    with pytest.raises(EvaluationError, match="does not take a user's question"):
        judge.decide([Duel("1", "Say hello.", "Hi.", "Hello!")], outputs=tmp_path / "outputs.json")
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(EvaluationError, match=r"cannot load the tokenizer in .*: copy the base model's"):
        as_chat(folder, ["a"])

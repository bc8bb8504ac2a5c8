"""What a model's context holds: prompts beyond it are refused, completions end with it, and a tokenizer without an end token is no tokenizer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from asft_eval import EvaluationError, Protocol
from asft_eval.backends.hf import HfBackend, context
from asft_eval.result import read_samples
from transformers.models.auto.configuration_auto import AutoConfig

from asft_nemo import cli

pytestmark = pytest.mark.usefixtures("keep_logging_and_warnings")
ROOM = 15


def changed(model_dir: Path, folder: Path, name: str, **keys: Any) -> Path:
    """The model with other values in one of its files; None takes a key away."""
    shutil.copytree(model_dir, folder)
    content = json.loads((folder / name).read_text()) | keys
    (folder / name).write_text(
        json.dumps({key: value for key, value in content.items() if value is not None})
    )
    return folder


@pytest.fixture(scope="module")
def short(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return changed(
        model_dir, tmp_path_factory.mktemp("short") / "m", "config.json", max_position_embeddings=ROOM
    )


def test_the_command_refuses_a_prompt_beyond_the_context(
    short: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    suite = tmp_path / "long.jsonl"
    rows = [{"prompt": prompt, "answer": "AB"} for prompt in ("copy AB:", "AB CD " * 2000)]
    suite.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert cli.main(["eval", str(short), "--suite", str(suite), "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert (
        f"tokens and the model's context {ROOM}, which leaves no room for an answer: leave the suite out"
        in said
    )
    assert read_samples(tmp_path / "out") == []


def test_completions_end_with_the_context_whatever_shares_their_batch(model_dir: Path, short: Path):
    """They are what the model with all its positions says, up to there."""
    roomy, tight = HfBackend(model_dir, batch_size=4), HfBackend(short, batch_size=4)
    prompts = [
        "story: the cat sees a hat.",
        "swap AB CD:",
        "copy KTABCDE:",
        "copy KTABCDEFG:",
        "copy KTAB:",
        "copy AB:",
    ]
    lengths = [len(roomy.tokenizer(prompt)["input_ids"]) for prompt in prompts]
    assert max(lengths) < ROOM, lengths
    whole = roomy.generate(prompts, protocol=Protocol(max_tokens=20))
    found = tight.generate(prompts, protocol=Protocol(max_tokens=20))
    cut = 0
    for length, all_, one in zip(lengths, whole, found, strict=True):
        if all_.num_tokens <= ROOM - length:
            assert one == all_
            continue
        cut += 1
        assert (one.num_tokens, one.finished) == (ROOM - length, False)
        assert all_.text.startswith(one.text)
    assert cut == 3
    few = Protocol(max_tokens=2)
    assert tight.generate(prompts, protocol=few) == roomy.generate(prompts, protocol=few)


def test_a_completion_that_the_context_ends_counts_as_cut(short: Path, tmp_path: Path):
    suite = tmp_path / "story.jsonl"
    suite.write_text('{"prompt": "story: the cat sees a hat.", "answer": "x"}\n')
    assert cli.main(["eval", str(short), "--suite", str(suite), "--out", str(tmp_path / "out")]) == 0
    figures = json.loads((tmp_path / "out" / "results.json").read_text())["suites"]["story"]
    assert figures["cut"] == 1
    assert figures["tokens"] < ROOM


def test_log_probabilities_beyond_the_context_are_refused(short: Path):
    backend = HfBackend(short, batch_size=2)
    long = "AB " * ROOM
    for asked in (
        lambda: backend.choice_logprobs(["copy A:", long], ["A", "B"]),
        lambda: backend.choice_logprobs(["copy A:"], ["A", long]),
        lambda: backend.loglikelihood([("copy A:", "A"), ("copy", long)]),
    ):
        with pytest.raises(EvaluationError, match="leaves no room for an answer"):
            asked()
    start = "A" * (ROOM - 1)
    assert len(backend.tokenizer(start)["input_ids"]) == ROOM - 1
    assert len(backend.choice_logprobs([start], ["A", "B"])[0]) == 2
    with pytest.raises(EvaluationError, match=f"a prompt has {ROOM} tokens and the model's context {ROOM}"):
        backend.choice_logprobs([start + "A"], ["A", "B"])


@pytest.mark.parametrize(
    ("scaling", "expected"),
    [(None, 2048), ({"rope_type": "linear", "factor": 2.0}, 4096), ({"type": "dynamic", "factor": 4.0}, 8192),
     ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}, 2048)],
)  # fmt: skip
def test_the_context_by_the_configuration(model_dir: Path, scaling: dict[str, Any] | None, expected: int):
    opener: Any = AutoConfig
    config = opener.from_pretrained(model_dir)
    config.rope_scaling = scaling
    assert context(config) == expected


def test_a_tokenizer_without_an_end_token(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    folder = changed(model_dir, tmp_path / "m", "tokenizer_config.json", eos_token=None, pad_token=None)
    (folder / "special_tokens_map.json").unlink()
    suite = tmp_path / "copy.jsonl"
    suite.write_text('{"prompt": "copy AB:", "answer": "AB"}\n')
    assert cli.main(["eval", str(folder), "--suite", str(suite), "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert "names no end token: write the base model's eos_token into its tokenizer_config.json" in said
    assert "Traceback" not in said

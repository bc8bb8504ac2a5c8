"""docs/authors_scripts.md: our side of every pair of commands is run as far as a moment allows, and agrees with theirs flag by flag."""

from __future__ import annotations

import itertools
import json
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from asft_eval.backends.fake import FakeBackend
from asft_eval.errors import EvaluationError
from asft_eval.protocols import protocols
from asft_eval.result import read_result
from asft_eval.suites import SUITES
from asft_eval.suites.load import find_file
from asft_eval.suites.published import spread
from levels import remember_levels

from asft_nemo import cli
from asft_nemo.config.load import compose
from asft_nemo.config.schema import RunConfig, walk

PAGE = Path(__file__).resolve().parents[2] / "docs" / "authors_scripts.md"
__all__ = ["remember_levels"]  # a fixture

_BLOCK = re.compile(r"^```(text|bash)\n(.*?)^```", flags=re.DOTALL | re.MULTILINE)

pytestmark = [
    pytest.mark.skipif(not PAGE.is_file(), reason="no docs here: not a clone"),
    pytest.mark.usefixtures("remember_levels", "keep_logging_and_warnings"),
]


@dataclass(frozen=True)
class Pair:
    """One command of theirs and the commands of ours below it."""

    theirs: dict[str, str]
    ours: list[list[str]]


def commands(block: str) -> list[list[str]]:
    return [shlex.split(line) for line in block.replace("\\\n", " ").splitlines() if line.strip()]


def blocks() -> list[tuple[str, list[list[str]]]]:
    return [(language, commands(text)) for language, text in _BLOCK.findall(PAGE.read_text())]


def pairs() -> list[Pair]:
    found: list[Pair] = []
    here = blocks()
    for (language, words), (after, ours) in itertools.pairwise(here):
        if language == "text":
            assert after == "bash", f"{words} has no equal below it"
            found.append(Pair(flags(words[0]), ours))
    return found


def flags(words: list[str]) -> dict[str, str]:
    """Flag -> value; a flag without one is `True`."""
    found: dict[str, str] = {}
    for place, word in enumerate(words):
        if word.startswith("--"):
            value = words[place + 1] if place + 1 < len(words) else "--"
            found[word] = "True" if value.startswith("--") else value
    return found


def tables() -> dict[str, str]:
    """Flag of theirs -> the cell beside it; of a flag of several scripts the first."""
    found: dict[str, str] = {}
    for line in reversed(PAGE.read_text().splitlines()):
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("| `--"):
            found.update((flag.strip("` "), cells[1]) for flag in cells[0].split(","))
    return found


TRAINING = [pair for pair in pairs() if pair.ours[0][1] == "train"]
EVALUATION = [pair for pair in pairs() if pair.ours[0][1] == "eval" and "--models" not in pair.theirs]
OURS = [words for language, block in blocks() if language == "bash" for words in block]


def test_there_are_pairs_of_every_kind() -> None:
    assert (len(TRAINING), len(EVALUATION)) == (7, 5)
    assert {words[1] for words in OURS} == {"data", "train", "launch", "export", "eval", "compare"}


def test_every_flag_in_a_command_of_theirs_is_in_a_table() -> None:
    known = tables()
    done_elsewhere = {"--base_model_path", "--lora_model_path", "--save_path", "--dtype"}
    for pair in pairs():
        missing = set(pair.theirs) - set(known) - done_elsewhere
        assert not missing, f"{missing}: no row says what they are here"


def test_every_setting_in_a_table_exists() -> None:
    settings = {key for key, _ in walk(compose(["recipe=tiny_cpu", "objective=sft"], check_inputs=False))}
    for flag, cell in tables().items():
        for key in re.findall(r"`([a-z_]+(?:\.[a-z_*]+)?)`", cell):
            section = key.removesuffix("*")
            assert key in settings or any(one.startswith(section) for one in settings), f"{flag}: no {key}"


@pytest.mark.parametrize("pair", TRAINING, ids=lambda pair: " ".join(pair.ours[0])[:80])
def test_training_has_the_values_of_theirs(pair: Pair) -> None:
    run = compose(pair.ours[0][2:], check_inputs=False)
    table, values = tables(), dict(walk(run))
    for flag, value in pair.theirs.items():
        key = table[flag].strip("`")
        if flag in SPECIAL:
            SPECIAL[flag](run, value, pair.theirs)
        elif not (flag == "--num_train_epochs" and run.trainer.max_steps):
            assert same(values[key], value), f"{flag} {value} is {key}={values[key]} here"


def same(ours: Any, theirs: str) -> bool:
    return float(theirs) == ours if isinstance(ours, int | float) else theirs == ours


def _names(run: RunConfig, value: str, _: dict[str, str]) -> None:
    assert [Path(x).name for x in run.data.train] == [Path(x).name for x in value.split(",")]


def _mode(run: RunConfig, value: str, _: dict[str, str]) -> None:
    assert run.objective.name == value.replace("+", "_")


def _domains(run: RunConfig, _: str, theirs: dict[str, str]) -> None:
    assert run.data.weights == tuple(float(x) for x in theirs["--domain_weights"].split(","))
    assert len(run.data.weights) == len(run.data.train)


def _lora(run: RunConfig, value: str, _: dict[str, str]) -> None:
    assert value == "True"
    assert (run.peft.name, run.reference.form) == ("lora", "adapter_disabled")


def _product(run: RunConfig, _: str, theirs: dict[str, str]) -> None:
    steps = int(theirs["--batch_size"]) * int(theirs["--gradient_accumulation_steps"])
    assert run.trainer.global_batch_size == steps


SPECIAL = {
    "--mode": _mode,
    "--method": _mode,
    "--data_path": _names,
    "--data": _names,
    "--multi_domain": _domains,
    "--domain_weights": _domains,
    "--use_lora": _lora,
    "--batch_size": _product,
    "--gradient_accumulation_steps": _product,
}
SUITES_OF_THEIRS = {"math_oai": "math500", "minerva_math": "minerva", "mmlu": "mmlu_medical"}
PROMPTS_OF_THEIRS = {"alpaca": "alpaca_newline", "cot": "question_answer"}


@pytest.mark.parametrize("pair", EVALUATION, ids=lambda pair: " ".join(pair.ours[0])[:80])
def test_evaluation_asks_what_theirs_asks(pair: Pair) -> None:
    words = cli.parser().parse_args(pair.ours[0][1:])
    theirs = pair.theirs
    named = theirs.get("--data_names") or theirs.get("--dataset") or theirs["--bench"]
    suites = words.suite.split(",")
    assert suites == [SUITES_OF_THEIRS.get(name, name) for name in named.split(",")]
    assert set(spread(suites)) <= set(SUITES)
    assert words.what == [theirs.get("--model_name_or_path") or theirs["--model"]]
    assert words.prompt == PROMPTS_OF_THEIRS.get(theirs.get("--prompt_type", ""))
    assert words.limit == (int(theirs["--max_samples"]) if "--max_samples" in theirs else None)
    (how,) = protocols(words.protocol, max_tokens=words.max_tokens, seed=words.seed)
    drawn = [how.n, how.temperature, how.top_p, how.max_tokens]
    assert drawn == [
        float(theirs.get(x, y)) for x, y in (("--n_sampling", 1), ("--temperature", 0), ("--top_p", 1))
    ] + [4096]


def test_evaluations_and_the_comparison_run(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the order of the page, with two questions of each suite whose file is here, and a model that never says a word: what needs no process of its own to judge."""
    monkeypatch.setenv("ASFT_DATA_DIR", str(data_dir))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("asft_eval.backends.open_backend", lambda *_, **__: FakeBackend(lambda _: ""))
    done: list[str] = []
    for words in OURS:
        arguments = cli.parser().parse_args(words[1:])
        if words[1:3] == ["eval", "judge"]:
            assert read_result(Path(arguments.what[1])).for_judge  # judges have tests of their own
            continue
        if words[1] == "eval":
            stand_in(Path(arguments.what[0]))
            suites = [name for name in spread(arguments.suite.split(",")) if ready(name)]
            at = words.index("--suite") + 1
            words = [*words[:at], ",".join(suites), *words[at + 1 :], "--limit", "2"]
        if words[1] in ("eval", "compare"):
            assert cli.main(words[1:]) == 0, capsys.readouterr().err
            done.append(str(arguments.out))
    assert len(done) == 10
    assert json.loads((tmp_path / "outputs/asft/results.json").read_text())["protocol"] == "paper"
    assert {"sft", "dft", "asft"} <= set(
        json.loads((tmp_path / done[-1] / "comparison.json").read_text())["results"]
    )


def stand_in(model: Path) -> None:
    """A directory that passes for a model as long as nobody loads it."""
    model.mkdir(parents=True, exist_ok=True)
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        (model / name).write_text("{}")


def ready(suite: str) -> bool:
    """Its file is here, and it runs no programs: the sandbox has tests of its own."""
    try:
        find_file(suite)
    except EvaluationError:
        return False
    return SUITES[suite].group != "code"


def test_the_sets_to_download_are_known_and_exports_parse(capsys: pytest.CaptureFixture[str]) -> None:
    for words in OURS:
        if words[1] == "data":
            names = words[3 : words.index("--out")]
            assert cli.main(["data", "download", *names, "--list", "--json"]) == 0
            assert set(json.loads(capsys.readouterr().out)) == set(names)
        if words[1] == "export":
            assert cli.parser().parse_args(words[1:]).adapters == "merge"


@pytest.mark.parametrize("words", [x for x in OURS if x[1] == "launch"], ids=lambda words: words[2])
def test_launches_compose(words: list[str]) -> None:
    run = compose(words[2:], check_inputs=False, launched=True)
    assert run.eval.suites == ("medical",)
    assert (run.trainer.epochs, run.trainer.global_batch_size, run.data.sequence_length) == (3, 64, 512)
    assert (run.optim.lr, run.optim.warmup_ratio, run.run.seed) == (2e-5, 0.03, 42)

"""The command: exit codes, one sentence an error, and each command on real files."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from asft_nemo import cli
from asft_nemo.commands import output
from asft_nemo.config.paths import project_dir

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

TINY = project_dir() / "assets" / "tiny-base"
ROWS = [{"question": f"copy A{i}:", "answer": f"A{i}"} for i in range(9)]


@pytest.fixture(autouse=True)
def keep_logging_and_warnings() -> Iterator[None]:
    """The command sets up logging and warning filters for its whole process; here it is only a guest."""
    import warnings

    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    with warnings.catch_warnings():
        yield
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


@pytest.fixture
def bad_rows(tmp_path: Path) -> Path:
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps(ROWS[0]) + '\noops\n{"question": "x", "answer": ""}\n')
    return path


# --- the frame -----------------------------------------------------------------------------------------------


def test_help_imports_nothing_heavy_and_is_quick() -> None:
    code = (
        "import sys, asft_nemo.cli\n"
        "asft_nemo.cli.parser().format_help()\n"
        "print([name for name in ('torch', 'hydra', 'nemo', 'numpy', 'transformers') if name in sys.modules])"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        == "[]\n"
    )
    # Processor time, not the clock: other work on the machine must not decide.
    before = os.times()
    help_text = subprocess.run(
        [sys.executable, "-m", "asft_nemo", "--help"], capture_output=True, text=True, timeout=60, check=True
    ).stdout
    assert "usage: asft" in help_text
    after = os.times()
    assert after.children_user + after.children_system - before.children_user - before.children_system < 0.5


def test_every_command_of_the_design_answers_help() -> None:
    commands = "demo train launch plan data cache-reference import export verify eval compare".split()  # noqa: SIM905
    text = cli.parser().format_help()
    for command in commands:
        assert f"\n    {command}" in text
        with pytest.raises(SystemExit) as stopped:
            cli.parser().parse_args([command, "--help"])
        assert stopped.value.code == 0


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "asft: the following arguments are required: COMMAND"),
        (["trian"], "invalid choice: 'trian'"),
        (["train", "--nope"], "unrecognized arguments: --nope"),
        (["train"], "asft: no recipe is given: set recipe="),
        (["train", "recipe=tiny_cpu"], "asft: objective.name is not set"),
        (
            ["train", "recipe=tiny_cpu", "objective=asft", "reference=none"],
            "kl_weight=0.05 needs a reference",
        ),
        (["launch", "experiment=x", "--dry-run"], "asft: asft launch is not available yet: use asft train"),
        (["plan", "--search"], "asft: no recipe is given: set recipe="),
        (["plan", "recipe=qwen25_72b", "objective=sft", "--gpu", "h100"], "unknown GPU 'h100': set --gpu to one of h100-80gb"),
        (["cache-reference"], "asft: no recipe is given: set recipe="),
        (["data", "prepare", "x"], "the following arguments are required: --out"),
        (["data", "check", "data.template=raw"], "asft data check got no file"),
        (["data", "check", "nowhere.jsonl"], "data file nowhere.jsonl does not exist"),
        (["data", "check", "nowhere.jsonl", "data.templte=raw"], "did you mean data.template?"),
        (["import", "nowhere", "out"], "nowhere is not a directory"),
        (["export", "nowhere", "out"], "nowhere"),
        (["verify", "nowhere", "out"], "is not a directory"),
        (
            ["eval", "nowhere", "--suite", "nowhere.jsonl", "--out", "x"],
            "there is no suite file nowhere.jsonl",
        ),
        (["compare", "a", "--out", "x"], "cannot use 'a': write NAME=RESULT_DIR"),
        (["compare", "a=nowhere", "--out", "x"], "nowhere"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_end_with_two_and_no_traceback(
    words: list[str],
    sentence: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(words) == 2
    captured = capsys.readouterr()
    assert sentence in captured.err
    assert "Traceback" not in captured.err
    assert captured.out == ""
    assert list(tmp_path.iterdir()) == [], "a mistake leaves nothing behind"


def test_all_violations_are_printed_a_line_each(capsys: pytest.CaptureFixture[str]) -> None:
    overrides = ["objective=asft", "reference=none", "parallel.tp_size=3", "data.train=[nowhere.jsonl]"]
    assert cli.main(["train", "recipe=tiny_cpu", *overrides]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 5
    assert all(line.startswith("asft: ") for line in lines)


def test_debug_shows_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "--debug", "recipe=nowhere"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_our_bug_ends_with_one_and_a_traceback(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise KeyError("surprise")

    monkeypatch.setattr("asft_nemo.config.load.compose", broken)
    assert cli.main(["train", "recipe=tiny_cpu"]) == 1
    captured = capsys.readouterr()
    assert "KeyError: 'surprise'" in captured.err
    assert "this is a bug in asft" in captured.err


def test_interruption_is_no_bug(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("asft_nemo.config.load.compose", interrupted)
    assert cli.main(["train"]) == 130
    assert capsys.readouterr().err == "asft: interrupted\n"


# --- train ---------------------------------------------------------------------------------------------------


def test_train_hands_the_composed_run_to_the_launcher(
    rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Real training through this command is tested where ranks are started.
    runs = []
    monkeypatch.setattr("asft_nemo.launch_local.launch", runs.append)
    words = [
        "recipe=tiny_cpu",
        "objective=asft",
        f"data.train=[{rows}]",
        "data=gsm8k",
        f"run.dir={tmp_path / 'run'}",
    ]
    assert cli.main(["train", "--json", *words, "parallel.tp_size=2"]) == 0
    [run] = runs
    assert (run.objective.name, run.run.world_size, run.data.fields.prompt) == ("asft", 2, "question")
    answer = json.loads(capsys.readouterr().out)
    assert answer["run_dir"] == str(tmp_path / "run")


def test_train_refuses_bad_rows_before_any_rank_starts(
    bad_rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    words = [
        "recipe=tiny_cpu",
        "objective=sft",
        "data=gsm8k",
        f"data.train=[{bad_rows}]",
        f"run.dir={folder}",
    ]
    assert cli.main(["train", *words]) == 2
    said = capsys.readouterr().err
    assert f"{bad_rows}:2: not JSON" in said
    assert f"{bad_rows}:3: field 'answer' is empty" in said
    assert "2 bad rows" in said
    assert "Traceback" not in said
    assert not folder.exists()


# --- data ----------------------------------------------------------------------------------------------------


def test_data_check_counts_and_measures(rows: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["data", "check", str(rows), "data=gsm8k"]) == 0
    out = capsys.readouterr().out
    assert "9 rows, 9 usable, 0 bad" in out
    assert "median" in out


def test_data_check_prints_every_bad_row_and_ends_with_two(
    rows: Path, bad_rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(rows), str(bad_rows), "data.fields.prompt=question", "data.fields.response=answer"]
    assert cli.main(["data", "check", *words]) == 2
    captured = capsys.readouterr()
    assert "12 rows, 10 usable, 2 bad" in captured.out
    assert captured.err.splitlines() == [
        f"{bad_rows}:2: not JSON: Expecting value at column 1",
        f"{bad_rows}:3: field 'answer' is empty",
    ]


def test_data_check_as_json(bad_rows: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["data", "check", "--json", str(bad_rows), "data=gsm8k", "data.sequence_length=9"]) == 2
    captured = capsys.readouterr()
    answer = json.loads(captured.out)
    assert (answer["rows"], answer["usable"], answer["bad"], answer["too_long"]) == (3, 1, 2, 1)
    assert answer["bad_rows"][0] == {
        "file": str(bad_rows),
        "line": 2,
        "reason": "not JSON: Expecting value at column 1",
    }
    assert answer["sequence_length"] == 9
    assert set(answer["lengths"]) == {"shortest", "median", "95th percentile", "longest"}
    assert sum(found["rows"] for found in answer["histogram"]) == 1
    assert answer["duplicates"]["exact"] == 0
    assert answer["learned_share"] is None
    assert answer["entries"][bad_rows.stem]["bad"] == 2
    assert captured.err == ""


def test_data_check_sums_up_bad_rows_and_shows_examples(
    rows: Path, bad_rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "--show",
        "1",
        str(rows),
        str(bad_rows),
        "data.fields.prompt=question",
        "data.fields.response=answer",
    ]
    assert cli.main(["data", "check", *words, "--color=never"]) == 2
    out = capsys.readouterr().out
    assert f"  1 x not JSON: Expecting value at column ... (first: {bad_rows}:2)" in out
    assert "% learned" in out
    assert out.count("[[") == 2 + 1  # one example of each entry, and the legend
    assert f"\n{rows}:1: " in out
    assert "\033" not in out
    assert cli.main(["data", "check", *words[2:], "--show=-1"]) == 2
    assert "--show=-1 is negative" in capsys.readouterr().err


def test_data_check_holds_the_tokenizer_against_the_model(
    rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "model"
    shutil.copytree(TINY, model, ignore=shutil.ignore_patterns("*.safetensors"))
    shape = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**shape, "vocab_size": 100}))
    assert cli.main(["data", "check", str(rows), f"model.path={model}"]) == 2
    assert "tokens but the model only 100 rows: use the model's own tokenizer" in capsys.readouterr().err


def test_data_check_finds_the_form_of_the_rows_itself(rows: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["data", "check", str(rows)]) == 0
    assert "9 rows, 9 usable, 0 bad" in capsys.readouterr().out


def test_data_check_of_wholly_bad_files(rows: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["data", "check", str(rows), "data=alpaca"]) == 2
    captured = capsys.readouterr()
    assert "9 rows, 0 usable, 9 bad" in captured.out
    assert "no field 'instruction', its fields are answer, question: set data.fields.prompt" in captured.err


# --- checkpoints and evaluation --------------------------------------------------------------------------------


def test_import_verify_export_and_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint, exported = tmp_path / "checkpoint", tmp_path / "exported"
    assert cli.main(["import", "--json", str(TINY), str(checkpoint)]) == 0
    imported = json.loads(capsys.readouterr().out)
    assert imported["family"] == "qwen2"
    report = ["--out", str(tmp_path / "report")]
    assert cli.main(["verify", str(checkpoint), str(TINY), "--weights-only", *report]) == 0
    assert capsys.readouterr().out.startswith("weights identical: ")
    assert cli.main(["export", "--json", str(checkpoint), str(exported), "--max-shard-size", "3MB"]) == 0
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


def test_verify_of_another_model_ends_with_two(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
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
    assert cli.main(["verify", str(checkpoint), str(other), "--out", str(tmp_path / "report")]) == 2
    out = capsys.readouterr().out
    assert "weights DIFFERENT" in out
    assert f"{name}: 1 of 256 numbers differ" in out
    assert "logits DISAGREE" in out
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert report["passed"] is report["logits"]["equal"] is False


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


def test_eval_and_compare(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    suite = tmp_path / "copy.jsonl"
    suite.write_text(
        "".join(json.dumps({"prompt": f"copy {x}:", "answer": x}) + "\n" for x in ("ABC", "QXZ", "DEF"))
    )
    for name, tokens in (("one", 6), ("two", 6), ("short", 1)):
        words = [
            "--suite",
            str(suite),
            "--out",
            str(tmp_path / name),
            "--max-tokens",
            str(tokens),
            "--limit",
            "2",
        ]
        assert cli.main(["eval", "--json", str(TINY), *words]) == 0
        answer = json.loads(capsys.readouterr().out)
        assert answer["suites"]["copy"]["n"] == 2
        assert answer == json.loads((tmp_path / name / "results.json").read_text())
    out = tmp_path / "comparison"
    pair = [f"first={tmp_path / 'one'}", f"second={tmp_path / 'two'}"]
    assert cli.main(["compare", *pair, "--out", str(out)]) == 0
    assert "| first |" in capsys.readouterr().out
    written = json.loads((out / "comparison.json").read_text())
    assert [row["gained"] + row["lost"] for row in written["changes"]] == [0, 0]
    assert "| second |" in (out / "comparison.md").read_text()
    unlike = [pair[0], f"short={tmp_path / 'short'}"]
    assert cli.main(["compare", *unlike, "--out", str(out)]) == 2
    assert "different protocols" in capsys.readouterr().err
    assert cli.main(["compare", "--force", *unlike, "--out", str(out)]) == 0
    assert "warning: " in capsys.readouterr().out


# --- progress ------------------------------------------------------------------------------------------------


def test_progress_is_plain_lines_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    show = output.lines_of("import", seconds=0.01)
    show(1, 4, "a.weight")
    time.sleep(0.02)
    show(2, 4, "b.weight")
    show(3, 4, "c.weight")
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("import: 50 % (b.weight), about ")


def test_progress_is_a_bar_on_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with output.progress_of("export") as show:
        show(512, 1024, "a.weight")
        show(1024, 1024, "b.weight")
    text = capsys.readouterr().err
    assert "export: 100%" in text
    assert "1.00k/1.00k" in text

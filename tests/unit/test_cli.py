"""The command: exit codes, one sentence an error, and each command on real files."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from asft_nemo import cli
from asft_nemo.commands import output
from asft_nemo.config.paths import project_dir

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

pytestmark = pytest.mark.usefixtures("keep_logging_and_warnings")
TINY = project_dir() / "assets" / "tiny-base"


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
    # Beside an interpreter that does nothing, for machines differ: it takes four times as long, ten with one of the heavy imports.
    assert min(seconds_of("-m", "asft_nemo", "--help") for _ in range(3)) < 10 * min(
        seconds_of("-c", "print('usage: asft')") for _ in range(3)
    )


def seconds_of(*words: str) -> float:
    """Processor time, not the clock: other work on the machine must not decide."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    said = subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, timeout=240, check=True
    ).stdout
    assert "usage: asft" in said
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def printed_into(stdout: int, *, lines: int, code: int) -> tuple[int, str]:
    """Exit code and stderr of a command that prints so many lines, which are buffered as usual, and returns `code`."""
    program = (
        "import argparse, sys\n"
        "from asft_nemo import cli\n"
        "def command(_):\n"
        f"    for _ in range({lines}): print('x' * 50)\n"
        f"    return {code}\n"
        "parser = argparse.ArgumentParser()\n"
        "parser.set_defaults(command=command)\n"
        "cli.parser = lambda: parser\n"
        "sys.exit(cli.main([]))\n"
    )
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run(
        [sys.executable, "-c", program], stdout=stdout, stderr=subprocess.PIPE, text=True, env=buffered
    )
    return done.returncode, done.stderr


@pytest.mark.parametrize(("lines", "code"), [(1, 0), (1, 2), (20000, 0)])
def test_a_reader_that_went_away_changes_nothing(lines: int, code: int) -> None:
    """`asft ... | true`, where Python itself would end with 120."""
    reader, writer = os.pipe()
    os.close(reader)
    assert printed_into(writer, lines=lines, code=code) == (code, "")
    os.close(writer)


@pytest.mark.parametrize("lines", [1, 20000])
def test_a_full_disk_under_stdout_is_one_sentence(lines: int) -> None:
    full = os.open("/dev/full", os.O_WRONLY)
    code, said = printed_into(full, lines=lines, code=0)
    os.close(full)
    assert (code, said.count("\n")) == (2, 1), said
    assert "No space left on device" in said


def test_every_command_of_the_design_answers_help() -> None:
    commands = "demo train launch status logs cancel plan data cache-reference import export verify eval compare".split()  # noqa: SIM905
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
        (["launch", "experiment=x", "--dry-run"], "asft: unknown experiment 'x'"),
        (
            ["launch", "recipe=tiny_cpu", "objective=sft", "cluster=slrum", "--dry-run"],
            "unknown cluster 'slrum': did you mean 'slurm'?",
        ),
        (["train", "recipe=tiny_cpu", "objective=sft", "cluster=slurm"], "data.train is empty"),
        (
            ["status", "nowhere"],
            "nowhere holds no launch.json: give the run.dir of a run that `asft launch` started",
        ),
        (["logs", "nowhere"], "nowhere holds no launch.json"),
        (["cancel", "nowhere"], "nowhere holds no launch.json"),
        (["plan", "--search"], "asft: no recipe is given: set recipe="),
        (
            ["plan", "recipe=qwen25_72b", "objective=sft", "--gpu", "h100"],
            "unknown GPU 'h100': set --gpu to one of h100-80gb",
        ),
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


def test_progress_is_plain_lines_without_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr(output, "time", SimpleNamespace(monotonic=lambda: now))
    show = output.lines_of("import", seconds=10)
    now += 9
    show(1, 4, "a.weight")
    now += 1
    show(2, 4, "b.weight")
    now += 9
    show(3, 4, "c.weight")
    [line] = capsys.readouterr().err.splitlines()
    assert line == "import: 50 % (b.weight), about 10 s left"


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

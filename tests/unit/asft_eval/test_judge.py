"""AlpacaEval: the standard outputs file, no score without a judge, and judges of three kinds: a model here, a server's, the package."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from asft_eval import EvaluationError
from asft_eval.backends import OWN, Options
from asft_eval.backends.fake import FakeBackend
from asft_eval.compare import compare
from asft_eval.explain import explain
from asft_eval.judge import judge_result, outputs_file
from asft_eval.judge_model import ModelJudge
from asft_eval.judge_package import PackageJudge
from asft_eval.result import read_result, read_samples
from asft_eval.run import evaluate

from asft_nemo import cli

N = 12
pytestmark = pytest.mark.usefixtures("keep_logging_and_warnings")


@pytest.fixture(autouse=True)
def here(data_dir: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The published instructions, and no key or server of the machine's own."""
    monkeypatch.setenv("ASFT_DATA_DIR", str(data_dir))
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    monkeypatch.chdir(model.parent)
    return model.parent


def answered(
    here: Path, name: str, says: Callable[[str], str] = lambda _: " Sure {first}. ", **more: Any
) -> Path:
    """The folder of a model's answers to the first instructions."""
    more = {"suites": ["alpaca_eval"], "protocol": "greedy", "limit": N, **more}
    evaluate(here / "model", backend=FakeBackend(says), out_dir=here / name, max_tokens=999, **more)
    return here / name


def test_without_a_judge_there_are_outputs_and_no_score(here: Path, data_dir: Path) -> None:
    folder = answered(here, "out")
    result = read_result(folder)
    assert result.suites == {}
    assert result.for_judge["alpaca_eval"]["n"] == N
    assert "accuracy" not in json.dumps(result.to_json())
    published = json.loads((data_dir / "instruct" / "alpaca_eval.json").read_text())[:N]
    outputs = json.loads(outputs_file(folder, "alpaca_eval").read_text())
    assert outputs == [
        {
            "dataset": row["dataset"],
            "instruction": row["instruction"],
            "output": "Sure {first}.",
            "generator": str(here / "model"),
        }
        for row in published
    ]
    assert "not judged" in explain(folder, read_samples(folder)[0]["id"])


def test_one_answer_is_asked_for_whatever_the_protocol(here: Path) -> None:
    folder = answered(here, "out", protocol="both")
    assert list(read_result(folder).for_judge) == ["alpaca_eval", "alpaca_eval@paper"]
    assert len(read_samples(folder)) == 2 * N


def test_the_command_says_that_there_is_no_score(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("asft_eval.backends.open_backend", lambda *_, **__: FakeBackend(lambda _: "Sure."))
    words = ["eval", "model", "--suite", "alpaca_eval", "--limit", "3", "--out", "out"]
    assert cli.main(words) == 0
    said = capsys.readouterr().out
    assert (
        "alpaca_eval: no score, for no judge was named; 3 answers lie in out/alpaca_eval_outputs.json" in said
    )
    assert "%" not in said


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["eval", "model", "--suite", "aime24", "--out", "o", "--judge", "x"], "--judge says nothing to aime24"),
        (["eval", "model", "--suite", "instruct", "--out", "o", "--judge", "gpt"], "set OPENAI_API_KEY"),
        (["eval", "model", "--suite", "instruct", "--out", "o", "--judge", "alpaca_eval"], "pip install alpaca_eval"),
        (["eval", "judge", "nowhere", "--judge", "model"], "nowhere holds no results.json"),
        (["eval", "judge", "nowhere"], "judge RESULT_DIR --judge MODEL"),
    ],
)  # fmt: skip
def test_what_the_user_can_mend_is_said_before_the_model_is_asked(
    words: list[str],
    says: str,
    here: Path,
    model_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("PATH", "")
    assert cli.main([str(model_dir) if word == "model" else word for word in words]) == 2
    assert says in capsys.readouterr().err


def test_a_model_here_judges_and_is_not_asked_twice(
    here: Path, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = answered(here, "out", limit=3)
    judge = ModelJudge(str(model_dir), backend="hf", options=OWN)
    figures = judge_result(folder, judge).suites["alpaca_eval"]
    assert (figures.n, figures.grader) == (3, f"judge {model_dir}")
    assert figures.accuracy == figures.right / 3 == sum(row["correct"] for row in read_samples(folder)) / 3
    told = json.loads((folder / "judge.json").read_text())["alpaca_eval"]
    assert (told["unreadable"], told["length_controlled_win_rate"]) == (0, None)
    assert "alpaca_eval package" in told["remark"]
    monkeypatch.setattr(judge, "_engine", None)  # asking again would fail
    assert judge_result(folder, judge).suites["alpaca_eval"] == figures


def test_verdicts_stay_while_the_answers_do(here: Path, model_dir: Path) -> None:
    folder = answered(here, "out", limit=3)
    figures = judge_result(folder, ModelJudge(str(model_dir), backend="hf", options=OWN)).suites
    samples = read_samples(folder)
    assert read_result(answered(here, "out", limit=3)).suites == figures
    assert read_samples(folder) == samples
    assert read_result(answered(here, "out", limit=2)).suites == {}, "other examples await the judge"


def test_a_reference_that_changed_is_the_one_that_answers_are_judged_against(
    here: Path, data_dir: Path, referee: Referee, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    referee.says = lambda prompt: seen.append(prompt) or "1"
    folder = answered(here, "out", limit=3)
    first = judge_result(folder, of_server(referee)).suites["alpaca_eval"]
    (here / "data" / "instruct").mkdir(parents=True)
    published = json.loads((data_dir / "instruct" / "alpaca_eval.json").read_text())
    for row in published:
        row["output"] = "A reference of today."
    (here / "data" / "instruct" / "alpaca_eval.json").write_text(json.dumps(published))
    monkeypatch.setenv("ASFT_DATA_DIR", str(here / "data"))
    assert read_result(answered(here, "out", limit=3)).suites == {}
    assert not (folder / "judge.json").exists(), "it was of verdicts on another reference"
    assert {row["answer"] for row in read_samples(folder)} == {"A reference of today."}
    second = judge_result(folder, of_server(referee)).suites["alpaca_eval"]
    assert second.sha256 != first.sha256
    assert ["A reference of today." in prompt for prompt in seen] == [False] * 3 + [True] * 3


class Referee(ThreadingHTTPServer):
    """A server of one chat model, whose answer to a prompt is a function's."""

    daemon_threads = True
    says: Callable[[str], str]
    asked: int


class _Handler(BaseHTTPRequestHandler):
    server: Referee

    def do_GET(self) -> None:
        self._send({"data": [{"id": "referee"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked += 1
        text = self.server.says(body["messages"][0]["content"])
        self._send({"choices": [{"message": {"content": text}, "finish_reason": "stop"}]})

    def _send(self, content: dict[str, Any]) -> None:
        raw = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing."""


@pytest.fixture
def referee() -> Iterator[Referee]:
    server = Referee(("127.0.0.1", 0), _Handler)
    server.asked = 0
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def of_server(referee: Referee) -> ModelJudge:
    url = f"http://127.0.0.1:{referee.server_address[1]}/v1"
    return ModelJudge("referee", backend="openai", options=Options(base_url=url, api="chat"))


def likes_sure(prompt: str) -> str:
    """Best is "Sure {first}.", worst is "No."."""
    first, _, second = prompt.partition("[Answer 2]")
    return "1" if "Sure {first}." in first or "\nNo.\n" in second else "Answer 2."


@pytest.mark.parametrize(
    ("says", "won", "unreadable"),
    [(likes_sure, N, 0), (lambda _: "Both 1 and 2 are fine.", 0, N), (lambda _: "", 0, N)],
)
def test_a_judge_behind_a_server(
    here: Path, referee: Referee, says: Callable[[str], str], won: int, unreadable: int
) -> None:
    referee.says = says
    result = judge_result(answered(here, "out"), of_server(referee))
    assert result.suites["alpaca_eval"].right == won
    assert json.loads((here / "out" / "judge.json").read_text())["alpaca_eval"]["unreadable"] == unreadable
    assert referee.asked == N


def test_a_judge_that_likes_the_first_answer_favours_nobody(here: Path, referee: Referee) -> None:
    referee.says = lambda _: "1"
    result = judge_result(answered(here, "out", limit=100), of_server(referee))
    assert 35 <= result.suites["alpaca_eval"].right <= 65


def test_answers_stand_in_the_prompt_as_they_are(here: Path, referee: Referee) -> None:
    seen: list[str] = []
    referee.says = lambda prompt: seen.append(prompt) or "1"
    judge_result(answered(here, "out"), of_server(referee))
    assert all(prompt.count("Sure {first}.") == 1 for prompt in seen)


def test_judged_alike_is_compared_and_judged_otherwise_is_refused(
    here: Path, referee: Referee, model_dir: Path
) -> None:
    referee.says = likes_sure
    one, other = answered(here, "one", limit=3), answered(here, "other", lambda _: "No.", limit=3)
    for folder in (one, other):
        judge_result(folder, of_server(referee))
    compare({"one": one, "other": other})
    assert [read_result(folder).suites["alpaca_eval"].right for folder in (one, other)] == [3, 0]
    judge_result(other, ModelJudge(str(model_dir), backend="hf", options=OWN))
    with pytest.raises(EvaluationError, match="alpaca_eval"):
        compare({"one": one, "other": other})


def test_suites_without_a_judge_do_not_hinder_the_others(here: Path) -> None:
    (here / "own.jsonl").write_text('{"prompt": "a", "answer": "b"}\n')
    folders = [answered(here, x, lambda _: "b", suites=["own.jsonl", "alpaca_eval"]) for x in ("one", "two")]
    compare({"one": folders[0], "two": folders[1]})


PACKAGE = """#!{python}
import json, os, pathlib, sys
words = dict(zip(sys.argv[1::2], sys.argv[2::2]))
if words.get("--annotators_config") == "broken":
    sys.exit("no key: " + repr(os.environ["OPENAI_API_KEY"]))
folder = pathlib.Path(words["--output_path"], "annotator")
folder.mkdir(parents=True)
rows = json.load(open(words["--model_outputs"]))
values = [1.9, 1.2, None] * 4
found = [dict(instruction=row["instruction"], preference=value) for row, value in zip(rows, values)]
json.dump(found, open(folder / "annotations.json", "w"))
(folder / "leaderboard.csv").write_text(",win_rate,mode,length_controlled_winrate\\n" + words["--name"] + ",55.0,community,51.5\\n")
"""


def test_the_package_is_called(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import sys

    command = here / "bin" / "alpaca_eval"
    command.parent.mkdir()
    command.write_text(PACKAGE.replace("{python}", sys.executable))
    command.chmod(0o755)
    monkeypatch.setenv("PATH", str(command.parent))
    folder = answered(here, "out")
    assert cli.main(["eval", "judge", str(folder), "--judge", "alpaca_eval"]) == 0
    said = capsys.readouterr().out
    assert "55.0 % of 12" in said
    assert "length-controlled 51.5 %" in said
    assert "4 verdicts could not be read" in said
    assert read_result(folder).suites["alpaca_eval"].right == 4
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret\n0815")
    with pytest.raises(EvaluationError, match=r"exit code 1 \(no key: '\*\*\*'\).*OPENAI_API_KEY"):
        judge_result(folder, PackageJudge("broken"))


def test_outputs_of_other_answers_are_refused(here: Path, model_dir: Path) -> None:
    folder = answered(here, "out")
    file = outputs_file(folder, "alpaca_eval")
    file.write_text(file.read_text().replace("Sure", "Yes"))
    with pytest.raises(EvaluationError, match="does not belong to the samples"):
        judge_result(folder, ModelJudge(str(model_dir), backend="hf", options=OWN))

"""What a user may give asft eval and asft compare by mistake: one sentence with its cure, exit code 2, nothing written, nothing lost."""

from __future__ import annotations

import errno
import functools
import gzip
import json
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from asft_eval.backends.fake import FakeBackend
from asft_eval.calibration import calibration
from asft_eval.explain import explain
from asft_eval.graders import code, math_pool
from asft_eval.result import read_result, read_samples, write_result
from asft_eval.run import evaluate
from asft_eval.suites import suite_from_pairs
from asft_eval.types import Example, Suite

from asft_nemo import cli

WORDS = suite_from_pairs("words", [(word, word.upper()) for word in ("ab", "cd", "ef")])
MIB = 2**20
TINY = "{tiny}"
SUITE = ["--suite", "{suite}"]

pytestmark = pytest.mark.usefixtures("keep_logging_and_warnings")


def without(folder: Path, pattern: str) -> None:
    for file in folder.glob(pattern):
        file.unlink()


def cut(folder: Path, name: str, content: bytes = b"") -> None:
    """A file of its own in place of the linked one."""
    raw = content or (folder / name).read_bytes()[:5000]
    (folder / name).unlink()
    (folder / name).write_bytes(raw)


def lacks_a_tensor(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    del weights["model.norm.weight"]
    (folder / "model.safetensors").unlink()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def lacks_a_shard(folder: Path) -> None:
    shards = {"model.norm.weight": "model-2-of-2.safetensors", "lm_head.weight": "model.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))


def spelt_as_transformers_5_does(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    theta, _ = config.pop("rope_theta"), config.pop("rope_scaling")
    config["rope_parameters"] = {"rope_theta": 50 * theta, "rope_type": "default"}
    cut(folder, "config.json", json.dumps(config).encode())


BROKEN: Mapping[str, tuple[Callable[[Path], None], str]] = {
    "no weights": (lambda x: without(x, "*.safetensors"), "lacks weights .*: name a complete"),
    "no tokenizer": (lambda x: without(x, "tokenizer*"), "lacks a tokenizer .copy the base model's tokenizer files"),
    "no config.json": (lambda x: without(x, "config.json"), "lacks a model configuration: name a complete"),
    "weights cut off": (lambda x: cut(x, "model.safetensors"), "transformers cannot load .*header.*: name a complete"),
    "a shard lost": (lacks_a_shard, r"lacks model-2-of-2\.safetensors, which model\.safetensors\.index\.json names: name a complete"),
    "an index cut off": (lambda x: (x / "model.safetensors.index.json").write_text('{"a') and None, r"index\.json is damaged .*: name a complete"),
    "a tensor lost": (lacks_a_tensor, r"lacks weights of the model \(1, e\.g\. model\.norm\.weight\): name a complete"),
    "config.json cut off": (lambda x: cut(x, "config.json", b'{"a":'), "(transformers cannot load|no max_position_embeddings) .*: name a complete"),
    "rotary embedding that is not read": (
        spelt_as_transformers_5_does,
        r"says rope_parameters, which transformers 4\S+ does not read .it takes rope_theta=10000\.0.: write its rope_theta",
    ),
    "tokenizer cut off": (lambda x: cut(x, "tokenizer.json", b"{"), "cannot load the tokenizer in .*: copy the base model's"),
}  # fmt: skip

#: words after `asft eval`, and what is said
REFUSED: Mapping[str, tuple[list[str], str]] = {
    "no such model": (["nowhere", *SUITE], "there is no model directory nowhere: check the path"),
    "a file as the model": (["{suite}", *SUITE], "is a file: name the Hugging Face model directory"),
    "a suite misspelt": ([TINY, "--suite", "mth500"], "no suite or file mth500: did you mean 'math500'. .*, instruct .the last 4 are groups"),
    "a group misspelt": ([TINY, "--suite", "medicl"], "did you mean 'medical'"),
    "a comma too many": ([TINY, "--suite", "{suite},"], r"no suite or file \(a name is empty\): choose one of math500"),
    "no such file": ([TINY, "--suite", "none.jsonl"], r"there is no suite file none\.jsonl: check the path"),
    "an id of the hub that is no suite": (
        [TINY, "--suite", "someone/some-set"],
        r"no file someone/some-set, and no suite by that id of the hub: .* HuggingFaceH4/MATH-500, .*openai/gsm8k.* can be given",
    ),
    "an id of the hub whose file is not here": ([TINY, "--suite", "openlifescienceai/medmcqa"], "suite medmcqa is not here: run `asft data download medmcqa"),
    "one name twice": ([TINY, "--suite", "{suite}, {suite}.gz"], r"copy\.jsonl and .*copy\.jsonl\.gz are both the suite copy, .*: rename a file"),
    "ids twice": ([TINY, "--suite", "{twice}"], r"twice\.jsonl uses the id a in lines 1 and 4: make ids unique"),
    "a protocol misspelt": ([TINY, *SUITE, "--protocol", "gredy"], "no protocol 'gredy': did you mean 'greedy'. choose one of"),
    "a prompt misspelt": ([TINY, *SUITE, "--prompt", "alpca"], "no prompt variant 'alpca': did you mean 'alpaca'. choose one of"),
    "a backend misspelt": ([TINY, *SUITE, "--backend", "vlm"], "no backend 'vlm': did you mean 'vllm'. choose one of hf, openai, vllm"),
    # Before the text is read, which may take hours.
    "a backend that is not installed": (
        [TINY, *SUITE, "--backend", "vllm", "--drift", "{suite}"],
        r"backend vllm needs vLLM, which .* lacks: run asft eval in an environment of its own that has it \(docs/evaluation\.md\)",
    ),
    "no server named": ([TINY, *SUITE, "--backend", "openai"], "the server's address is not given: set --base-url"),
    "no suite": ([TINY], "asft eval needs MODEL_DIR --suite SUITES"),
    "nothing to explain": (["explain", "{out}", "a"], "holds no results.json|is damaged"),
}  # fmt: skip


@pytest.fixture
def places(tmp_path: Path, model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """A suite, one with an id twice, and a folder that already holds something."""
    for variable in ("OPENAI_BASE_URL", "OPENAI_API_KEY", "ASFT_DATA_DIR"):
        monkeypatch.delenv(variable, raising=False)
    suite, twice, out = tmp_path / "copy.jsonl", tmp_path / "twice.jsonl", tmp_path / "out"
    suite.write_text('{"prompt": "copy AB:", "answer": "AB"}\n')
    (tmp_path / "copy.jsonl.gz").write_bytes(gzip.compress(suite.read_bytes()))
    rows = [json.dumps({"id": x, "prompt": "copy AB:", "answer": "AB"}) for x in "aba"]
    twice.write_text("\n".join([rows[0], "", *rows[1:]]) + "\n")
    out.mkdir()
    (out / "samples.jsonl").write_text('{"answers": "of someone"}\n{"cut o')
    return {"tiny": model_dir, "suite": suite, "twice": twice, "out": out}


def refused(
    words: list[str], places: Mapping[str, Path], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """One sentence, exit code 2, and every file of the folder as it was."""
    before = {file.name: file.read_bytes() for file in places["out"].iterdir()}
    given = [word.format(**places) for word in words]
    capsys.readouterr()
    assert cli.main(given) == 2
    said = capsys.readouterr()
    sentence = said.err.splitlines()[-1]
    assert sentence.startswith("asft: ")
    assert re.search(says, sentence), sentence
    assert said.out == ""
    assert {file.name: file.read_bytes() for file in places["out"].iterdir()} == before


@pytest.mark.parametrize("kind", REFUSED)
def test_wrong_words(kind: str, places: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    words, says = REFUSED[kind]
    out = [] if words[0] == "explain" else ["--out", "{out}"]
    refused(["eval", *words, *out], places, says, capsys)


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_models(
    kind: str, places: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for file in places["tiny"].iterdir():
        (model / file.name).symlink_to(file)
    change, says = BROKEN[kind]
    change(model)
    refused(["eval", str(model), *SUITE, "--out", "{out}"], places, says, capsys)
    fresh = tmp_path / "fresh"
    refused(["eval", str(model), "--drift", "{suite}", "--out", str(fresh)], places, says, capsys)
    assert not fresh.exists()


@pytest.mark.parametrize("place", ["copy.jsonl", "copy.jsonl/below"])
def test_a_file_where_the_folder_should_be(
    place: str, places: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for more in (SUITE, ["--drift", "{suite}"]):
        words = ["eval", TINY, *more, "--out", str(tmp_path / place)]
        refused(words, places, r"copy\.jsonl is no folder: give --out a folder of yours", capsys)


# --- results that were not measured alike ---------------------------------------------------------------------


def measured(model: Path, out: Path, suite: Suite = WORDS, **changes: Any) -> Path:
    settings: dict[str, Any] = {"backend": FakeBackend(str.upper), "max_tokens": 8, **changes}
    evaluate(model, [suite], out_dir=out, **settings)
    return out


def with_drift(folder: Path, dtype: str) -> Path:
    interval = {"value": 0.1, "low": 0.1, "high": 0.1}
    one = {"nll": interval, "entropy": interval, "perplexity": 2.0, "calibration": calibration([0.5], [1])}
    one["label_probability"] = {"edges": [i / 20 for i in range(21)], "shares": [0.05] * 20}
    text = {"sha256": "t", "texts": 3}
    drift = {"text": text, "dtype": dtype, "tokens": 9, "model": one, "base": None, **dict.fromkeys(("forward_kl", "reverse_kl", "nll_change"))}  # fmt: skip
    write_result(folder, replace(read_result(folder), drift=drift), read_samples(folder))
    return folder


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("protocol", "b and a were evaluated with different protocols"),
        ("version", r"b and a have different versions of suite words \(2, 1\)"),
        ("dtype", r"b and a measured their drift in different dtypes \(bfloat16, float32\)"),
    ],
)
def test_results_that_were_not_measured_alike(
    kind: str, says: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = with_drift(measured(model, tmp_path / "a"), "float32"), tmp_path / "b"
    measured(model, b, replace(WORDS, version="2" if kind == "version" else "1"), max_tokens=9 if kind == "protocol" else 8)  # fmt: skip
    with_drift(b, "bfloat16" if kind == "dtype" else "float32")
    out = tmp_path / "out"
    out.mkdir()
    words = ["compare", f"a={a}", f"b={b}", "--out", str(out)]
    refused(words, {"out": out}, f"{says}: evaluate alike, or force the comparison", capsys)
    assert cli.main([*words, "--force"]) == 0
    plain = says.replace("\\", "")
    assert f"warning: {plain}" in capsys.readouterr().out
    assert json.loads((out / "comparison.json").read_text())["warnings"] == [plain]
    for name in ("comparison.md", "comparison.html"):
        assert f"Not measured alike, compared by force: {plain}." in (out / name).read_text()


def test_a_disk_that_fills_up_leaves_the_comparison_that_was_there(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    a, out, fresh = with_drift(measured(model, tmp_path / "a"), "float32"), tmp_path / "out", tmp_path / "c"
    assert cli.main(["compare", f"a={a}", f"b={a}", "--out", str(out)]) == 0
    written = Path.write_text

    def full(path: Path, content: str, **options: Any) -> int:
        if path.name == "comparison.html.unfinished":
            written(path, content[:100], **options)
            raise OSError(errno.ENOSPC, "No space left on device")
        return written(path, content, **options)

    monkeypatch.setattr(Path, "write_text", full)
    words = ["compare", f"a={a}", f"c={a}", "--out"]
    refused([*words, str(out)], {"out": out}, "out cannot be written", capsys)
    refused([*words, str(fresh)], {"out": out}, "c cannot be written", capsys)
    assert not fresh.exists()


# --- damaged samples ------------------------------------------------------------------------------------------


def ends_in_nuls(raw: bytes) -> bytes:
    """As a file system leaves it that had the length on the disk before the content."""
    return raw[:-60] + bytes(60)


DAMAGED: Mapping[str, tuple[Callable[[bytes], bytes], list[str], str]] = {
    "the last line cut": (lambda raw: raw[:-60], ["ef"], r"line 3 of .*samples\.jsonl is damaged"),
    "cut within a character": (lambda raw: raw[: raw.rindex("ß".encode()) + 1], ["ef"], "line 3 of .* is damaged"),
    "the last line of NULs": (ends_in_nuls, ["ef"], "line 3 of .* is damaged"),
    "NULs behind it": (lambda raw: raw + bytes(400), [], "line 4 of .* is damaged"),
    "a line twice": (lambda raw: raw + raw.splitlines(True)[1], [], "has completion 1 of words:2 twice"),
    "a line of something else": (lambda raw: b"7\n" + raw, [], "line 1 of .* is damaged"),
    "an object of something else": (lambda raw: b'{"suite": "words"}\n' + raw, [], r"line 1 of .* is damaged \(no id\)"),
    "deep brackets": (lambda raw: b"[" * 100_000 + b"\n" + raw, [], "line 1 of .* is damaged"),
    "nothing left": (lambda raw: b"", ["ab", "cd", "ef"], "has 0 completions of suite words, 3 were graded"),
}  # fmt: skip


@pytest.mark.parametrize("finished", [True, False], ids=["finished", "killed"])
@pytest.mark.parametrize("kind", DAMAGED)
def test_damaged_samples_are_refused_by_readers_and_mended_by_starting_again(
    kind: str, finished: bool, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def answer(prompt: str) -> str:
        return f"{prompt.upper()} ß"

    folder = measured(model, tmp_path / "out", backend=FakeBackend(answer))
    whole, file = read_samples(folder), folder / "samples.jsonl"
    change, lost, says = DAMAGED[kind]
    file.write_bytes(change(file.read_bytes()))
    if finished:
        for words in (["compare", f"a={folder}", "--out", "{out}"], ["eval", "explain", "{out}", "3"]):
            if words[0] == "compare" or ("damaged" in says):
                refused(
                    words, {"out": folder}, f"{says}.*evaluate with this directory as --out again", capsys
                )
    else:
        (folder / "results.json").unlink()
    again = FakeBackend(answer)
    measured(model, folder, backend=again)
    assert again.asked == lost
    assert read_samples(folder) == [
        {**row, "seconds": new["seconds"]} for row, new in zip(whole, read_samples(folder), strict=True)
    ]


# --- what a model may write -----------------------------------------------------------------------------------


@pytest.mark.parametrize("grader", ["exact_match", "math"])
def test_completions_of_a_megabyte_and_none_at_all(
    grader: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = {"1": "x " * (MIB // 2), "2": r"\boxed{" * (MIB // 7), "3": "9" * MIB, "4": "", "5": "ß" * MIB, "6": " \n" * MIB, "7": "$x$ " * (MIB // 4)}  # fmt: skip
    suite = suite_from_pairs("long", [(prompt, "42") for prompt in texts], grader=grader)
    start = time.monotonic()
    long = measured(
        model, tmp_path / "long", suite, backend=FakeBackend(texts.__getitem__), max_tokens=4 * MIB
    )
    assert time.monotonic() - start < 60, "a few seconds on an idle machine"
    rows = read_samples(long)
    assert [row["completion"] for row in rows] == list(texts.values())
    assert [row["correct"] for row in rows] == [False] * len(texts)
    assert [row["reason"] for row in rows if not row["completion"].strip()] == ["empty completion"] * 2
    right = measured(
        model, tmp_path / "right", suite, backend=FakeBackend(lambda _: "42"), max_tokens=4 * MIB
    )
    words = ["compare", f"long={long}", f"right={right}", "--out", str(tmp_path / "comparison")]
    assert cli.main(words) == 0
    for name in ("comparison.html", "comparison.json", "comparison.md"):
        page = (tmp_path / "comparison" / name).read_text()
        assert max(len(run) for run in re.findall(r"\S+", re.sub(r"<svg.*?</svg>|<style.*?</style>", "", page, flags=re.DOTALL))) < 1500  # fmt: skip
    assert len(explain(long, "1")) < 5000
    capsys.readouterr()


@pytest.mark.long  # the two graders by themselves: test_math_grader, test_sandbox
def test_graders_that_would_hang(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A power that no machine writes out, and a program that never ends: each is judged in its time, and so is what comes after it."""
    quick = functools.partial(math_pool.grade_math, processes=1, seconds=1.0)
    monkeypatch.setattr(math_pool, "grade_math", quick)
    roomy = replace(code.LIMITS, wall_seconds=60.0, cpu_seconds=1)
    monkeypatch.setattr(code, "judge_program", functools.partial(code.judge_program, limits=roomy))
    problem = {"prompt": "", "helpers": "", "tests": "assert add(1, 2) == 3\n", "functions": ["add"]}
    cases = {
        "math": ("42", r"\boxed{9^{9^{9^{9}}}}", "x+1", r"\boxed{1+x}", "not decided within 1 s"),
        "code": (
            json.dumps(problem),
            "def add(a, b):\n    while True:\n        pass\n",
            json.dumps(problem),
            "def add(a, b):\n    return a + b\n",
            "time",
        ),
    }
    for grader, (answer, hangs, other, right, says) in cases.items():
        suite = Suite(grader, "1", grader, (Example("1", "first", answer), Example("2", "second", other)))
        backend = FakeBackend({"first": hangs, "second": right}.__getitem__)
        folder = measured(
            model, tmp_path / grader, suite, backend=backend, max_tokens=999, allow_code_execution=True
        )
        rows = read_samples(folder)
        assert [row["correct"] for row in rows] == [False, True], rows
        assert says in rows[0]["reason"]

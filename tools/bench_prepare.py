"""Rows a second of `asft data prepare`, beside `datasets.map` with a tokenizer, in one run; and its memory on a big file.

    python tools/bench_prepare.py --rows 20000 --processes 1 2 --rounds 3 --out benchmarks/results --name cpu_prepare
    python tools/bench_prepare.py --big 2000000000 --scratch /big/disk --out benchmarks/results --name cpu_prepare_big

The rows are GSM8K's (`ASFT_DATA_DIR`, by default ../shared/data), repeated; the tokenizer is a byte-level BPE of 16384 tokens, trained here on the
same rows, with the splitting of Qwen2's (with --big, one whose tokens are words, which is quicker). Every round is a process of its own in which
the methods take turns. The clocks, on the wall and of all processes' processor time, run from the JSON Lines file to the tokens on disk, without
Python's imports. All tokenise with one thread a process. What is compared:

* `prepare`: tokens, learned spans, row numbers, bad rows reported.
* `map`: `Dataset.from_json`, then for each row the alpaca text and `tokenizer(text)`; no loss mask.
* `map with a mask`: the same, and the prompt tokenised too, to know where the response begins, as fine-tuning scripts do it.
* `map batched`: `map` with `batched=True`.

Writes `<name>.json` and `<name>.md` into `--out`; everything in `--scratch` is removed.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

log = logging.getLogger("bench_prepare")

METHODS = ("prepare", "map", "map with a mask", "map batched")
_VOCABULARY = 16384
_QWEN_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_EOS = "<|endoftext|>"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--big", type=int, metavar="BYTES", help="instead: memory on a file of this size")
    parser.add_argument("--scratch", type=Path, help="folder; the system's temporary one by default")
    parser.add_argument("--note", default="", help="what else ran, for the record")
    parser.add_argument("--name", default="bench_prepare")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)  # processes, scratch, target
    return parser


def gsm8k() -> list[dict[str, str]]:
    """The training rows."""
    file = Path(os.environ.get("ASFT_DATA_DIR", "../shared/data")) / "math" / "gsm8k_train.jsonl"
    with file.open(encoding="utf-8") as stream:
        return [json.loads(line) for line in stream]


def make_tokenizer(folder: Path, texts: list[str]) -> None:
    """Trains a byte-level BPE and writes it as a Hugging Face directory."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_QWEN_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCABULARY, special_tokens=[_EOS], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=_EOS).save_pretrained(folder)


def make_word_tokenizer(folder: Path, texts: list[str]) -> None:
    """A tokenizer whose tokens are words: the quickest there is, for a big file."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.WordLevelTrainer(
        vocab_size=_VOCABULARY, special_tokens=["<unk>", _EOS], show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=_EOS, unk_token="<unk>").save_pretrained(
        folder
    )


def make_rows(path: Path, rows: int) -> None:
    """Writes GSM8K's rows again and again, each with its number in the question."""
    lines = gsm8k()
    with path.open("w", encoding="utf-8") as stream:
        for number in range(rows):
            stream.write(_numbered(lines[number % len(lines)], number))


def make_big_rows(path: Path, nbytes: int) -> int:
    """The same up to a size; of every 64 MiB, 62 are rows with a long field that nobody reads, or tokenising would take hours."""
    lines, number, size = gsm8k(), 0, 0
    unread = "0123456789abcdef" * 4096
    with path.open("w", encoding="utf-8") as stream:
        while size < nbytes:
            dense = size % (64 << 20) < (2 << 20)
            size += stream.write(
                _numbered(lines[number % len(lines)], number, **({} if dense else {"unread": unread}))
            )
            number += 1
    return number


def _numbered(row: dict[str, str], number: int, **more: str) -> str:
    return json.dumps({"question": f"{number}. {row['question']}", "answer": row["answer"], **more}) + "\n"


def run_prepare(scratch: Path, target: Path, processes: int) -> None:
    """What `asft data prepare` calls."""
    from asft_nemo.config.schema import DataConfig
    from asft_nemo.data.preparation import prepare_files

    prepare_files(
        [scratch / "rows.jsonl"],
        DataConfig(),
        tokenizer_dir=scratch / "tokenizer",
        out=target,
        workers=processes,
        suites=None,
        progress=lambda done, total, name: None,
    )


def run_map(scratch: Path, target: Path, processes: int, method: str) -> None:
    """The loop that one writes first."""
    import datasets
    from transformers import AutoTokenizer

    from asft_nemo.data.templates import alpaca_prompt

    datasets.disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(scratch / "tokenizer")  # nosec B615 # a directory

    def one(row: dict[str, str]) -> dict[str, list[int]]:
        prompt = alpaca_prompt(row["question"])
        found = dict(tokenizer(prompt + row["answer"] + _EOS))
        if method == "map with a mask":
            length = len(tokenizer(prompt)["input_ids"])
            found["labels"] = [-100] * length + found["input_ids"][length:]
        return found

    def many(rows: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        pairs = zip(rows["question"], rows["answer"], strict=True)
        return dict(tokenizer([alpaca_prompt(question) + answer + _EOS for question, answer in pairs]))

    batched = method == "map batched"
    rows: Any = datasets.Dataset.from_json(str(scratch / "rows.jsonl"), cache_dir=str(target))
    rows.map(
        many if batched else one,
        batched=batched,
        num_proc=processes,
        remove_columns=["question", "answer"],
        cache_file_name=str(target / "tokens.arrow"),
    )


def child(processes: int, scratch: Path, target: Path) -> None:
    """One round: prints each method's seconds, on the wall and of the processors."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    import datasets  # noqa: F401
    from transformers import AutoTokenizer

    import asft_nemo.data.preparation  # noqa: F401

    # so that nobody's clock runs while transformers is imported
    AutoTokenizer.from_pretrained(scratch / "tokenizer")  # nosec B615 # a directory
    for method in METHODS:
        folder = target / method.replace(" ", "_")
        folder.mkdir()
        started, before = time.perf_counter(), os.times()
        if method == "prepare":
            run_prepare(scratch, folder / "out", processes)
        else:
            run_map(scratch, folder, processes, method)
        seconds, after = time.perf_counter() - started, os.times()
        processor = sum(after[:4]) - sum(before[:4])  # of this process and of those that have ended
        print(json.dumps({"method": method, "wall": seconds, "processor": processor}))


def compare(options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Seconds of every method, number of processes and round."""
    make_tokenizer(scratch / "tokenizer", [row["question"] + " " + row["answer"] for row in gsm8k()])
    make_rows(scratch / "rows.jsonl", options.rows)
    seconds: dict[str, dict[str, dict[str, list[float]]]] = {
        str(count): {method: {"wall": [], "processor": []} for method in METHODS}
        for count in options.processes
    }
    for round_number in range(options.rounds):
        for count in options.processes:
            with tempfile.TemporaryDirectory(dir=scratch) as target:
                words = ["--child", str(count), str(scratch), target]
                result = subprocess.run(
                    [sys.executable, __file__, *words], check=True, stdout=subprocess.PIPE, text=True
                )
            for line in result.stdout.splitlines():
                found = json.loads(line)
                log.info("round %d, %d processes: %s", round_number, count, found)
                for clock, values in seconds[str(count)][found["method"]].items():
                    values.append(found[clock])
    return {"rows": options.rows, "bytes": (scratch / "rows.jsonl").stat().st_size, "seconds": seconds}


def memory(nbytes: int, scratch: Path, processes: int) -> dict[str, Any]:
    """Peak resident memory of the command's main process and of each tokenising process."""
    import psutil

    make_word_tokenizer(scratch / "tokenizer", [row["question"] + " " + row["answer"] for row in gsm8k()])
    rows = make_big_rows(scratch / "rows.jsonl", nbytes)
    log.info("%d rows", rows)
    command = [sys.executable, "-m", "asft_nemo", "data", "prepare", str(scratch / "rows.jsonl")]
    command += [
        f"model.path={scratch / 'tokenizer'}",
        "--out",
        str(scratch / "out"),
        "--workers",
        str(processes),
    ]
    started, samples = time.perf_counter(), list[tuple[float, int, int]]()
    process = psutil.Popen(command, stdout=subprocess.DEVNULL)
    while process.poll() is None:
        try:
            workers = [worker.memory_info().rss for worker in process.children(recursive=True)]
            samples.append(
                (time.perf_counter() - started, process.memory_info().rss, max(workers, default=0))
            )
        except psutil.Error:  # ended in between
            continue
        time.sleep(0.5)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} failed with exit code {process.returncode}")
    quarter = max(1, len(samples) // 4)
    quarters = [samples[start : start + quarter] for start in range(0, 4 * quarter, quarter)]
    return {
        "rows": rows,
        "bytes": (scratch / "rows.jsonl").stat().st_size,
        "processes": processes,
        "seconds": time.perf_counter() - started,
        "tokens_bytes": sum(path.stat().st_size for path in (scratch / "out").rglob("tokens.bin")),
        "peak_rss_bytes": {
            "main, each quarter of the time": [max((s[1] for s in part), default=0) for part in quarters],
            "a worker, each quarter of the time": [max((s[2] for s in part), default=0) for part in quarters],
        },
    }


def table(results: dict[str, Any]) -> str:
    """The comparison as Markdown: medians, and ratios within a round."""
    lines = [
        "| processes | | rows/s | rows a processor second | seconds over prepare's | processor seconds over prepare's |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for count, methods in results["seconds"].items():
        for method, clocks in methods.items():
            cells = [f"{results['rows'] / statistics.median(found):.0f}" for found in clocks.values()]
            for clock, found in clocks.items():
                ratios = [other / own for other, own in zip(found, methods["prepare"][clock], strict=True)]
                cells.append(f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
            lines.append(f"| {count} | {method} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def memory_table(found: dict[str, Any]) -> str:
    """The memory as Markdown."""
    lines = ["| | MiB |", "| --- | --- |"]
    for name, sizes in found["peak_rss_bytes"].items():
        lines.append(f"| {name} | {', '.join(f'{nbytes / 2**20:.0f}' for nbytes in sizes)} |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str]) -> int:
    """Measures and writes."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.child:
        processes, scratch, target = options.child
        child(int(processes), Path(scratch), Path(target))
        return 0
    if options.out is None:
        parser.error("--out is needed")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    from asft_nemo.run_dir import versions

    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="asft-bench-", dir=options.scratch) as scratch:
        if options.big is None:
            results = compare(options, Path(scratch))
            text = table(results)
        else:
            results = memory(options.big, Path(scratch), max(options.processes))
            text = memory_table(results)
    record = {
        "date": date.today().isoformat(),
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "python": platform.python_version(),
            "load": os.getloadavg(),
        },
        "note": options.note,
        "versions": versions(),
        "results": results,
    }
    (options.out / f"{options.name}.json").write_text(json.dumps(record, indent=2) + "\n")
    (options.out / f"{options.name}.md").write_text(text)
    log.info("%s", text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

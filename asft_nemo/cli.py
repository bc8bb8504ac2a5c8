"""The `asft` command.

Exit codes: 0 done; 2 the user can mend it (one sentence and the cure, no traceback unless --debug); 1 our
bug (traceback). Everything heavy is imported by the command that needs it, so that `asft --help` answers at
once.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import asft_nemo
from asft_nemo.config.schema import EvalConfig
from asft_nemo.errors import ConfigError, UserError
from asft_nemo.logs import set_up_logging

if TYPE_CHECKING:
    from asft_nemo.data import LoadReport

DONE, BUG, MENDABLE, INTERRUPTED = 0, 1, 2, 130

Progress = Callable[[int, int, str], None]


class Parser(argparse.ArgumentParser):
    """argparse whose usage errors are our user errors: one sentence, exit code 2."""

    def error(self, message: str) -> Any:
        raise UserError(f"{message}: see {self.prog} --help")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    try:
        arguments, unknown = parser().parse_known_args(words)
        if unknown and arguments.command is not _not_yet:
            raise UserError(f"unrecognized arguments: {' '.join(unknown)}: see asft --help")
        set_up_logging()
        logging.getLogger("asft_eval").setLevel(logging.INFO)
        return arguments.command(arguments)
    except UserError as error:
        if debug:
            traceback.print_exc()
        sentences = error.violations if isinstance(error, ConfigError) else (str(error),)
        for sentence in sentences:
            print(f"asft: {sentence}", file=sys.stderr)
        return MENDABLE
    except KeyboardInterrupt:
        print("asft: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output went away, for example `asft ... | head`
        sys.stderr.close()
        return DONE
    except Exception:
        traceback.print_exc()
        print(
            "asft: this is a bug in asft, not in your settings: please report the lines above",
            file=sys.stderr,
        )
        return BUG


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    common = Parser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show the traceback of every error")
    common.add_argument("--json", action="store_true", help="print the result as one JSON object")
    top = Parser(prog="asft", description="Anchored supervised fine-tuning on NeMo and Megatron-core.")
    top.add_argument("--version", action="version", version=f"asft {asft_nemo.__version__}")
    commands = top.add_subparsers(metavar="COMMAND", required=True, parser_class=Parser)

    def add(name: str, command: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text, parents=[common])
        sub.set_defaults(command=command)
        return sub

    demo = add("demo", _demo, "the whole story on this machine, ends with a report")
    demo.add_argument("--quick", action="store_true", help="two objectives, few steps, under 3 minutes")
    demo.add_argument(
        "--out", type=Path, default=Path("runs/demo"), help="folder of the report (default: %(default)s)"
    )
    train = add("train", _train, "fine-tune on this machine; the ranks are started for you")
    train.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="settings, for example objective=asft"
    )
    cache = add("cache-reference", _cache_reference, "store the base's hidden states for reference=cached")
    cache.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="settings of the training run that will read them"
    )
    cache.add_argument(
        "--repair", action="store_true", help="check every stored row first and compute again what is damaged"
    )
    _add_data(commands, common)
    _add_checkpoint_commands(add)
    _add_evaluation_commands(add)
    for name, (text, instead) in NOT_YET.items():
        later = add(name, _not_yet, f"{text} (not available yet)")
        later.set_defaults(name=name, instead=instead)
    return top


NOT_YET = {
    "launch": ("the same as train through NeMo-Run: local or Slurm", "use asft train on this machine"),
    "plan": ("memory, seconds and layouts that fit", "the recipes state layouts that fit their machines"),
}


def _not_yet(arguments: argparse.Namespace) -> int:
    raise UserError(f"asft {arguments.name} is not available yet: {arguments.instead}")


# --- demo and training
# ---------------------------------------------------------------------------------------


def _demo(arguments: argparse.Namespace) -> int:
    from asft_nemo.demo import run as demo

    demo.main(quick=arguments.quick, out_dir=arguments.out)
    report = arguments.out / "report.html"
    _answer(arguments, {"report": str(report)}, f"report: {report}")
    return DONE


def _train(arguments: argparse.Namespace) -> int:
    from asft_nemo.config.load import compose

    run = compose(arguments.overrides)
    from asft_nemo.launch_local import launch

    launch(run)
    folder = Path(run.run.dir)
    latest = folder / "checkpoints" / "latest"
    _answer(
        arguments,
        {"run_dir": str(folder), "checkpoint": str(latest.resolve())},
        f"done: metrics in {folder / 'metrics.jsonl'}\nto export: asft export {latest} OUT_HF_DIR",
    )
    return DONE


def _cache_reference(arguments: argparse.Namespace) -> int:
    from asft_nemo.config.load import compose

    run = compose([*arguments.overrides, "reference=cached"])
    from asft_nemo.launch_local import launch_cache
    from asft_nemo.run_dir import cache_dir

    launch_cache(run, repair=arguments.repair)
    folder = cache_dir(run)
    _answer(
        arguments,
        {"cache_dir": str(folder)},
        f"done: hidden states in {folder}\nto train with it: asft train reference=cached reference.cache_dir={folder} and the same settings",
    )
    return DONE


# --- data
# ----------------------------------------------------------------------------------------------------


def _add_data(commands: Any, common: argparse.ArgumentParser) -> None:
    data = commands.add_parser(
        "data", help="validate the files a run will read", description="Validate data files."
    )
    kinds = data.add_subparsers(metavar="KIND", required=True, parser_class=Parser)
    text = "counts, lengths and every bad row; exit code 2 when a row is bad"
    check = kinds.add_parser("check", help=text, description=text, parents=[common])
    check.add_argument(
        "words",
        nargs="+",
        metavar="FILE | KEY=VALUE",
        help="JSON Lines files, and settings such as data.fields.prompt=question or model.path=DIR (tokenizer)",
    )
    check.set_defaults(command=_data_check)
    for name in ("prepare", "download"):
        later = kinds.add_parser(name, help="(not available yet)", parents=[common])
        later.set_defaults(command=_not_yet, name=f"data {name}", instead="give your own files in data.train")


def _data_check(arguments: argparse.Namespace) -> int:
    files = [word for word in arguments.words if "=" not in word or Path(word).is_file()]
    overrides = [word for word in arguments.words if word not in files]
    if not files:
        raise UserError("asft data check got no file: name at least one JSON Lines file")
    from asft_nemo.config.load import compose

    given = {word.partition("=")[0] for word in overrides}
    # Only the data settings and the tokenizer matter here, so the rest of a run need not be spelt out.
    fill = ("recipe=tiny_cpu", "objective=sft")
    run = compose(
        [word for word in fill if word.partition("=")[0] not in given] + overrides, check_inputs=False
    )
    from asft_nemo.data import TextTokenizer, inspect_files

    report = inspect_files(files, run.data, tokenizer=TextTokenizer.load(_tokenizer_dir(run.model.path)))
    summary = report.summary()
    bad = [row._asdict() for row in report.bad]
    values = {
        **summary,
        "sequence_length": run.data.sequence_length,
        "tokenizer": run.model.path,
        "bad_rows": bad,
    }
    _answer(arguments, values, _data_words(report, run.data.sequence_length, run.model.path))
    for row in report.bad if not arguments.json else ():
        print(row, file=sys.stderr)
    return MENDABLE if bad else DONE


def _tokenizer_dir(model_path: str) -> Path:
    inside = Path(model_path) / "context" / "hf"
    return inside if inside.is_dir() else Path(model_path)


def _data_words(report: LoadReport, sequence_length: int, tokenizer: str) -> str:
    lines = [f"{report.rows} rows, {report.rows - len(report.bad)} usable, {len(report.bad)} bad"]
    if report.lengths:
        figures = report.summary()["lengths"]
        words = ", ".join(f"{name} {value}" for name, value in figures.items())
        lines.append(f"tokens an example: {words} (tokenizer of {tokenizer})")
        lines.append(
            f"{report.too_long} examples are longer than data.sequence_length={sequence_length}; "
            f"{report.kept} remain with {report.tokens} tokens, {report.learned_tokens} of them learned"
        )
    return "\n".join(lines)


# --- checkpoints
# ---------------------------------------------------------------------------------------------


def _add_checkpoint_commands(add: Callable[..., argparse.ArgumentParser]) -> None:
    dtypes = ("fp32", "bf16", "fp16")
    importer = add("import", _import, "Hugging Face directory to NeMo checkpoint")
    importer.add_argument("hf_dir", type=Path, metavar="HF_DIR")
    importer.add_argument("out_dir", type=Path, metavar="OUT")
    importer.add_argument(
        "--dtype", choices=dtypes, help="of the written weights; without it they keep theirs"
    )
    exporter = add("export", _export, "NeMo checkpoint to Hugging Face directory")
    exporter.add_argument("ckpt_dir", type=Path, metavar="CKPT")
    exporter.add_argument("out_dir", type=Path, metavar="OUT_HF_DIR")
    exporter.add_argument(
        "--dtype", choices=dtypes, help="of the written weights; without it the base model's"
    )
    exporter.add_argument(
        "--base", type=Path, help="Hugging Face directory to take config and tokenizer from"
    )
    exporter.add_argument("--max-shard-bytes", type=int, help="largest size of one safetensors file")
    verifier = add("verify", _verify, "compare a NeMo checkpoint with a Hugging Face directory, bit for bit")
    verifier.add_argument("ckpt_dir", type=Path, metavar="CKPT")
    verifier.add_argument("hf_dir", type=Path, metavar="HF_DIR")


def _import(arguments: argparse.Namespace) -> int:
    from asft_nemo.checkpoint.convert import import_hf

    with _progress("import") as progress:
        report = import_hf(arguments.hf_dir, arguments.out_dir, dtype=arguments.dtype, progress=progress)
    _answer(
        arguments,
        _conversion(report),
        f"imported {report.num_tensors} tensors ({report.nbytes} bytes) to {report.path}",
    )
    return DONE


def _export(arguments: argparse.Namespace) -> int:
    from asft_nemo.checkpoint.convert import export_hf

    options: dict[str, Any] = {"dtype": arguments.dtype, "base_dir": arguments.base}
    if arguments.max_shard_bytes is not None:
        options["max_shard_bytes"] = arguments.max_shard_bytes
    with _progress("export") as progress:
        report = export_hf(arguments.ckpt_dir, arguments.out_dir, progress=progress, **options)
    _answer(
        arguments,
        _conversion(report),
        f"exported {report.num_tensors} tensors ({report.nbytes} bytes) to {report.path}",
    )
    return DONE


def _conversion(report: Any) -> dict[str, Any]:
    return {
        "path": str(report.path),
        "family": report.family,
        "num_tensors": report.num_tensors,
        "bytes": report.nbytes,
        "dtype": str(report.dtype).removeprefix("torch."),
        "seconds": report.seconds,
    }


def _verify(arguments: argparse.Namespace) -> int:
    from asft_nemo.checkpoint.verify import verify

    with _progress("verify") as progress:
        report = verify(arguments.ckpt_dir, arguments.hf_dir, progress=progress)
    differences = [
        {"name": row.name, "numbers": row.numbers, "total": row.total, "max_difference": row.max_difference}
        for row in report.differences
    ]
    verdict = "identical" if report.identical else "DIFFERENT"
    lines = [f"{verdict}: {report.num_tensors} tensors, {report.nbytes} bytes, {len(differences)} differ"]
    lines += [
        f"  {row['name']}: {row['numbers']} of {row['total']} numbers differ, at most by {row['max_difference']:g}"
        for row in differences
    ]
    values = {"identical": report.identical, "num_tensors": report.num_tensors, "differences": differences}
    _answer(arguments, values, "\n".join(lines))
    return DONE if report.identical else MENDABLE


# --- evaluation
# ----------------------------------------------------------------------------------------------


def _add_evaluation_commands(add: Callable[..., argparse.ArgumentParser]) -> None:
    defaults = EvalConfig()
    evaluate = add("eval", _eval, "greedy accuracy of a Hugging Face model on suites")
    evaluate.add_argument("model_dir", type=Path, metavar="MODEL_DIR")
    evaluate.add_argument(
        "--suite", required=True, help="JSON Lines files of prompt and answer, separated by commas"
    )
    evaluate.add_argument("--backend", default=defaults.backend, help="default: %(default)s")
    evaluate.add_argument(
        "--protocol", choices=("greedy",), default=defaults.protocol, help="default: %(default)s"
    )
    evaluate.add_argument(
        "--limit", type=int, default=defaults.limit, help="only the first examples of each suite"
    )
    evaluate.add_argument("--max-tokens", type=int, default=defaults.max_tokens, help="default: %(default)s")
    evaluate.add_argument("--batch-size", type=int, default=defaults.batch_size, help="default: %(default)s")
    evaluate.add_argument("--out", type=Path, required=True, help="folder for results.json and samples.jsonl")
    compare = add("compare", _compare, "put results side by side")
    compare.add_argument("results", nargs="+", metavar="NAME=RESULT_DIR")
    compare.add_argument(
        "--out", type=Path, required=True, help="folder for comparison.md and comparison.json"
    )
    compare.add_argument("--force", action="store_true", help="compare although they were not measured alike")


@contextmanager
def _evaluation_errors() -> Iterator[None]:
    """asft_eval knows nothing of asft_nemo: its error becomes ours here."""
    from asft_eval.errors import EvaluationError

    try:
        yield
    except EvaluationError as error:
        raise UserError(str(error)) from error


def _eval(arguments: argparse.Namespace) -> int:
    with _evaluation_errors():
        from asft_eval.run import evaluate

        result = evaluate(
            arguments.model_dir,
            arguments.suite.split(","),
            backend=arguments.backend,
            out_dir=arguments.out,
            max_tokens=arguments.max_tokens,
            batch_size=arguments.batch_size,
            limit=arguments.limit,
        )
    lines = [
        f"{name}: {100 * suite.accuracy:.1f} % of {suite.n} right, 95 % interval "
        f"{100 * suite.interval[0]:.1f} to {100 * suite.interval[1]:.1f}"
        for name, suite in result.suites.items()
    ]
    _answer(arguments, result.to_json(), "\n".join([*lines, f"results: {arguments.out / 'results.json'}"]))
    return DONE


def _compare(arguments: argparse.Namespace) -> int:
    results: dict[str, str] = {}
    for word in arguments.results:
        name, equals, folder = word.partition("=")
        if not equals or not name or not folder or name in results:
            raise UserError(f"cannot use '{word}': write NAME=RESULT_DIR, each name once")
        results[name] = folder
    with _evaluation_errors():
        from asft_eval.compare import compare, markdown_table

        comparison = compare(results, force=arguments.force)
    header, rows = comparison.table()
    values = {
        "results": {name: result.to_json() for name, result in comparison.results.items()},
        "suites": list(comparison.suites),
        "changes": [
            {"model": model, "suite": suite, "gained": change.gained, "lost": change.lost}
            for (model, suite), change in comparison.changes.items()
        ],
        "warnings": list(comparison.warnings),
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    table = markdown_table(header, rows)
    (arguments.out / "comparison.md").write_text(table)
    (arguments.out / "comparison.json").write_text(json.dumps(values, indent=2) + "\n")
    _answer(arguments, values, "\n".join([*(f"warning: {text}" for text in comparison.warnings), table]))
    return DONE


# --- what commands share
# ---------------------------------------------------------------------------------------


def _answer(arguments: argparse.Namespace, values: dict[str, Any], words: str) -> None:
    """The result on stdout: one JSON object with --json, else words."""
    print(json.dumps(values) if arguments.json else words)


@contextmanager
def _progress(what: str) -> Iterator[Progress]:
    """A callback (done, all, name), in bytes: a bar on a terminal, else a line every ten seconds."""
    if not sys.stderr.isatty():
        yield _lines(what)
        return
    from tqdm import tqdm

    with tqdm(desc=what, unit="B", unit_scale=True, unit_divisor=1024) as bar:

        def show(done: int, total: int, name: str) -> None:
            bar.total = total
            bar.set_postfix_str(name, refresh=False)
            bar.update(done - bar.n)

        yield show


def _lines(what: str, *, seconds: float = 10.0) -> Progress:
    started = last = time.monotonic()

    def show(done: int, total: int, name: str) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= seconds and done:
            last = now
            left = (now - started) * (total - done) / done
            print(f"{what}: {100 * done / total:.0f} % ({name}), about {left:.0f} s left", file=sys.stderr)

    return show

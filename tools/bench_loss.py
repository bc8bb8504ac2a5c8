"""Time and peak extra memory of the losses, forward + backward, against other implementations of the same loss.

    python tools/bench_loss.py --quick --out runs/bench
    python tools/bench_loss.py --tokens 1024 4096 --vocab 32768 --dtype fp32 bf16 --plot --out benchmarks/results
    python tools/bench_loss.py --device cuda --tokens 8192 --vocab 152064 --hidden 3584 --dtype bf16 --out runs/bench

Contenders: ours (fused from hidden states, and over materialised logits), the authors' arithmetic, Liger-Kernel and
ModelOpt with Megatron's cross entropy where they are installed, else reported as skipped with the reason. All get the
same tensors, every token valid. Seconds are measured in one process in interleaved rounds, peak memory in one process
per contender. Writes `<name>.json`, `<name>.md` and with `--plot` `<name>.png` into `--out`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from bench import report

log = logging.getLogger("bench_loss")

QUICK = {"tokens": [256], "vocab": [1024], "hidden": [64], "repeats": 2}


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least 1")
    return number


def _chunk(text: str) -> int | str:
    return text if text == "auto" else _positive(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    several: dict[str, Any] = {"type": _positive, "nargs": "+", "metavar": "N"}
    parser.add_argument(
        "--tokens", default=[4096], help="T; several are measured one after another", **several
    )
    parser.add_argument("--vocab", default=[32768], help="V", **several)
    parser.add_argument("--hidden", default=[512], help="H", **several)
    parser.add_argument("--dtype", nargs="+", choices=("fp32", "bf16"), default=["fp32"])
    parser.add_argument("--objective", choices=("asft", "sft_kl", "dft", "sft"), default="asft")
    parser.add_argument("--chunk-tokens", type=_chunk, default="auto", metavar="auto|N", help="fused loss")
    parser.add_argument("--contenders", nargs="+", choices=list(report.TITLES), default=list(report.TITLES))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--threads", type=_positive, default=0, help="torch's threads; its own choice by default"
    )
    parser.add_argument("--repeats", type=_positive, default=5, help="timed rounds, after one that is not")
    parser.add_argument("--quick", action="store_true", help="one tiny size, to see that it works")
    parser.add_argument("--name", default="bench_loss", help="of the files written")
    parser.add_argument("--plot", action="store_true")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser


def _ask(request: dict[str, Any]) -> dict[str, Any]:
    """The answer of a fresh worker process."""
    command = [sys.executable, __file__, "--worker", json.dumps(request), "--out", "."]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    if answer.returncode:
        sys.stderr.write(answer.stderr)
        raise SystemExit(
            f"bench_loss: measuring {request['kind']} of {', '.join(request['names'])} at {request['case']} ended "
            f"with exit code {answer.returncode}: its traceback is above, or the machine has too little memory"
        )
    return json.loads(answer.stdout.splitlines()[-1])


def measure(case: dict[str, Any], names: list[str], *, repeats: int, threads: int) -> dict[str, Any]:
    """Everything about one size: gradient errors, seconds a round, peak bytes."""
    common = {"case": case, "names": names, "repeats": repeats, "threads": threads}
    log.info("%s, objective %s", report.size_label(case), case["objective"])
    result: dict[str, Any] = {"case": case, "names": names, "repeats": repeats}
    result["machine_idle_before"] = report.idle_share()
    result |= _ask({"kind": "errors", **common})
    result |= _ask({"kind": "time", **common})
    result["memory"] = {}
    for name in names:
        if name not in result["skipped"]:
            result["memory"][name] = _ask({"kind": "memory", **common, "names": [name]})
    return result


def _work(message: str) -> None:
    """A worker: answers one request with one line on stdout."""
    # Libraries may print as well: the last line is the answer.
    from bench.measure import work

    print(json.dumps(work(json.loads(message))))


def main() -> None:
    """Measures, and writes after every size."""
    parser = _parser()
    arguments = parser.parse_args()
    if arguments.worker:
        return _work(arguments.worker)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if arguments.quick:
        for key, value in QUICK.items():
            if getattr(arguments, key) == parser.get_default(key):
                setattr(arguments, key, value)
    sizes = itertools.product(arguments.dtype, arguments.hidden, arguments.vocab, arguments.tokens)
    arguments.out.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {"environment": report.environment(), "results": []}
    for dtype, hidden, vocab, tokens in sizes:
        case = {
            "tokens": tokens,
            "vocab": vocab,
            "hidden": hidden,
            "dtype": dtype,
            "objective": arguments.objective,
            "chunk_tokens": arguments.chunk_tokens,
            "device": arguments.device,
        }
        result = measure(case, arguments.contenders, repeats=arguments.repeats, threads=arguments.threads)
        found["results"].append(result)
        found["bars"] = report.verdicts(found["results"])
        text = json.dumps(found, indent=1) + "\n"
        (arguments.out / f"{arguments.name}.json").write_text(text, encoding="utf-8")
    text = report.table(found["results"])
    (arguments.out / f"{arguments.name}.md").write_text(text, encoding="utf-8")
    if arguments.plot:
        report.plot(found["results"], arguments.out / f"{arguments.name}.png")
    print(text)


if __name__ == "__main__":
    main()

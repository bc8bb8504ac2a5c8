"""What only a GPU can show, part by part, each with its bars; and with --nproc the first hour on a new cluster in ten minutes.

    python tools/gpu_check.py --out runs/gpu_check
    python tools/gpu_check.py --parts kernels loss --minutes 5 --out runs/gpu_check
    python tools/gpu_check.py --nproc 2 --out runs/gpu_check --name two_gpus
    python tools/gpu_check.py --parts forms --shape 1.5b --steps 50 --forms sft_fp8_current sft_fp8_blockwise --out runs/gpu_check
    python tools/gpu_check.py --device cpu --out runs/rehearsal

One GPU: Triton's kernels and the fused loss, beside other libraries; steps of Qwen2.5-1.5B's shape, and of the 7B one with LoRA, with each form of
the reference beside steps without, against the law of the planner; every form's memory, Transformer Engine's layers beside Megatron's own,
FP8; conversion beside NeMo's. Several (--nproc): collectives, gradients at every layout against fp64, fused gradients, overlaps, checkpoints
between layouts, FP8 and context parallelism. Weights are random, nothing is fetched. `--list` says what each part needs and how long it takes.

A part that lacks something is skipped with a sentence, one that breaks has failed with one, and the others go on. Writes `<name>.json` and
`<name>.md` into `--out` after every part. `--device cpu` rehearses all of it at small sizes where there is no GPU; its times say nothing.
docs/gpu_check.md says how to read the result.

Exit codes: 0 nothing failed and no bar was missed; 1 something did; 2 this machine cannot be checked.
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
import os
import shlex
import signal
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))
sys.path.insert(1, str(ROOT))  # also where the project is not installed

log = logging.getLogger("gpu_check")

RANKS = (1, 2, 4, 8)


def _parser() -> argparse.ArgumentParser:
    from bench.gpu_forms import CHECKED

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", metavar="PART", help="all by default; --list names them")
    parser.add_argument(
        "--minutes", type=float, help="parts that no longer fit are left out (60; with --nproc 10)"
    )
    parser.add_argument("--nproc", type=int, default=1, help="2, 4 or 8: the checks of several GPUs")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--list", action="store_true", help="say the parts and leave")
    parser.add_argument("--prompt-share", type=float, default=0.0, help="of the steps' tokens, not learned")
    parser.add_argument("--hidden", type=int, default=1024, help="of the forms' model")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument(
        "--shape", choices=("1.5b",), help="Qwen2.5-1.5B's sizes instead of --hidden and --layers"
    )
    parser.add_argument("--sequence-length", type=int, default=1024)
    parser.add_argument("--micro-batch-size", type=int, default=2)
    parser.add_argument("--micro-batches", type=int, default=4, help="a step")
    parser.add_argument("--steps", type=int, default=4, help="at least 4, for the profiled run")
    parser.add_argument("--gpus", type=int, default=1, help="data-parallel ranks of each form's run")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16", help="of the policy")
    parser.add_argument("--forms", nargs="+", choices=list(CHECKED), default=list(CHECKED))
    parser.add_argument("--tokens", type=int, default=2048, help="of the kernels' checks")
    parser.add_argument("--vocab", type=int, default=32768, help="of the kernels' checks")
    parser.add_argument("--name", default="gpu_check")
    parser.add_argument("--out", type=Path, metavar="DIR")
    return parser


def refusal(options: argparse.Namespace) -> str | None:
    """The sentence for a command or a machine that cannot be checked; None where it can."""
    if options.nproc not in RANKS:
        return f"--nproc {options.nproc} is none of 1, 2, 4 and 8: the checks share batches of 8 examples out evenly"
    known = [part.name for part in parts_of(options)]
    for name in options.parts or ():
        if name not in known:
            return f"--parts {name} is none of {', '.join(known)}: choose from these"
    if options.out is None and not options.list:
        return "--out is not given: say which folder the result goes into"
    if options.device == "cpu" or options.list:
        return None
    import torch

    if os.environ.get("ASFT_DEVICE", "").lower() == "cpu":
        return "gpu_check measures a GPU, and ASFT_DEVICE=cpu asks for the CPU: unset it, or rehearse with --device cpu"
    if not torch.cuda.is_available():
        return (
            "gpu_check needs a CUDA GPU, and torch sees none here: run it on a machine that has one (docs/container.md), or rehearse with "
            "--device cpu"
        )
    for name, asked in (("--gpus", options.gpus), ("--nproc", options.nproc)):
        if asked > torch.cuda.device_count():
            return f"{name} {asked} asks for more than the {torch.cuda.device_count()} GPUs here: lower it"
    return None


def parts_of(options: argparse.Namespace) -> list[Any]:
    """The parts of one GPU, or of several."""
    from bench.gpu_table import ONE_GPU, SEVERAL

    return list(SEVERAL if options.nproc > 1 else ONE_GPU)


def described(parts: list[Any]) -> str:
    """What --list prints."""
    return "\n".join(f"{part.name:<18} about {part.seconds / 60:4.1f} min  {part.title}" for part in parts)


def main(arguments: list[str]) -> int:
    """Measures and writes."""
    options = _parser().parse_args(arguments)
    if importlib.util.find_spec("torch") is None:
        print(
            f"gpu_check needs torch, which {sys.executable} does not have: install it there", file=sys.stderr
        )
        return 2
    refused = refusal(options)
    if refused is not None:
        print(refused, file=sys.stderr)
        return 2
    parts = [part for part in parts_of(options) if not options.parts or part.name in options.parts]
    if options.list:
        print(described(parts))
        return 0
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if options.device == "cpu":
        os.environ["ASFT_DEVICE"] = "cpu"
        options.precision = "fp32"
    if options.minutes is None:
        options.minutes = 10.0 if options.nproc > 1 else 60.0
    return check(options, parts, ["python", "tools/gpu_check.py", *arguments])


def for_children() -> None:
    """What every process that is started from here needs: this clone, where the project is not installed, and no word to any hub."""
    paths = [str(ROOT), str(ROOT / "eval"), str(ROOT / "tools"), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    os.environ["HF_HUB_OFFLINE"] = "1"


def check(options: argparse.Namespace, parts: list[Any], command: list[str]) -> int:
    """Runs the parts and writes after each."""
    from bench import gpu_page
    from bench.gpu_parts import Check, run_parts, verdicts

    options.out.mkdir(parents=True, exist_ok=True)
    for_children()
    # also then the tens of GB of the scratch folder are taken away
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    record: dict[str, Any] = {
        "date": date.today().isoformat(),
        "command": shlex.join(command),
        "minutes": 0.0,
        "machine": gpu_page.machine(),
        "versions": gpu_page.versions(),
        "commit": gpu_page.commit(),
        "options": {key: value for key, value in vars(options).items() if key not in ("out", "name", "list")},
        "parts": {},
        "bars": [],
    }
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="asft-gpu-check-", ignore_cleanup_errors=True) as scratch:
        given = Check(
            options, options.device, Path(scratch), nproc=options.nproc, minutes=options.minutes, began=began
        )
        for part, result in run_parts(parts, given):
            record["parts"][part.name] = result
            record["bars"] = verdicts(parts, record["parts"], device=options.device)
            record["minutes"] = (time.monotonic() - began) / 60
            gpu_page.write(record, parts, options.out, options.name)
            reason = f": {result['reason']}" if "reason" in result else ""
            log.info("%s %s%s", part.name, result["status"], reason)
    log.info("%s", gpu_page.page(record, parts))
    return int(gpu_page.anything_wrong(record))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Trains the tiny model at TP2 x PP2 on every pair of NeMo and Megatron-core that is promised, and compares: `make test-compat`.

    python tools/compat_check.py [--out benchmarks/results] [--only nemo27_mcore016]

The first environment is this one, `.venv`. Each file `requirements/compat_NAME.txt` lists what another one changes; it is made in
`.venv-compat-NAME`, where these packages lie before those of `.venv`, which it shares (a .pth file adds them), so everything else is
the same to the byte. In each of them `asft train` takes four steps on four CPU ranks, is set back to its checkpoint of step 2 and resumed, and
`asft export` writes the last one. Every number of metrics.jsonl but times, and every exported weight, must equal those of `.venv` to the bit.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

log = logging.getLogger("compat_check")

ROOT = Path(__file__).resolve().parents[1]
PINNED = "pinned"
SECONDS = 900  # for one command, four imports of NeMo included: 240 were too few on two cores at a load of 13
STEPS = 4
_TIMES = ("seconds", "per_second", "tflops", "mfu")
_RANKS = {"OMP_NUM_THREADS": "1", "ASFT_DEVICE": "cpu"}


class Failed(Exception):
    """An environment does not do what the pinned one does."""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = sorted(file.stem.removeprefix("compat_") for file in (ROOT / "requirements").glob("compat_*.txt"))
    parser.add_argument("--only", choices=names, action="append", help="not all of them")
    parser.add_argument("--out", type=Path, help="folder for compat.json and compat.md")
    parser.add_argument(
        "--lock",
        type=Path,
        help="file that each environment locks, for a machine that does heavy work in turn",
    )
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    with tempfile.TemporaryDirectory(prefix="asft_compat_") as scratch:
        rows = check(arguments.only or names, Path(scratch), out=arguments.out, lock=arguments.lock)
    failed = [row for row in rows if row["failed"]]
    for row in failed:
        log.error("%s: %s", row["name"], row["failed"])
    log.info("%d of %d environments train, resume and export alike", len(rows) - len(failed), len(rows))
    return 1 if failed else 0


def check(names: list[str], scratch: Path, *, out: Path | None, lock: Path | None) -> list[dict[str, Any]]:
    """One row for each environment, the pinned one first; written after each."""
    data = scratch / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in sums()), encoding="utf-8")
    rows: list[dict[str, Any]] = []
    for name in (PINNED, *names):
        python = ROOT / ".venv" / "bin" / "python" if name == PINNED else environment(name)
        with locked(lock):
            rows.append(tried(name, python, data, scratch / name, expected=rows[0] if rows else None))
        if out is not None:
            write(rows, out)
        if rows[0]["failed"]:
            break
    return rows


@contextmanager
def locked(file: Path | None) -> Iterator[None]:
    """Waits for the lock of a file, where one is given."""
    if file is None:
        yield
        return
    with file.open("a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        yield


def tried(
    name: str, python: Path, data: Path, run_dir: Path, *, expected: dict[str, Any] | None
) -> dict[str, Any]:
    """The row of one environment, a failure included."""
    row: dict[str, Any] = {"name": name, "versions": versions(python), "failed": None}
    log.info("%s: %s", name, row["versions"])
    started = time.monotonic()
    try:
        row |= smoke(python, data, run_dir, expected=expected)
    except Failed as error:
        row["failed"] = str(error)
    return row | {"seconds": round(time.monotonic() - started)}


def sums() -> list[dict[str, str]]:
    """64 rows of addition."""
    pairs = [(index * 7 % 31, index * 11 % 29) for index in range(64)]
    return [
        {"instruction": f"What is {a} plus {b}?", "response": f"{a} plus {b} is {a + b}."} for a, b in pairs
    ]


def environment(name: str) -> Path:
    """Makes `.venv-compat-NAME` where it is not there, or older than its list. Returns its Python."""
    listed = ROOT / "requirements" / "hashes" / f"compat_{name}.txt"
    folder = ROOT / f".venv-compat-{name}"
    python, stamp = folder / "bin" / "python", folder / ".installed"
    if stamp.is_file() and stamp.stat().st_mtime >= listed.stat().st_mtime:
        return python
    shutil.rmtree(folder, ignore_errors=True)
    log.info("%s: installing %s", name, listed.name)
    pinned = ROOT / ".venv" / "bin" / "python"
    subprocess.run([pinned, "-m", "venv", "--without-pip", folder], check=True)
    site = next(folder.glob("lib/python3*/site-packages"))
    shared = next((ROOT / ".venv").glob("lib/python3*/site-packages"))
    options = ("--quiet", "--disable-pip-version-check", "--no-deps", "--require-hashes")
    subprocess.run([pinned, "-m", "pip", "--python", python, "install", *options, "-r", listed], check=True)
    (site / "pinned.pth").write_text(f"import site; site.addsitedir({str(shared)!r})\n", encoding="utf-8")
    stamp.touch()
    return python


def versions(python: Path) -> dict[str, str]:
    """What this environment says of itself."""
    asked = ("nemo_toolkit", "megatron-core", "torch", "transformers", "numpy", "nvidia-modelopt")
    code = f"import importlib.metadata as m, json; print(json.dumps({{n: m.version(n) for n in {asked!r}}}))"
    return json.loads(subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout)


def smoke(python: Path, data: Path, run_dir: Path, *, expected: dict[str, Any] | None) -> dict[str, Any]:
    """Trains, resumes and exports; compares with the pinned environment's row.

    Raises:
        Failed: a command failed, or a number differs.
    """
    words = (
        *("train", "recipe=tiny_cpu", "objective=asft", "reference=resident", f"data.train=[{data}]"),
        *("parallel.tp_size=2", "parallel.pp_size=2", "run.world_size=4", "data.sequence_length=128"),
        *(
            f"trainer.max_steps={STEPS}",
            "trainer.checkpoint_every=2",
            "trainer.keep=last:2",
            f"run.dir={run_dir}",
        ),
    )
    asft(python, *words)
    metrics = numbers(run_dir)
    latest = run_dir / "checkpoints" / "latest"
    latest.unlink()
    latest.symlink_to("step_2")
    asft(python, *words, "trainer.resume=must")
    if numbers(run_dir) != metrics:
        raise Failed(f"resumed from step 2, the metrics are others: {numbers(run_dir)} instead of {metrics}")
    asft(python, "export", str(latest), str(run_dir / "hf"))
    found = {"metrics": metrics, "weights_sha256": digest(run_dir / "hf")}
    for key, value in found.items():
        if expected is not None and value != expected[key]:
            raise Failed(f"{key} are not the pinned environment's: {value} instead of {expected[key]}")
    return found


def asft(python: Path, *words: str) -> None:
    """Runs a command of the project.

    Raises:
        Failed: it failed; the last lines of what it said.
    """
    try:
        done = subprocess.run(
            [python, "-m", "asft_nemo", *words],
            capture_output=True, text=True, cwd=ROOT, timeout=SECONDS, env={**os.environ, **_RANKS},
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise Failed(f"`asft {words[0]}` took longer than {SECONDS} s") from None
    if done.returncode:
        raise Failed(f"`asft {' '.join(words)}` failed:\n{done.stderr[-3000:]}")


def numbers(run_dir: Path) -> list[dict[str, Any]]:
    """The run's metrics, step by step, without times."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    if [line["step"] for line in lines] != list(range(1, STEPS + 1)):
        raise Failed(f"{run_dir.name} has steps {[line['step'] for line in lines]}")
    return [
        {key: value for key, value in line.items() if not any(part in key for part in _TIMES)}
        for line in lines
    ]


def digest(folder: Path) -> str:
    """SHA-256 over the names, dtypes, shapes and bytes of all exported tensors."""
    import hashlib

    from safetensors import safe_open

    seen = hashlib.sha256()
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        for name in sorted(file.keys()):
            tensor = file.get_tensor(name)
            seen.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            seen.update(tensor.contiguous().flatten().view(dtype=_bytes()).numpy().tobytes())
    return seen.hexdigest()


def _bytes() -> Any:
    import torch

    return torch.uint8


def write(rows: list[dict[str, Any]], out: Path) -> None:
    """compat.json, and compat.md for people."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], check=True, capture_output=True, text=True, cwd=ROOT
    ).stdout.strip()
    when = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    value = {"date": when, "commit": commit, "python": sys.version.split()[0], "environments": rows}
    out.mkdir(parents=True, exist_ok=True)
    (out / "compat.json").write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    lines = [
        "# NeMo and Megatron-core",
        "",
        f"{when}, commit {commit}, `make test-compat`: the tiny model, objective asft, resident reference, fp32, TP2 x PP2 on four CPU ranks, {STEPS} steps, "
        "set back to step 2 and resumed, exported. All metrics but times and all exported weights equal the pinned environment's to the bit.",
        "",
        "| NeMo | Megatron-core | torch | transformers | loss, steps 1 to 4 | seconds | |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        v = row["versions"]
        losses = ", ".join(f"{line['loss']:.10g}" for line in row.get("metrics", []))
        verdict = f"FAILED: {row['failed'].splitlines()[0]}" if row["failed"] else "same"
        lines.append(
            f"| {v['nemo_toolkit']} | {v['megatron-core']} | {v['torch']} | {v['transformers']} | {losses} | {row['seconds']} | "
            f"{'pinned' if row['name'] == PINNED and not row['failed'] else verdict} |"
        )
    (out / "compat.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())

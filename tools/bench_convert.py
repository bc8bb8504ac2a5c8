"""Time and memory of importing and exporting a checkpoint, against copying the same bytes, in one run.

    python tools/bench_convert.py --out runs/bench_convert                 a small model, seconds
    python tools/bench_convert.py --shape 7b --layers 14 28 --scratch /big/disk --out benchmarks/results --name cpu_convert

Writes a random bf16 checkpoint of the shape into `--scratch` (three times its size must be free there), then runs `asft import`, `asft
export` and `cp --reflink=never` with `sync`, each as a process of its own, cold (the source's pages dropped from the page cache) and warm
(the source read just before, as far as it fits in memory). Seconds are wall clock from start to exit, Python's start included; memory is
the process's resident high-water mark (wait4). Everything in `--scratch` is removed. Writes `<name>.json` and `<name>.md` into `--out`.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

log = logging.getLogger("bench_convert")

_COMMON = {
    "model_type": "qwen2",
    "architectures": ["Qwen2ForCausalLM"],
    "torch_dtype": "bfloat16",
    "rms_norm_eps": 1e-6,
}
#: config.json of each shape without its number of layers
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 512,
        "intermediate_size": 2048,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "vocab_size": 32000,
    },
    "7b": {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
    },
    "32b": {
        "hidden_size": 5120,
        "intermediate_size": 27648,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
        "vocab_size": 152064,
    },
    "72b": {
        "hidden_size": 8192,
        "intermediate_size": 29568,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "vocab_size": 152064,
    },
}
_SHARD_BYTES = 4_000_000_000


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=list(SHAPES), default="tiny")
    parser.add_argument(
        "--layers", type=int, nargs="+", default=[4, 8], help="several are measured one after another"
    )
    parser.add_argument(
        "--scratch",
        type=Path,
        help="folder on the disk that is measured; the system's temporary one by default",
    )
    parser.add_argument("--name", default="bench_convert")
    parser.add_argument("--out", type=Path, required=True)
    return parser


def make_checkpoint(folder: Path, shape: str, layers: int) -> int:
    """Writes a random checkpoint in shards of 4 GB; returns its bytes."""
    import torch

    from asft_nemo.checkpoint.families import hf_tensors
    from asft_nemo.checkpoint.safetensors_io import header_bytes, index_text, plan_shards
    from asft_nemo.model import read_model_spec

    folder.mkdir(parents=True)
    config = {
        **_COMMON,
        **SHAPES[shape],
        "num_hidden_layers": layers,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {tensor.name: tensor.shape for tensor in hf_tensors(read_model_spec(folder))}
    sizes = {name: 2 * torch.Size(size).numel() for name, size in tensors.items()}
    shards = plan_shards(sizes, _SHARD_BYTES)
    noise = memoryview(os.urandom(1 << 26))
    for file, names in shards.items():
        with (folder / file).open("wb") as stream:
            stream.write(header_bytes({name: (torch.bfloat16, tensors[name]) for name in names}))
            for name in names:
                left = sizes[name]
                while left:
                    left -= stream.write(noise[: min(left, len(noise))])
            stream.flush()
            os.fsync(stream.fileno())
    if len(shards) > 1:
        (folder / "model.safetensors.index.json").write_text(index_text(shards, sum(sizes.values())))
    return sum(sizes.values())


def drop_from_cache(folder: Path) -> None:
    """Lets the kernel forget the pages of all files below a folder."""
    for file in folder.rglob("*"):
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def read_all(folder: Path) -> None:
    """Reads all files below a folder into the page cache."""
    for file in folder.rglob("*"):
        if file.is_file():
            with file.open("rb", buffering=0) as stream:
                while stream.read(1 << 26):
                    pass


def run(command: list[str]) -> dict[str, float]:
    """Runs a command; returns seconds and peak resident bytes of the process itself.

    Raises:
        RuntimeError: it failed.
    """
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} failed with exit code {process.returncode}")
    return {"seconds": seconds, "peak_rss_bytes": usage.ru_maxrss * 1024}


def measure(scratch: Path, shape: str, layers: int) -> dict[str, Any]:
    """Everything about one size."""
    source, imported, target = scratch / "hf", scratch / "nemo", scratch / "target"
    nbytes = make_checkpoint(source, shape, layers)
    log.info("%s with %d layers: %.2f GB", shape, layers, nbytes / 1e9)
    asft = [sys.executable, "-m", "asft_nemo"]
    copy = 'cp -r --reflink=never "$1" "$2" && find "$2" -type f -exec sync {} +'
    found: dict[str, Any] = {"bytes": nbytes}
    prepare: dict[str, Callable[[Path], None]] = {"cold": drop_from_cache, "warm": read_all}
    for direction, start in (("import", source), ("export", imported)):
        for state, ready in prepare.items():
            for name, command in (
                ("cp", ["sh", "-c", copy, "sh", str(start), str(target)]),
                (direction, [*asft, direction, str(start), str(target)]),
            ):
                ready(start)
                found[f"{direction} {state} {name}"] = result = run(command)
                log.info(
                    "%s, %s: %s %.1f s, %.0f MiB",
                    direction,
                    state,
                    name,
                    result["seconds"],
                    result["peak_rss_bytes"] / 2**20,
                )
                if direction == "import" and state == "warm" and name == "import":
                    target.rename(imported)
                else:
                    shutil.rmtree(target)
    shutil.rmtree(source)
    shutil.rmtree(imported)
    return found


def table(results: dict[int, dict[str, Any]]) -> str:
    """The results as Markdown."""
    lines = [
        "| layers, GB | | seconds | cp + sync | ratio | peak RSS, MiB |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for layers, found in results.items():
        for direction in ("import", "export"):
            for state in ("cold", "warm"):
                own, copy = found[f"{direction} {state} {direction}"], found[f"{direction} {state} cp"]
                lines.append(
                    f"| {layers}, {found['bytes'] / 1e9:.2f} | {direction}, {state} | {own['seconds']:.1f} | {copy['seconds']:.1f} | "
                    f"{own['seconds'] / copy['seconds']:.2f} | {own['peak_rss_bytes'] / 2**20:.0f} |"
                )
    return "\n".join(lines) + "\n"


def main(arguments: list[str]) -> int:
    """Measures and writes."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    from asft_nemo.run_dir import versions

    options.out.mkdir(parents=True, exist_ok=True)
    if options.scratch is not None:
        options.scratch.mkdir(parents=True, exist_ok=True)
    results: dict[int, dict[str, Any]] = {}
    for layers in options.layers:
        with tempfile.TemporaryDirectory(prefix="asft-bench-", dir=options.scratch) as scratch:
            results[layers] = measure(Path(scratch), options.shape, layers)
    record = {
        "date": date.today().isoformat(),
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "python": platform.python_version(),
        },
        "versions": versions(),
        "shape": {options.shape: SHAPES[options.shape]},
        "results": results,
    }
    (options.out / f"{options.name}.json").write_text(json.dumps(record, indent=2) + "\n")
    text = table(results)
    (options.out / f"{options.name}.md").write_text(text)
    log.info("%s", text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

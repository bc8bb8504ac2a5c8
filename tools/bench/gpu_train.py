"""What one rank does for the parts that train: a run of `asft train`'s own parts, timed step by step, that writes no checkpoint."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import statistics
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from bench.gpu_clock import Stopwatch
from bench.gpu_rank import at


def train_form(settings: list[str], *, warm_up: int, watch_copies: bool) -> dict[str, Any] | None:
    """Trains with these settings; called on every rank, the one that writes metrics.jsonl returns what it found.

    Args:
        settings: overrides of `asft train`; `trainer.max_steps` counts the warm-up.
        warm_up: first steps that are left out.
        watch_copies: also time the copies of an offloaded reference to the device.

    Returns:
        `seconds`, by CUDA's events, and `reference_seconds` of each step that counts; `operations` of such a step, by the planner's
        formula; `learned_share` of its tokens; `peak_bytes` of torch's allocator, all steps; `reference_host_bytes`; `copy_seconds`;
        `losses`.
    """
    from asft_nemo.config.load import compose
    from asft_nemo.cpu import backend

    run = compose(settings)
    backend.install()
    from asft_nemo.data import prepare
    from asft_nemo.logs import quiet_upstream
    from asft_nemo.model import read_model_spec
    from asft_nemo.nemo.build import build
    from asft_nemo.nemo.callbacks import is_writer
    from asft_nemo.nemo.checkpoints import CheckpointCallback
    from asft_nemo.run_dir import base_checkpoint, hf_dir, open_run_dir

    quiet_upstream()
    device = "cpu" if backend.active() else "cuda"
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        torch.cuda.reset_peak_memory_stats()
    at("preparing")
    data = prepare(run, tokenizer_dir=hf_dir(run))
    base_dir = base_checkpoint(run)
    if os.environ["RANK"] == "0":
        open_run_dir(run, data_fingerprint=data.fingerprint).release()
    spec = read_model_spec(base_dir / "context" / "hf")
    parts = build(run, spec=spec, base_dir=base_dir, data=data, resume=None)
    watch = Stopwatch(device)
    trainer: Any = parts.trainer
    kept = [one for one in trainer.callbacks if not isinstance(one, CheckpointCallback)]
    trainer.callbacks = [_timer(watch), *kept]
    with _watched_copies() if watch_copies else contextlib.nullcontext([]) as copies:
        trainer.fit(parts.model, datamodule=parts.data)
    if not is_writer():
        return None
    found = read_metrics(Path(run.run.dir), warm_up=warm_up, world_size=run.run.world_size)
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else None
    rows = run.trainer.global_batch_size * run.data.sequence_length
    summary = json.loads((Path(run.run.dir) / "summary.json").read_text())
    return {
        **found,
        "seconds": watch.seconds()[warm_up:],
        "learned_share": found["tokens"] / rows,
        "peak_bytes": peak,
        "reference_host_bytes": summary["reference_host_bytes"],
        # the events of CPU ranks measure nothing
        "copy_seconds": [one() for one in copies][warm_up:] if device == "cuda" else [],
    }


def read_metrics(run_dir: Path, *, warm_up: int, world_size: int) -> dict[str, Any]:
    """What metrics.jsonl says of the steps after the warm-up; operations are its operations a second times its seconds."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    counted = lines[warm_up:]
    operations = [
        1e12 * world_size * line["seconds"] * (line["tflops_per_gpu"] + line["reference_tflops_per_gpu"])
        for line in counted
    ]
    return {
        "operations": statistics.mean(operations),
        "tokens": statistics.mean(line["tokens"] for line in counted),
        "reference_seconds": [line["reference_seconds"] for line in counted],
        "mfu": statistics.median(line["mfu"] for line in counted) if counted[0]["mfu"] is not None else None,
        "losses": [line["loss"] for line in lines],
        "first_kl": lines[0]["kl"],
    }


def _timer(watch: Stopwatch) -> Any:
    """A callback with a lap for each step, from its first micro batch to the end of its update. It stands before all others: what they
    do at a step's end is in no lap.
    """
    from lightning.pytorch import Callback

    class Timer(Callback):
        def on_train_batch_start(self, trainer: Any, *rest: Any) -> None:
            at(f"step {trainer.global_step + 1}")
            watch.start()

        def on_train_batch_end(self, *rest: Any) -> None:
            watch.stop()

    return Timer()


@contextlib.contextmanager
def _watched_copies() -> Iterator[list[Any]]:
    """A call for each prepass of an offloaded reference that tells the seconds from its first copy to its last."""
    spans: list[Any] = []
    from asft_nemo.reference import offloaded

    hidden, send = offloaded.OffloadedReference.hidden, offloaded._Parked.send
    events: list[Any] = []

    def seen_send(self: Any, stream: Any) -> None:
        pair = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        pair[0].record(stream)
        send(self, stream)
        pair[1].record(stream)
        events.append(pair)

    def seen_hidden(self: Any, *args: Any, **given: Any) -> Any:
        events.clear()
        found = hidden(self, *args, **given)
        first, last = events[0][0], events[-1][1]
        spans.append(lambda: first.elapsed_time(last) / 1000)
        return found

    offloaded._Parked.send, offloaded.OffloadedReference.hidden = seen_send, seen_hidden
    try:
        yield spans
    finally:
        offloaded._Parked.send, offloaded.OffloadedReference.hidden = send, hidden


def write_cache(settings: list[str]) -> None:
    """The hidden-state cache of a run that reads one; called on every rank."""
    from asft_nemo.config.load import compose
    from asft_nemo.train import cache_reference

    at("writing the cache")
    cache_reference(compose(settings), repair=False)


def write_model(folder: str, *, config: dict[str, Any], shard_bytes: int) -> int:
    """A random Qwen2 with the shipped base's tokenizer at `folder`/model/nemo, in bf16; the weights it came from are not kept.

    Numbers are drawn once for 16 million places and used again and again: drawing 7 billion would take longer than training on them.

    Returns:
        Parameters.
    """
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from asft_nemo.checkpoint.convert import import_hf
    from asft_nemo.config.paths import project_dir

    at("drawing weights")
    hf = Path(folder) / "model" / "hf"
    shutil.copytree(
        project_dir() / "assets" / "tiny-base", hf, ignore=shutil.ignore_patterns("*.safetensors", "*.md")
    )
    shape = Qwen2Config(**{key: value for key, value in config.items() if key != "architectures"})
    shape.save_pretrained(hf)
    written = json.loads((hf / "config.json").read_text())
    (hf / "config.json").write_text(json.dumps({**written, "architectures": ["Qwen2ForCausalLM"]}, indent=1))
    with torch.device("meta"):
        sizes = {name: p.shape for name, p in Qwen2ForCausalLM(shape).named_parameters()}
    _write_shards(hf, sizes, shard_bytes)
    at("importing")
    import_hf(hf, Path(folder) / "model" / "nemo")
    for file in hf.glob("*.safetensors"):
        file.unlink()
    return sum(size.numel() for size in sizes.values())


def _write_shards(folder: Path, sizes: dict[str, torch.Size], shard_bytes: int) -> None:
    from safetensors.torch import save_file

    drawn = torch.randn(2**24, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()

    def numbers(name: str, size: torch.Size) -> torch.Tensor:
        if "norm" in name:
            return torch.ones(size, dtype=torch.bfloat16)
        start = zlib.crc32(name.encode()) % len(drawn)  # the same in every process
        count = size.numel()
        return drawn.roll(-start).repeat(-(-count // len(drawn)))[:count].view(size).clone()

    shards: list[list[str]] = [[]]
    held = 0
    for name, size in sizes.items():
        if held and held + 2 * size.numel() > shard_bytes:
            shards.append([])
            held = 0
        shards[-1].append(name)
        held += 2 * size.numel()
    index: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file({name: numbers(name, sizes[name]) for name in names}, folder / file, {"format": "pt"})
        index |= dict.fromkeys(names, file)
    total = 2 * sum(size.numel() for size in sizes.values())
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": index})
    )

"""The table of what may happen to which file, and what is done next.

A damage that cannot be noticed in principle is not in it: another number in a file that nobody keeps a checksum of (the user's own
weights before they are imported, adapters in PEFT's form, free text).
"""

from __future__ import annotations

from dataclasses import dataclass

from faults.yard import STEPS

GONE = ("emptied", "missing", "directory", "unreadable")
CUT = ("truncated", "tail_cut", "grown")
ROT = ("flipped", "zeroed")
LORA = "launched/checkpoints/step_1"


@dataclass(frozen=True)
class Target:
    """A file of an artefact, what may happen to it, and what is done next.

    Attributes:
        artefact: how the table calls it.
        file: in the yard; one that a `*` stands for is drawn.
        damages: names of `damage.BY_NAME`.
        checks: names of `CHECKS`.
        twin: another run's file of the same kind, for `swapped`.
        times: how often each is done, at another place each time.
    """

    artefact: str
    file: str
    damages: tuple[str, ...]
    checks: tuple[str, ...]
    twin: str = ""
    times: int = 1


def _checkpoint(artefact: str, root: str, other: str, checks: tuple[str, ...]) -> list[Target]:
    """The files of a checkpoint in NeMo form."""
    whole = (*CUT, *GONE, *ROT)
    small = checks[:1]
    return [
        Target(artefact, f"{root}/weights/__0_*.distcp", ("flipped",), checks[:1], times=3),
        Target(artefact, f"{root}/weights/__0_1.distcp", whole, checks[:1]),
        Target(artefact, f"{root}/weights/__0_1.distcp", ("missing", "truncated"), checks[1:]),
        Target(
            artefact, f"{root}/weights/__0_0.distcp", ("swapped",), small, f"{other}/weights/__0_0.distcp"
        ),
        Target(artefact, f"{root}/weights/.metadata", whole, checks[:1]),
        Target(artefact, f"{root}/weights/.metadata", ("flipped",), checks, times=3),
        Target(artefact, f"{root}/weights/.metadata", ("swapped",), checks, f"{other}/weights/.metadata"),
        Target(artefact, f"{root}/weights/common.pt", ("truncated", "flipped", "missing", "emptied"), checks),
        Target(artefact, f"{root}/weights/metadata.json", ("wrong_version", "truncated", "missing"), small),
        Target(
            artefact,
            f"{root}/context/asft.json",
            ("truncated", "wrong_version", "flipped", "no_json_object"),
            small,
        ),
        Target(
            artefact,
            f"{root}/context/hf/config.json",
            ("truncated", "flipped", *GONE, "no_json_object"),
            checks,
        ),
        Target(artefact, f"{root}/context/hf/tokenizer.json", ("flipped", "truncated", "missing"), small),
    ]


TARGETS: tuple[Target, ...] = (
    Target("weights of Hugging Face", "hf/model.safetensors", (*CUT, *GONE), ("import", "eval")),
    Target("weights of Hugging Face", "hf/model.safetensors", ROT, ("verify",), times=2),
    Target(
        "weights of Hugging Face", "hf/model.safetensors", ("truncated", "missing"), ("verify", "import_once")
    ),
    Target(
        "index of shards",
        "exported/model.safetensors.index.json",
        ("truncated", "tail_cut", *GONE, "no_json_object"),
        ("import_shards", "eval_export"),
    ),
    Target(
        "index of shards", "exported/model.safetensors.index.json", ("flipped",), ("import_shards",), times=3
    ),
    Target("export", "exported/model-0000*.safetensors", (*CUT, *GONE), ("import_shards",)),
    Target("export", "exported/model-0000*.safetensors", ROT, ("verify_export",), times=2),
    Target("export", "exported/model-0000*.safetensors", ("missing", "truncated"), ("eval_export",)),
    Target(
        "export",
        "exported/model-00001-of-00003.safetensors",
        ("swapped",),
        ("verify_export",),
        "exported_other/model-00001-of-00003.safetensors",
    ),
    Target(
        "model's config",
        "hf/config.json",
        ("truncated", *GONE, "no_json_object"),
        ("import", "eval", "data_check", "resume"),
    ),
    Target(
        "tokenizer",
        "hf/tokenizer.json",
        ("truncated", *GONE, "no_json_object", "flipped"),
        ("read_data", "resume"),
    ),
    Target(
        "tokenizer", "hf/tokenizer.json", ("truncated", "missing", "no_json_object"), ("eval", "data_check")
    ),
    Target(
        "tokenizer",
        "hf/tokenizer_config.json",
        ("truncated", "missing", "directory"),
        ("read_data",),
    ),
    Target("tokenizer", "hf/tokenizer_config.json", ("truncated",), ("eval",)),  # a model may have none
    *_checkpoint("converted base", "nemo", f"run/checkpoints/step_{STEPS}", ("export_base", "inspect_base")),
    *_checkpoint(
        "training checkpoint",
        f"run/checkpoints/step_{STEPS}",
        f"run/checkpoints/step_{STEPS - 1}",
        ("export", "inspect_run", "resume"),
    ),
    Target(
        "run.json",
        "run/run.json",
        ("truncated", "emptied", "missing", "directory", "unreadable", "no_json_object"),
        ("resume", "report"),
    ),
    Target("run.json", "run/run.json", ("truncated", "no_json_object"), ("inspect_run",)),
    Target(
        "metrics.jsonl", "run/metrics.jsonl", ("emptied", "missing", "directory", "unreadable"), ("report",)
    ),
    Target("metrics.jsonl", "run/metrics.jsonl", ("line_broken",), ("report",), times=2),
    Target("alarms.jsonl", "run/alarms.jsonl", ("directory", "unreadable"), ("report",)),
    Target("starts.jsonl", "run/starts.jsonl", ("directory", "unreadable", "no_json_object"), ("report",)),
    Target(
        "prepared data",
        "prepared/manifest.json",
        ("truncated", *GONE, "no_json_object", "wrong_version"),
        ("read_data", "resume"),
    ),
    Target(
        "prepared data",
        "prepared/manifest.json",
        ("truncated", "missing", "wrong_version"),
        ("prepare_again",),
    ),
    Target(
        "prepared data",
        "prepared/manifest.json",
        ("swapped",),
        ("read_data", "resume"),
        "prepared_other/manifest.json",
    ),
    Target(
        "prepared data",
        "prepared/parts/*/part.json",
        ("truncated", "flipped", *GONE, "no_json_object"),
        ("read_data", "prepare_again"),
    ),
    Target(
        "prepared data", "prepared/parts/*/tokens.bin", (*CUT, *GONE, *ROT), ("read_data", "prepare_again")
    ),
    Target("prepared data", "prepared/parts/*/index.bin", (*CUT, *GONE, *ROT), ("read_data",)),
    Target("prepared data", "prepared/parts/*/spans.bin", (*CUT, *GONE, *ROT), ("read_data",)),
    Target(
        "reference cache",
        "cache/manifest.json",
        (*CUT, *GONE, "flipped", "no_json_object", "wrong_version"),
        ("read_cache",),
    ),
    Target("reference cache", "cache/rows-*.safetensors", (*CUT, *GONE, "zeroed"), ("read_cache",), times=2),
    Target("reference cache", "cache/rows-*.safetensors", ("flipped",), ("read_cache",), times=6),
    Target(
        "results.json",
        "results/results.json",
        ("truncated", "tail_cut", *GONE, "no_json_object", "wrong_version"),
        ("compare",),
    ),
    Target(
        "results.json",
        "results/results.json",
        ("truncated", "missing", "emptied", "no_json_object"),
        ("eval_again",),
    ),
    Target(
        "samples.jsonl",
        "results/samples.jsonl",
        ("truncated", *GONE, "no_json_object", "line_broken", "swapped"),
        ("compare",),
        "results_other/samples.jsonl",
    ),
    Target(
        "samples.jsonl",
        "results/samples.jsonl",
        ("truncated", "missing", "emptied", "no_json_object"),
        ("eval_again",),
    ),
)


TARGETS += (
    Target(
        "launch record",
        "launched/launch.json",
        ("truncated", "tail_cut", *GONE, "no_json_object", "wrong_version"),
        ("status", "logs"),
    ),
    Target(
        "launch record",
        "launched/launch/settings.json",
        ("truncated", *GONE, "no_json_object"),
        ("settings",),
    ),
    Target(
        "log of a launch",
        "launched/launch/experiments/asft/*/prepare/nemo_run/*/prepare/0/combined.log",
        ("missing", "directory", "unreadable"),
        ("logs",),
    ),
    Target("exported adapters", "adapter/adapter_model.safetensors", (*CUT, *GONE), ("start_adapters",)),
    Target(
        "exported adapters",
        "adapter/adapter_config.json",
        ("truncated", "tail_cut", *GONE, "no_json_object"),
        ("start_adapters",),
    ),
    Target("trained adapters", f"{LORA}/weights/__0_0.distcp", (*CUT, *GONE, *ROT), ("export_adapters",)),
    Target("trained adapters", f"{LORA}/weights/.metadata", ("flipped", "missing"), ("export_adapters",)),
    Target(
        "trained adapters",
        f"{LORA}/context/adapter.json",
        ("truncated", "flipped", *GONE, "no_json_object"),
        ("export_adapters",),
    ),
    Target("imported adapters", "more/adapter/weights/*.distcp", (*CUT, *GONE, *ROT), ("read_adapters",)),
    Target(
        "imported adapters",
        "more/adapter/context/adapter.json",
        ("truncated", "flipped", *GONE, "no_json_object"),
        ("read_adapters",),
    ),
    Target(
        "imported adapters",
        "more/adapter/weights/.metadata",
        ("truncated", "flipped", "missing"),
        ("read_adapters",),
    ),
)

"""What benchmarks of whole training runs share: the forms of the reference, a random model, examples, settings."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Form:
    """One way to train.

    Attributes:
        title: in the table.
        settings: overrides of `asft train`.
        against: the form without a reference that it is compared with; itself for those.
        law: of its step time over the other's, at PP1 and a head without weight; None where the form is the measure itself.
        head: what is added to `law` for each part that the head has of all products of the forward pass.
    """

    title: str
    settings: tuple[str, ...]
    against: str
    law: float | None = None
    head: float = 0.0

    def law_at(self, head_share: float) -> float | None:
        """The law where the head is `head_share` of the forward pass's products."""
        return None if self.law is None else self.law + self.head * head_share


_ASFT = ("objective=asft",)
_LORA = ("peft=lora", "optim.lr=5e-4")
FORMS = {
    "sft": Form("sft", ("objective=sft",), "sft"),
    "resident": Form("asft, resident", (*_ASFT, "reference=resident"), "sft", 4 / 3),
    "offloaded": Form("asft, offloaded", (*_ASFT, "reference=offloaded"), "sft", 4 / 3),
    "cached": Form("asft, cached", (*_ASFT, "reference=cached"), "sft", 1.0, head=1 / 3),
    "lora_sft": Form("LoRA sft", ("objective=sft", *_LORA), "lora_sft"),
    "lora_adapter_disabled": Form(
        "LoRA asft, adapters disabled", (*_ASFT, *_LORA, "reference=adapter_disabled"), "lora_sft", 3 / 2
    ),
}


def head_share(*, hidden: int, layers: int, vocab: int = 512) -> float:
    """The head's part of the products of `make_model`'s forward pass, attention's own left out."""
    head, body = vocab * hidden, layers * 16 * hidden**2
    return head / (head + body)


# Qwen2.5-1.5B's config.json, published on Hugging Face
QWEN25_1P5B: dict[str, Any] = {
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
}


def make_model(folder: Path, *, hidden: int, layers: int, published: Mapping[str, Any] | None = None) -> Path:
    """A random Qwen2 with the shipped base's tokenizer, in NeMo form: 16 H^2 weights a layer, or the `published` sizes."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from asft_nemo.checkpoint.convert import import_hf
    from asft_nemo.config.paths import project_dir

    tokenizer = project_dir() / "assets" / "tiny-base"
    shutil.copytree(tokenizer, folder / "hf", ignore=shutil.ignore_patterns("*.safetensors", "*.md"))
    torch.manual_seed(0)
    sizes = {
        "vocab_size": json.loads((tokenizer / "config.json").read_text())["vocab_size"],
        "hidden_size": hidden,
        "intermediate_size": 4 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": hidden // 64,
        "tie_word_embeddings": False,
        **(published or {}),
    }
    config = Qwen2Config(max_position_embeddings=4096, **sizes)
    Qwen2ForCausalLM(config).save_pretrained(folder / "hf")
    import_hf(folder / "hf", folder / "nemo")
    return folder / "nemo"


def make_data(file: Path, *, examples: int, sequence_length: int, prompt: int = 1) -> Path:
    """Examples that fill the sequence: random letters, whose loss no training brings to nothing.

    Args:
        file: is written.
        examples: how many.
        sequence_length: tokens.
        prompt: letters, at least 1, that are not learned, ahead of those that are; a token is a letter or little more.
    """
    lines = []
    for n in range(examples):
        letters = random.Random(n).choices("abcdefgh ", k=4 * sequence_length)
        asked = "a" + "".join(random.Random(-1 - n).choices("abcdefgh ", k=prompt - 1))
        lines.append(json.dumps({"instruction": asked, "response": f"{n:04d}" + "".join(letters)}))
    file.write_text("\n".join(lines) + "\n")
    return file


def run_settings(
    form: Form,
    *,
    folder: Path,
    run_dir: Path,
    sequence_length: int,
    micro_batch_size: int,
    global_batch_size: int,
    steps: int,
) -> list[str]:
    """Overrides of one run.

    Args:
        form: a row of `FORMS`, or one like it.
        folder: holds `model/nemo` and `train.jsonl`; the cache is made there.
        run_dir: where the run writes.
        sequence_length: tokens.
        micro_batch_size, global_batch_size: examples.
        steps: of the run.
    """
    given = [
        "recipe=tiny_cpu",  # names no model of its own size: everything that matters here is given
        *form.settings,
        f"model.path={folder / 'model' / 'nemo'}",
        f"data.train=[{folder / 'train.jsonl'}]",
        "data.template=raw",
        "data.on_too_long=truncate",
        f"data.sequence_length={sequence_length}",
        f"trainer.micro_batch_size={micro_batch_size}",
        f"trainer.global_batch_size={global_batch_size}",
        f"trainer.max_steps={steps}",
        f"run.dir={run_dir}",
    ]
    cached = "reference=cached" in form.settings
    return [*given, f"reference.cache_dir={folder / 'cache'}"] if cached else given

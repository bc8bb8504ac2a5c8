"""Small random Qwen2 models and the single-process fp64 computation that every layout is compared with."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import torch
from jobs import VOCAB, RandomTokens
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from asft_nemo.config.paths import project_dir
from asft_nemo.losses import dense_loss
from asft_nemo.objectives import Objective


def make_model(
    folder: Path,
    *,
    tied: bool,
    seed: int = 0,
    vocab_size: int = VOCAB,
    hidden_size: int = 64,
    num_layers: int = 4,
    num_heads: int = 4,
    num_groups: int = 2,
) -> Path:
    """Saves a random Qwen2 with distinguishable biases and norms in fp32; returns its folder."""
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=128,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_groups,
        max_position_embeddings=128,
        tie_word_embeddings=tied,
        initializer_range=0.1,
        rms_norm_eps=1e-6,
    )
    model = Qwen2ForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "norm" in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return folder


def make_model_with_tokenizer(
    folder: Path, *, seed: int = 0, more_vocab: int = 0, hidden_size: int = 64
) -> Path:
    """The same with the tokenizer of the shipped base, for runs that read text."""
    shipped = project_dir() / "assets" / "tiny-base"
    vocab_size = json.loads((shipped / "config.json").read_text())["vocab_size"]
    make_model(folder, tied=False, seed=seed, vocab_size=vocab_size + more_vocab, hidden_size=hidden_size)
    for file in shipped.glob("*token*"):
        shutil.copy(file, folder)
    return folder


def load64(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager")


def oracle_gradients(
    folder: Path,
    objective: Objective,
    batches: list[list[int]],
    data: RandomTokens,
    *,
    ref: Path | None = None,
    old: Path | None = None,
) -> tuple[dict[str, Tensor], float]:
    """Gradients of every parameter in fp64 by autograd through `dense_loss`, and the loss.

    Args:
        folder: Hugging Face directory of the policy.
        objective: what is differentiated.
        batches: indices of the global batch, in any split: sums and counts are added up and divided once.
        data: where the examples come from.
        ref: Hugging Face directory of the reference.
        old: of the policy's snapshot.
    """
    model = load64(folder)
    frozen = {name: load64(path) for name, path in (("ref", ref), ("old", old)) if path is not None}
    total, count = torch.zeros((), dtype=torch.float64), 0
    for indices in batches:
        items = [data[index] for index in indices]
        stacked = {key: torch.stack([item[key] for item in items]) for key in items[0]}
        logits = model(input_ids=stacked["tokens"]).logits.flatten(0, 1)
        labels = stacked["labels"].flatten()
        with torch.no_grad():
            frozen_logits = {
                name: other(input_ids=stacked["tokens"]).logits.flatten(0, 1)
                for name, other in frozen.items()
            }
        label_logprobs = {
            name: logits.log_softmax(-1).gather(1, labels[:, None]).squeeze(1)
            for name, logits in frozen_logits.items()
        }
        sequences = torch.arange(len(items))[:, None].expand_as(stacked["labels"]).flatten()
        output = dense_loss(
            logits,
            labels,
            stacked["loss_mask"].flatten(),
            objective=objective,
            ref_logits_TV=frozen_logits.get("ref"),
            ref_logprob_T=label_logprobs.get("ref"),
            old_logprob_T=label_logprobs.get("old"),
            segment_ids_T=sequences,
        )
        total, count = total + output.loss_sum, count + int(output.num_tokens)
    loss = total / count
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, float(loss.detach())


def worst_error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> tuple[float, str]:
    """The largest difference over all parameters, relative to the largest gradient entry of all, and where it is."""
    assert set(found) == set(expected), set(found) ^ set(expected)
    scale = max(float(value.abs().max()) for value in expected.values())
    errors = {name: float((found[name].double() - expected[name]).abs().max()) / scale for name in expected}
    assert all(math.isfinite(error) for error in errors.values()), errors
    name = max(errors, key=errors.__getitem__)
    return errors[name], name


def read_hf(folder: Path) -> dict[str, Any]:
    """All tensors of a Hugging Face directory."""
    from safetensors.torch import load_file

    tensors: dict[str, Any] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors.update(load_file(file))
    return tensors

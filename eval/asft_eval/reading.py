"""What one or two models make of given text: figures of every scored token over the full vocabulary, in bounded memory.

The models are run one after the other, so that only one is loaded: of the reference its final hidden states at the scored tokens are
kept in host memory (in fp32 4 bytes a hidden number: 1.6 GB for 100,000 tokens of a 7B model) and its head. Logits exist for a block of
tokens at a time, are computed in fp32 whatever the weights' dtype, and everything about them in fp64: a KL is a difference of nearly
equal numbers, and two copies of one checkpoint give exactly 0.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from asft_eval.backends.hf import load_model, right_padded
from asft_eval.backends.memory import memory_for
from asft_eval.backends.placement import stored_dtype
from asft_eval.backends.tokens import not_numbers
from asft_eval.divergence import entropies, token_kls
from asft_eval.errors import EvaluationError
from asft_eval.resampling import Floats

_LOGITS_AT_ONCE = 2**25
"""Numbers in a block of logits: 256 MiB in fp64."""

Encoded = tuple[list[int], int]
"""Token ids, and how many of them are the prompt's."""

_MODEL = ("nll", "entropy", "label_probability", "confidence", "hit")
_NAMES = (*_MODEL, *(f"base_{name}" for name in _MODEL), "forward_kl", "reverse_kl")


@dataclass(frozen=True, slots=True)
class Tokens:
    """Figures of every scored token.

    Attributes:
        text: which text each token is of, `[N]`.
        figures: name -> `[N]`: nll, entropy (nats), label_probability (of the text's token), confidence (probability of the most probable token),
            hit (1 where that is the text's), each of these of the base as base_NAME, forward_kl = KL(ref||policy), reverse_kl. Without a base those
            of the base and the KLs are missing.
    """

    text: NDArray[np.int64]
    figures: dict[str, Floats]

    def by_text(self, name: str) -> Floats:
        """Sums over each text's tokens, `[texts]`."""
        return np.bincount(self.text, weights=self.figures[name]).astype(np.float64)

    def counts(self) -> Floats:
        """Tokens of each text, `[texts]`."""
        return np.bincount(self.text).astype(np.float64)


@dataclass(frozen=True, slots=True)
class Head:
    """What makes logits of final hidden states: weights `[V, H]`, and a bias `[V]` where there is one."""

    weight: torch.Tensor
    bias: torch.Tensor | None

    @classmethod
    def of(cls, model: Any) -> Head:
        """A loaded model's."""
        module = model.get_output_embeddings()
        return cls(module.weight, getattr(module, "bias", None))

    def to(self, device: torch.device | str) -> Head:
        """The same on another device."""
        return Head(self.weight.to(device), None if self.bias is None else self.bias.to(device))

    def logits(self, hidden_TH: torch.Tensor) -> torch.Tensor:
        """Logits `[T, V]` in fp32, in fp64 where the weights are: a logit of 20 has steps of 1/8 in bf16."""
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        hidden_TH = hidden_TH.to(self.weight.device, wide)
        if self.weight.dtype == wide:
            return functional.linear(hidden_TH, self.weight, self.bias)
        rows = max(1, _LOGITS_AT_ONCE // self.weight.shape[1])  # a wide copy of all rows may be 5 GB
        parts: list[torch.Tensor] = []
        for start in range(0, self.weight.shape[0], rows):
            place = slice(start, start + rows)
            bias = None if self.bias is None else self.bias[place].to(wide)
            parts.append(functional.linear(hidden_TH, self.weight[place].to(wide), bias))
        return torch.cat(parts, dim=-1)


def reading_dtype(model_dir: Path) -> torch.dtype:
    """What a model and its base are read in: fp32 on a CPU, on GPUs the dtype that the model is stored in, which is that it is run in."""
    return getattr(torch, stored_dtype(model_dir)) if torch.cuda.is_available() else torch.float32


@torch.inference_mode()
@memory_for("to read held-out text")
def read_texts(
    policy_dir: Path | str,
    ref_dir: Path | str | None,
    encoded: Sequence[Encoded],
    *,
    pad_id: int,
    batch_size: int,
    device: str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tokens:
    """Runs the reference, then the policy, over the texts.

    Args:
        policy_dir: Hugging Face model directory.
        ref_dir: the reference's; None = only the policy is read.
        encoded: texts; what follows the prompt is scored, at least one token of each text.
        pad_id: fills batches.
        batch_size: texts run together.
        device: see `asft_eval.backends.hf.load_model`.
        dtype: of both models' weights and layers.

    Raises:
        EvaluationError: a directory that cannot be loaded, vocabularies of different size, a family whose logits are more than its head's product,
            logits that are not numbers, or too little memory.
    """
    order = sorted(range(len(encoded)), key=lambda place: len(encoded[place][0]))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]

    def opened(model_dir: Path | str) -> Any:
        model = load_model(model_dir, dtype=dtype, device=device)
        _require_plain_head(model, encoded[0][0][:16], model_dir)
        return model

    kept: list[torch.Tensor] = []
    ref_head: Head | None = None
    if ref_dir is not None:
        ref = opened(ref_dir)
        kept = [hidden_TH.cpu() for hidden_TH, _ in _hidden(ref, encoded, batches, pad_id)]
        ref_head = Head.of(ref).to("cpu")
        del ref
        free_gpus()
    policy = opened(policy_dir)
    head = Head.of(policy)
    if ref_head is not None:
        if ref_head.weight.shape[0] != head.weight.shape[0]:
            sizes = f"{head.weight.shape[0]} and {ref_head.weight.shape[0]}"
            raise EvaluationError(
                f"policy and reference have vocabularies of {sizes} rows: compare models of one family"
            )
        ref_head = ref_head.to(head.weight.device)
    blocks: list[torch.Tensor] = []
    for number, (hidden_TH, labels_T) in enumerate(_hidden(policy, encoded, batches, pad_id)):
        ref_hidden_TH = kept[number] if kept else None
        blocks += _blocks(hidden_TH, ref_hidden_TH, labels_T, head, ref_head)
    text = [place for batch in batches for place in batch for _ in range(_scored(encoded[place]))]
    figures: Floats = np.asarray(torch.cat(blocks), dtype=np.float64)
    by_name = {name: figures[:, i] for i, name in enumerate(_names(ref_head))}
    for prefix, model_dir in (("", policy_dir), ("base_", ref_dir)):
        if model_dir is not None and np.isnan(by_name[f"{prefix}nll"]).any():
            raise not_numbers(model_dir)
    return Tokens(np.array(text, dtype=np.int64), by_name)


def free_gpus() -> None:
    """Gives back what deleted models held: the next to be loaded asks the driver, not this process, what is free."""
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()


def _scored(text: Encoded) -> int:
    return len(text[0]) - text[1]


def _names(ref_head: Head | None) -> Sequence[str]:
    return _MODEL if ref_head is None else _NAMES


def _require_plain_head(model: Any, ids: Sequence[int], model_dir: Path | str) -> None:
    """Some families scale or cap what the head gives; there the head alone would be wrong."""
    tokens = torch.tensor([ids], device=model.device)
    whole = model(input_ids=tokens, use_cache=False).logits
    if not whole.amax(-1).isfinite().all():
        raise not_numbers(model_dir)
    parts = model.get_output_embeddings()(
        model.base_model(input_ids=tokens, use_cache=False).last_hidden_state
    )
    within = max(1e-4, torch.finfo(parts.dtype).eps)
    if not torch.allclose(whole, parts.to(whole), rtol=within, atol=within * float(whole.abs().max())):
        raise EvaluationError(
            f"the logits of {model_dir} are not its head's product alone: drift is not measured for this family"
        )


def _hidden(
    model: Any, encoded: Sequence[Encoded], batches: Sequence[Sequence[int]], pad_id: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Final hidden states `[T, H]` and labels `[T]` of each batch's scored tokens, text after text."""
    for batch in batches:
        tokens_BS, attention_BS, labels_BS, mask_BS = right_padded(
            [encoded[place] for place in batch], pad_id=pad_id, device=model.device
        )
        out = model.base_model(input_ids=tokens_BS, attention_mask=attention_BS, use_cache=False)
        hidden_BSH = out.last_hidden_state
        yield hidden_BSH[mask_BS.to(hidden_BSH.device)], labels_BS[mask_BS]


def _blocks(
    hidden_TH: torch.Tensor,
    ref_hidden_TH: torch.Tensor | None,
    labels_T: torch.Tensor,
    head: Head,
    ref_head: Head | None,
) -> Iterator[torch.Tensor]:
    """Figures of blocks of tokens, `[t, names]`, fp64 on the CPU."""
    size = max(1, _LOGITS_AT_ONCE // head.weight.shape[0])
    for start in range(0, labels_T.numel(), size):
        place = slice(start, start + size)
        logits_TV = head.logits(hidden_TH[place]).double()
        labels = labels_T[place].to(logits_TV.device)
        columns = _of_one(logits_TV, labels)
        if ref_hidden_TH is not None and ref_head is not None:
            ref_logits_TV = ref_head.logits(ref_hidden_TH[place]).to(logits_TV)
            columns += _of_one(ref_logits_TV, labels)
            columns += token_kls(logits_TV, ref_logits_TV)
        yield torch.stack(columns, dim=1).cpu()


def _of_one(logits_TV: torch.Tensor, labels_T: torch.Tensor) -> list[torch.Tensor]:
    """The columns of `_MODEL`, `[T]` each."""
    log_p_TV = logits_TV.log_softmax(-1)
    label_T = log_p_TV.gather(-1, labels_T[:, None]).squeeze(-1)
    best_T, place_T = log_p_TV.max(-1)
    return [-label_T, entropies(logits_TV), label_T.exp(), best_T.exp(), (place_T == labels_T).double()]

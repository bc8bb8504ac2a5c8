"""Drift of a policy from its reference: mean KL per token over given text, full vocabulary, both directions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from asft_eval.backends.hf import encode_pair, load_model, load_tokenizer, right_padded
from asft_eval.errors import EvaluationError

_TOKENS_AT_ONCE = 1024  # rows of [tokens, vocabulary] in fp32 held at a time


@dataclass(frozen=True, slots=True)
class Drift:
    """Means over the `num_tokens` scored tokens of `num_texts` texts, in nats.

    Attributes:
        forward_kl: KL(ref||policy).
        reverse_kl: KL(policy||ref).
        policy_nll: negative log probability of the text under the policy.
        ref_nll: the same under the reference.
        num_tokens: response tokens and end tokens.
        num_texts: texts.
    """

    forward_kl: float
    reverse_kl: float
    policy_nll: float
    ref_nll: float
    num_tokens: int
    num_texts: int


def kl_sums(policy_logits_TV: torch.Tensor, ref_logits_TV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums over T of KL(ref||policy) and KL(policy||ref).

    `KL(p||q) = sum_v p_v (log p_v - log q_v)` over the full vocabulary, in fp32 (fp64 for fp64 inputs).

    Args:
        policy_logits_TV: `[T, V]`.
        ref_logits_TV: `[T, V]`.

    Returns:
        Two scalars, forward and reverse.
    """
    wide = torch.float64 if policy_logits_TV.dtype == torch.float64 else torch.float32
    log_p_TV = policy_logits_TV.to(wide).log_softmax(-1)
    log_q_TV = ref_logits_TV.to(wide).log_softmax(-1)
    difference_TV = log_q_TV - log_p_TV
    return (log_q_TV.exp() * difference_TV).sum(), -(log_p_TV.exp() * difference_TV).sum()


@torch.inference_mode()
def measure_drift(
    policy_dir: Path | str,
    ref_dir: Path | str,
    texts: Sequence[tuple[str, str]],
    *,
    batch_size: int,
    device: str | None = None,
) -> Drift:
    """Mean KL per token between two checkpoints over the responses of (prompt, response) texts.

    Both models run in fp32 on the same batches; response tokens and the end token after them are scored, the tokenizer is
    the reference's. Two copies of one checkpoint give exactly 0.

    Args:
        policy_dir: Hugging Face model directory.
        ref_dir: the reference's; its tokenizer is used.
        texts: (prompt, response).
        batch_size: texts run together.
        device: a torch device; None means the GPU where there is one.

    Raises:
        EvaluationError: no text, a directory that cannot be loaded, or vocabularies of different size.
    """
    if not texts:
        raise EvaluationError(
            "there is no text to measure the drift on: give at least one (prompt, response)"
        )
    tokenizer = load_tokenizer(ref_dir)
    policy = load_model(policy_dir, dtype=torch.float32, device=device)
    ref = load_model(ref_dir, dtype=torch.float32, device=device)
    if policy.config.vocab_size != ref.config.vocab_size:
        sizes = f"{policy.config.vocab_size} and {ref.config.vocab_size}"
        raise EvaluationError(
            f"policy and reference have vocabularies of {sizes} rows: compare models of one family"
        )
    encoded = [encode_pair(tokenizer, prompt, response, end=True) for prompt, response in texts]
    encoded.sort(key=lambda pair: len(pair[0]))
    total_4 = torch.zeros(4, dtype=torch.float64)
    num_tokens = 0
    for start in range(0, len(encoded), batch_size):
        sums_4, count = _batch_sums(policy, ref, encoded[start : start + batch_size], tokenizer.pad_token_id)
        total_4 += sums_4
        num_tokens += count
    forward_kl, reverse_kl, policy_nll, ref_nll = (float(mean) for mean in total_4 / num_tokens)
    return Drift(forward_kl, reverse_kl, policy_nll, ref_nll, num_tokens, len(texts))


def _batch_sums(
    policy: Any, ref: Any, encoded: Sequence[tuple[list[int], int]], pad_id: int
) -> tuple[torch.Tensor, int]:
    """Sums over scored tokens of (forward KL, reverse KL, policy nll, ref nll), fp64 `[4]`, and how many tokens."""
    tokens_BS, attention_BS, labels_BS, mask_BS = right_padded(encoded, pad_id=pad_id, device=policy.device)
    call = {"input_ids": tokens_BS, "attention_mask": attention_BS, "use_cache": False}
    policy_logits_TV = policy(**call).logits[mask_BS]
    ref_logits_TV = ref(**call).logits[mask_BS]
    labels_T = labels_BS[mask_BS]
    sums_4 = torch.zeros(4, dtype=torch.float64)
    for start in range(0, labels_T.numel(), _TOKENS_AT_ONCE):
        place = slice(start, start + _TOKENS_AT_ONCE)
        policy_TV, ref_TV, labels = policy_logits_TV[place], ref_logits_TV[place], labels_T[place]
        forward_kl, reverse_kl = kl_sums(policy_TV, ref_TV)
        policy_nll = torch.nn.functional.cross_entropy(policy_TV, labels, reduction="sum")
        ref_nll = torch.nn.functional.cross_entropy(ref_TV, labels, reduction="sum")
        sums_4 += torch.stack([forward_kl, reverse_kl, policy_nll, ref_nll]).double().cpu()
    return sums_4, labels_T.numel()

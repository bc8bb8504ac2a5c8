"""Drift of a policy from its reference: mean KL per token over given text, full vocabulary, both directions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from asft_eval.backends.hf import encode_pair, load_tokenizer
from asft_eval.divergence import kl_sums
from asft_eval.errors import EvaluationError
from asft_eval.reading import read_texts


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
    encoded = [encode_pair(tokenizer, prompt, response, end=True) for prompt, response in texts]
    pad_id: int = tokenizer.pad_token_id
    read = read_texts(policy_dir, ref_dir, encoded, pad_id=pad_id, batch_size=batch_size, device=device)
    means = [float(read.figures[name].mean()) for name in ("forward_kl", "reverse_kl", "nll", "base_nll")]
    return Drift(*means, num_tokens=len(read.text), num_texts=len(texts))


__all__ = ["Drift", "kl_sums", "measure_drift"]

"""How far two distributions over the vocabulary are apart, token by token, and how uncertain one is."""

from __future__ import annotations

import torch


def _wide(logits: torch.Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def token_kls(
    policy_logits_TV: torch.Tensor, ref_logits_TV: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """KL(ref||policy) and KL(policy||ref) of every token, `[T]` each.

    `KL(p||q) = sum_v p_v (log p_v - log q_v)` over the full vocabulary, in fp32 (fp64 for fp64 inputs).

    Args:
        policy_logits_TV: `[T, V]`.
        ref_logits_TV: `[T, V]`.
    """
    log_p_TV = policy_logits_TV.to(_wide(policy_logits_TV)).log_softmax(-1)
    log_q_TV = ref_logits_TV.to(_wide(policy_logits_TV)).log_softmax(-1)
    difference_TV = log_q_TV - log_p_TV
    return (log_q_TV.exp() * difference_TV).sum(-1), -(log_p_TV.exp() * difference_TV).sum(-1)


def kl_sums(policy_logits_TV: torch.Tensor, ref_logits_TV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The sums over T of `token_kls`: two scalars, forward and reverse."""
    forward_T, reverse_T = token_kls(policy_logits_TV, ref_logits_TV)
    return forward_T.sum(), reverse_T.sum()


def entropies(logits_TV: torch.Tensor) -> torch.Tensor:
    """Entropy of every token's distribution in nats, `[T]`: `-sum_v p_v log p_v`, in fp32 (fp64 for fp64 inputs)."""
    log_p_TV = logits_TV.to(_wide(logits_TV)).log_softmax(-1)
    return -(log_p_TV.exp() * log_p_TV).sum(-1)

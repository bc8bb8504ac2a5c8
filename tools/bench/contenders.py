"""What is measured: rows that compute one loss, each with the means its library offers.

A contender gets the same final hidden states and heads as the others and must leave the same two gradients.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from asft_nemo.losses import VocabShard, fused_linear_loss, vocab_parallel_loss
from asft_nemo.losses.chunks import resolve_chunk_tokens
from asft_nemo.objectives import Objective, objective

DTYPES = MappingProxyType({"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64})
KL_WEIGHT = 0.05


class Unavailable(Exception):
    """This contender cannot run here; the message says why."""


@dataclass(frozen=True)
class Case:
    """One size to measure.

    Attributes:
        tokens, vocab, hidden: T, V, H; every token is valid.
        dtype: of hidden states and heads, a key of `DTYPES`.
        objective: `sft`, `dft`, `sft_kl` or `asft`.
        chunk_tokens: of the fused loss: "auto" or a number.
        device: "cpu" or "cuda".
    """

    tokens: int
    vocab: int
    hidden: int
    dtype: str
    objective: str
    chunk_tokens: int | str
    device: str


@dataclass(frozen=True)
class Tensors:
    """What every contender is given. hidden_TH and head_VH are leaves that want gradients."""

    hidden_TH: Tensor
    head_VH: Tensor
    ref_hidden_TH: Tensor
    ref_head_VH: Tensor
    labels_T: Tensor
    mask_T: Tensor


def make_tensors(case: Case, *, seed: int = 0) -> Tensors:
    """The same random tensors in every process: logits of standard deviation 2, a reference a little apart."""
    generator = torch.Generator(case.device).manual_seed(seed)
    dtype = DTYPES[case.dtype]

    def normal(rows: int, scale: float) -> Tensor:
        shape = (rows, case.hidden)
        return torch.randn(shape, dtype=dtype, device=case.device, generator=generator).mul_(scale)

    head_scale = 2 * case.hidden**-0.5
    hidden_TH, head_VH = normal(case.tokens, 1.0), normal(case.vocab, head_scale)
    ref_hidden_TH = normal(case.tokens, 0.1).add_(hidden_TH)
    ref_head_VH = normal(case.vocab, 0.1 * head_scale).add_(head_VH)
    labels_T = torch.randint(case.vocab, (case.tokens,), device=case.device, generator=generator)
    mask_T = torch.ones(case.tokens, dtype=torch.bool, device=case.device)
    return Tensors(
        hidden_TH.requires_grad_(), head_VH.requires_grad_(), ref_hidden_TH, ref_head_VH, labels_T, mask_T
    )


Loss = Callable[[Tensors], Tensor]


def build_objective(name: str) -> Objective:
    """The objective with the kl_weight all contenders use, where it has a divergence."""
    return objective(name, kl_weight=KL_WEIGHT) if name in ("asft", "sft_kl") else objective(name)


def _anchored(name: str) -> bool:
    return build_objective(name).divergence is not None


def _weighted_by_probability(name: str) -> bool:
    return name in ("asft", "dft")


def fused_chunk_tokens(case: Case) -> int:
    """Tokens a chunk of the fused loss has; the chunked contender from elsewhere is given the same number."""
    return resolve_chunk_tokens(
        case.chunk_tokens,
        num_tokens=case.tokens,
        objective=build_objective(case.objective),
        shard=VocabShard.full(case.vocab),
        dtype=torch.float64 if case.dtype == "fp64" else torch.float32,
        device=torch.device(case.device),
        visits_head=True,
    )


def authors(case: Case) -> Loss:
    """mean_t sg(p_t) CE_t + kl_weight KL(ref||policy)_t in plain PyTorch, everything in the inputs' dtype.

    Logits of both models as [T, V], one log-softmax of the policy's, that serves CE, p_t and KL, and one
    softmax of the reference's: the leanest reading of the authors' arithmetic (arXiv 2509.23753, Eq. 6).
    """
    weighted, anchored = _weighted_by_probability(case.objective), _anchored(case.objective)

    def loss(t: Tensors) -> Tensor:
        log_probs_TV = functional.log_softmax(t.hidden_TH @ t.head_VH.T, dim=-1)
        ce_T = -log_probs_TV.gather(1, t.labels_T[:, None]).squeeze(1)
        loss_T = ce_T * (-ce_T).detach().exp() if weighted else ce_T
        if anchored:
            with torch.no_grad():
                ref_probs_TV = functional.softmax(t.ref_hidden_TH @ t.ref_head_VH.T, dim=-1)
            kl_T = functional.kl_div(log_probs_TV, ref_probs_TV, reduction="none").sum(-1)
            loss_T = loss_T + KL_WEIGHT * kl_T
        return loss_T.mean()

    return loss


def fused(case: Case) -> Loss:
    """`asft_nemo.losses.fused_linear_loss`."""
    row, shard = build_objective(case.objective), VocabShard.full(case.vocab)

    def loss(t: Tensors) -> Tensor:
        output = fused_linear_loss(
            t.hidden_TH,
            t.head_VH,
            t.labels_T,
            t.mask_T,
            objective=row,
            shard=shard,
            ref_hidden_TH=t.ref_hidden_TH,
            ref_head_VH=t.ref_head_VH,
            chunk_tokens=case.chunk_tokens,
        )
        return output.loss_sum / case.tokens

    return loss


def vocab_parallel(case: Case) -> Loss:
    """`asft_nemo.losses.vocab_parallel_loss` on materialised logits."""
    row, shard = build_objective(case.objective), VocabShard.full(case.vocab)

    def loss(t: Tensors) -> Tensor:
        ref_logits_TV = t.ref_hidden_TH @ t.ref_head_VH.T if row.divergence else None
        output = vocab_parallel_loss(
            t.hidden_TH @ t.head_VH.T,
            t.labels_T,
            t.mask_T,
            objective=row,
            shard=shard,
            ref_logits_TV=ref_logits_TV,
        )
        return output.loss_sum / case.tokens

    return loss


def liger(case: Case) -> Loss:
    """Liger-Kernel's Triton kernels: fused linear CE, scaled by p_t, plus fused linear JSD at beta 0."""
    if importlib.util.find_spec("liger_kernel") is None:
        raise Unavailable("liger-kernel is not installed")
    if case.device != "cuda":
        raise Unavailable("Liger-Kernel's fused linear CE and JSD are Triton kernels and need a CUDA device")
    try:
        from liger_kernel.ops.fused_linear_cross_entropy import (  # pyright: ignore
            LigerFusedLinearCrossEntropyFunction as CrossEntropy,
        )
        from liger_kernel.ops.fused_linear_jsd import (  # pyright: ignore
            LigerFusedLinearJSDFunction as Divergence,
        )
    except Exception as error:
        raise Unavailable(f"liger-kernel does not import: {error}") from error
    weighted, anchored = _weighted_by_probability(case.objective), _anchored(case.objective)

    def loss(t: Tensors) -> Tensor:
        # Positional, for autograd functions take no names: bias, class weights, ignore_index, z-loss scale,
        # label smoothing, reduction, soft cap, return_z_loss, accumulation dtype, token scaling.
        ce: Any = CrossEntropy.apply(
            t.hidden_TH,
            t.head_VH,
            t.labels_T,
            None,
            None,
            -100,
            0.0,
            0.0,
            "mean",
            None,
            False,
            None,
            weighted,
        )
        total = ce[0] if isinstance(ce, tuple) else ce
        if anchored:
            operands = (t.hidden_TH, t.head_VH, t.ref_hidden_TH, t.ref_head_VH)
            total = total + KL_WEIGHT * Divergence.apply(*operands, t.labels_T, 0.0)
        return total

    return loss


def liger_chunked(case: Case) -> Loss:
    """Liger-Kernel's chunked distillation loss in plain PyTorch: CE, never weighted, plus JSD at beta 0."""
    if importlib.util.find_spec("liger_kernel") is None:
        raise Unavailable("liger-kernel is not installed")
    try:
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss  # pyright: ignore
    except Exception as error:
        raise Unavailable(f"liger_kernel.chunked_loss does not import: {error}") from error
    # Compiled on CUDA, as its authors intend; on a CPU that would need a C++ compiler.
    distill: Any = LigerFusedLinearJSDLoss(
        weight_hard_loss=1.0,
        weight_soft_loss=KL_WEIGHT,
        beta=0.0,
        compiled=case.device == "cuda",
        chunk_size=fused_chunk_tokens(case),
    )

    def loss(t: Tensors) -> Tensor:
        return distill(t.hidden_TH, t.head_VH, t.ref_hidden_TH, t.ref_head_VH, t.labels_T)

    return loss


def _one_rank(device: str) -> None:
    """A process group of one rank and Megatron's groups over it, which its cross entropy asks for."""
    import os

    from megatron.core import parallel_state
    from torch import distributed as dist

    if not dist.is_initialized():
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        backend = "nccl" if device == "cuda" else "gloo"
        store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
        dist.init_process_group(backend, store=store, rank=0, world_size=1)
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(create_gloo_process_groups=False)


def modelopt(case: Case) -> Loss:
    """ModelOpt's LogitsKLLoss plus Megatron's vocab-parallel cross entropy, on materialised logits."""
    try:
        from megatron.core.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy
        from megatron.core.transformer import TransformerConfig
        from modelopt.torch.distill.plugins.megatron import LogitsKLLoss

        _one_rank(case.device)
    except Exception as error:
        raise Unavailable(f"nvidia-modelopt with megatron-core does not load: {error}") from error
    config = TransformerConfig(num_layers=1, hidden_size=case.hidden, num_attention_heads=1)
    divergence = LogitsKLLoss(config)
    weighted, anchored = _weighted_by_probability(case.objective), _anchored(case.objective)

    def loss(t: Tensors) -> Tensor:
        logits_T1V = (t.hidden_TH @ t.head_VH.T).unsqueeze(1)
        kl_T: Tensor | float = 0.0
        if anchored:
            # Before the cross entropy, which overwrites fp32 logits in place.
            with torch.no_grad():
                ref_logits_T1V = (t.ref_hidden_TH @ t.ref_head_VH.T).unsqueeze(1)
            kl_T = divergence(logits_T1V, ref_logits_T1V)[0].squeeze(0)
        ce_T: Tensor = vocab_parallel_cross_entropy(logits_T1V, t.labels_T.unsqueeze(1)).squeeze(1)
        loss_T = ce_T * (-ce_T).detach().exp() if weighted else ce_T
        return (loss_T + KL_WEIGHT * kl_T).mean()

    return loss


def _same(name: str) -> str | None:
    return name


def _only(row: Mapping[str, str], name: str) -> str | None:
    return row.get(name)


@dataclass(frozen=True)
class Contender:
    """A row; its title is in `report.TITLES`.

    Attributes:
        build: gives the loss of a case; raises `Unavailable`.
        computes: the objective it computes when another is asked for; None where it offers nothing like it.
    """

    build: Callable[[Case], Loss]
    computes: Callable[[str], str | None] = _same


CONTENDERS: Mapping[str, Contender] = MappingProxyType(
    {
        "authors": Contender(authors),
        "fused": Contender(fused),
        "vocab_parallel": Contender(vocab_parallel),
        "liger": Contender(liger),
        "liger_chunked": Contender(liger_chunked, partial(_only, {"asft": "sft_kl", "sft_kl": "sft_kl"})),
        "modelopt": Contender(modelopt),
        "fused_sft": Contender(fused, partial(_only, {"asft": "sft", "sft_kl": "sft"})),
    }
)

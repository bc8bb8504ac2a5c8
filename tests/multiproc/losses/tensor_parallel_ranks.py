"""One rank of the tensor-parallel loss tests: started by test_tensor_parallel.py, writes findings as JSON.

Four gloo ranks hold the group of size 4 and the groups of size 2 (ranks 0-1 and 2-3); every case runs on each
of them.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

ROOT = Path(__file__).resolve().parents[3]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "unit" / "losses")]

from loss_cases import VARIANT_IDS, VARIANTS, LossCase, make_case, metric_pairs, variant_objective, worst  # noqa: E402

from asft_nemo.losses import LossOutput, VocabShard, fused_linear_loss, vocab_parallel_loss, vocab_shard  # noqa: E402
from asft_nemo.objectives import Objective  # noqa: E402

WORLD_SIZE = 4
#: 53 rows padded to 64: at TP 4 the last rank holds 5 rows that count, so shards differ.
PADDED_VOCAB = 64
FUSED_LAYOUTS: dict[str, dict[str, Any]] = {
    "gradients in forward": {},
    "gradients in backward": {"gradients_in": "backward"},
    "sequence parallel": {"sequence_parallel": True},
    "sequence parallel, gradients in backward": {"sequence_parallel": True, "gradients_in": "backward"},
}


@dataclass(frozen=True)
class Ranks:
    """One tensor-parallel group as this rank sees it."""

    tp_size: int
    tp_rank: int
    group: dist.ProcessGroup

    def shard(
        self, case: LossCase, padded: int = PADDED_VOCAB, *, sequence_parallel: bool = False
    ) -> VocabShard:
        return VocabShard.of_rank(
            self.tp_rank,
            self.tp_size,
            padded,
            case.vocab_size,
            self.group,
            sequence_parallel=sequence_parallel,
        )


def start(rank: int, rendezvous: str) -> list[Ranks]:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=WORLD_SIZE)
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    return [Ranks(2, rank % 2, pairs[rank // 2]), Ranks(4, rank, dist.group.WORLD)]


def columns(full_TV: Tensor, shard: VocabShard, junk: float) -> Tensor:
    """This shard's columns of the whole vocabulary, its padded ones filled with junk."""
    local_TV = full_TV.new_full((full_TV.shape[0], shard.size), junk)
    local_TV[:, : shard.num_valid] = full_TV[:, shard.start : shard.start + shard.num_valid]
    return local_TV


def equal_on_ranks(output: LossOutput, ranks: Ranks) -> bool:
    """True where the loss and every metric are equal bit for bit on all ranks of the group."""
    values = torch.stack([output.loss_sum.detach(), *(total for total, _ in output.metrics.values())])
    gathered = [torch.empty_like(values) for _ in range(ranks.tp_size)]
    dist.all_gather(gathered, values, group=ranks.group)
    return all(torch.equal(values, other) for other in gathered)


def vocab_parallel(
    ranks: Ranks, chosen: Objective, case: LossCase, padded: int = PADDED_VOCAB
) -> dict[str, float]:
    shard = ranks.shard(case, padded)
    expected, gradient_TV, _, _ = case.dense(chosen)
    logits_TV = columns(case.logits_TV, shard, torch.nan).requires_grad_()
    output = vocab_parallel_loss(
        logits_TV,
        case.labels_T,
        case.loss_mask_T,
        objective=chosen,
        shard=shard,
        ref_logits_TV=columns(case.ref_logits_TV, shard, torch.inf),
        **case.per_token,
    )
    output.loss_sum.backward()
    assert logits_TV.grad is not None
    return {
        "loss": worst((output.loss_sum, expected.loss_sum)),
        "metrics": worst(*metric_pairs(output, expected)),
        "dLogits": worst((logits_TV.grad, columns(gradient_TV, shard, 0.0))),
        "differs_between_ranks": float(not equal_on_ranks(output, ranks)),
    }


class CountedCollectives:
    """Counts the collectives of the losses while it is entered."""

    NAMES = ("_all_gather", "_all_reduce", "_reduce_scatter")

    def __enter__(self) -> CountedCollectives:
        self.counts = dict.fromkeys(self.NAMES, 0)
        self.originals = {name: getattr(vocab_shard, name) for name in self.NAMES}
        for name, original in self.originals.items():

            def counted(*args: Any, name: str = name, original: Any = original, **kwargs: Any) -> object:
                self.counts[name] += 1
                return original(*args, **kwargs)

            setattr(vocab_shard, name, counted)
        return self

    def __exit__(self, *_: object) -> None:
        for name, original in self.originals.items():
            setattr(vocab_shard, name, original)


def fused_linear(
    ranks: Ranks,
    chosen: Objective,
    case: LossCase,
    padded: int = PADDED_VOCAB,
    *,
    sequence_parallel: bool = False,
    gradients_in: Literal["forward", "backward"] = "forward",
    chunk_tokens: int = 5,
) -> dict[str, float]:
    shard = ranks.shard(case, padded, sequence_parallel=sequence_parallel)
    expected, _, hidden_gradient_TH, head_gradient_VH = case.dense(chosen)

    def rows(full_TH: Tensor) -> Tensor:
        return full_TH.chunk(ranks.tp_size)[ranks.tp_rank] if sequence_parallel else full_TH

    def head_rows(full_VH: Tensor, junk: float) -> Tensor:
        return columns(full_VH.T, shard, junk).T.contiguous()

    hidden_TH = rows(case.hidden_TH).clone().requires_grad_()
    head_VH = head_rows(case.head_VH, torch.nan).requires_grad_()
    with CountedCollectives() as collectives:
        output = fused_linear_loss(
            hidden_TH,
            head_VH,
            case.labels_T,
            case.loss_mask_T,
            objective=chosen,
            shard=shard,
            ref_hidden_TH=rows(case.ref_hidden_TH),
            ref_head_VH=head_rows(case.ref_head_VH, torch.inf),
            chunk_tokens=chunk_tokens,
            gradients_in=gradients_in,
            **case.per_token,
        )
        output.loss_sum.backward()
    assert hidden_TH.grad is not None
    assert head_VH.grad is not None
    chunks = -(-int(case.loss_mask_T.sum()) // chunk_tokens)
    models = 2 if chosen.divergence else 1
    gathers = models * (2 if gradients_in == "backward" else 1) if sequence_parallel else 0
    promised = {
        "_all_gather": chunks + gathers,
        "_all_reduce": 0 if sequence_parallel else 1,
        "_reduce_scatter": 1 if sequence_parallel else 0,
    }
    return {
        "loss": worst((output.loss_sum, expected.loss_sum)),
        "metrics": worst(*metric_pairs(output, expected)),
        "dHidden": worst((hidden_TH.grad, rows(hidden_gradient_TH))),
        "dHead": worst((head_VH.grad, head_rows(head_gradient_VH, 0.0))),
        "differs_between_ranks": float(not equal_on_ranks(output, ranks)),
        "collectives_not_as_promised": float(collectives.counts != promised),
    }


def megatron_cross_entropy(ranks: Ranks, case: LossCase) -> dict[str, float]:
    """sft on this rank's columns beside Megatron's own vocabulary-parallel cross entropy on them."""
    from megatron.core.tensor_parallel import cross_entropy

    cross_entropy.get_tensor_model_parallel_group = lambda: ranks.group
    cross_entropy.get_tensor_model_parallel_rank = lambda: ranks.tp_rank
    cross_entropy.get_tensor_model_parallel_world_size = lambda: ranks.tp_size
    # Megatron counts padded rows; a logit far below the others takes them out.
    shard = ranks.shard(case)
    theirs_TV = columns(case.logits_TV, shard, -1e4).requires_grad_()
    labels_T = case.labels_T.clamp(min=0)
    losses_T = cross_entropy.vocab_parallel_cross_entropy(theirs_TV.clone()[:, None], labels_T[:, None])[:, 0]
    loss = (losses_T * case.loss_mask_T).sum()
    loss.backward()
    ours_TV = columns(case.logits_TV, shard, torch.nan).requires_grad_()
    output = vocab_parallel_loss(
        ours_TV, case.labels_T, case.loss_mask_T, objective=variant_objective("sft", None), shard=shard
    )
    output.loss_sum.backward()
    assert theirs_TV.grad is not None
    assert ours_TV.grad is not None
    return {"loss": worst((output.loss_sum, loss)), "dLogits": worst((ours_TV.grad, theirs_TV.grad))}


def cases() -> dict[str, Callable[[Ranks], dict[str, float]]]:
    """Every case by name; each returns the figures that must be at most 1e-12."""
    found: dict[str, Callable[[Ranks], dict[str, float]]] = {}
    for (name, direction), label in zip(VARIANTS, VARIANT_IDS, strict=True):
        chosen = variant_objective(name, direction)
        found[f"vocab_parallel/{label}"] = lambda ranks, chosen=chosen: vocab_parallel(
            ranks, chosen, make_case()
        )
    anchored = variant_objective("asft", "forward")
    # 80 rows over 4 ranks: rank 3 holds padding only, rank 2 a part.
    found["vocab_parallel/a rank of padding only"] = lambda ranks: vocab_parallel(
        ranks, anchored, make_case(), 80
    )
    entropy = variant_objective("eaft", None)
    found["vocab_parallel/fewer rows than top-k on a rank"] = lambda ranks: vocab_parallel(
        ranks, entropy, make_case(), 80
    )
    found["vocab_parallel/no valid token"] = lambda ranks: vocab_parallel(
        ranks, anchored, make_case(valid_share=0.0)
    )
    found["vocab_parallel/all valid"] = lambda ranks: vocab_parallel(
        ranks, anchored, make_case(valid_share=1.1)
    )
    extreme = make_case()
    extreme = replace(extreme, hidden_TH=extreme.hidden_TH * 1e3, ref_hidden_TH=extreme.ref_hidden_TH * 1e3)
    for direction in ("forward", "reverse"):
        found[f"vocab_parallel/logits of +-1e4, {direction}"] = lambda ranks, direction=direction: (
            vocab_parallel(ranks, variant_objective("asft", direction), extreme)
        )
    for (name, direction), label in zip(VARIANTS, VARIANT_IDS, strict=True):
        chosen = variant_objective(name, direction)
        for layout, options in FUSED_LAYOUTS.items():
            found[f"fused/{label}/{layout}"] = lambda ranks, chosen=chosen, options=options: fused_linear(
                ranks, chosen, make_case(), **options
            )
    for layout, options in FUSED_LAYOUTS.items():
        found[f"fused/a rank of padding only/{layout}"] = lambda ranks, options=options: fused_linear(
            ranks, anchored, make_case(), 80, **options
        )
        found[f"fused/no valid token/{layout}"] = lambda ranks, options=options: fused_linear(
            ranks, anchored, make_case(valid_share=0.0), **options
        )
    return found


def main(rank: int, rendezvous: str, results: str) -> None:
    groups = start(rank, rendezvous)
    findings = {
        f"TP{ranks.tp_size}/{name}": case(ranks) for ranks in groups for name, case in cases().items()
    }
    # On two ranks only: importing Megatron costs more than all other cases.
    if rank < 2:
        findings["Megatron's cross entropy"] = megatron_cross_entropy(groups[0], make_case())
    Path(f"{results}.{rank}").write_text(json.dumps(findings))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3])

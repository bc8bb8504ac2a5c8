"""One rank of the tensor-parallel loss tests; started by test_tensor_parallel.py, writes its findings as JSON.

Four gloo ranks hold the group of size 4 and the groups of size 2 (ranks 0-1 and 2-3); every case runs on each of them.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

ROOT = Path(__file__).resolve().parents[3]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "unit" / "losses")]

from loss_cases import VARIANT_IDS, VARIANTS, LossCase, make_case, metric_pairs, variant_objective, worst  # noqa: E402

from asft_nemo.losses import LossOutput, VocabShard, vocab_parallel_loss  # noqa: E402
from asft_nemo.objectives import Objective  # noqa: E402

WORLD_SIZE = 4
#: 53 rows padded to 64: at TP 4 the last rank holds 5 rows that count, so shards differ.
PADDED_VOCAB = 64


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
    return found


def main(rank: int, rendezvous: str, results: str) -> None:
    groups = start(rank, rendezvous)
    findings = {
        f"TP{ranks.tp_size}/{name}": case(ranks) for ranks in groups for name, case in cases().items()
    }
    Path(f"{results}.{rank}").write_text(json.dumps(findings))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3])

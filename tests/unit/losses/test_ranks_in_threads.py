"""The losses over two ranks that are threads of this process: tests/multiproc has the same on processes, four of them, and every variant.

torch's own tests have such a process group; where this torch has none, these tests are skipped.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from loss_cases import make_case, variant_objective

from asft_nemo.losses import VocabShard, vocab_shard

pytest.importorskip("torch.testing._internal.distributed.multi_threaded_pg")
from torch.testing._internal.distributed import multi_threaded_pg

sys.path.append(str(Path(__file__).resolve().parents[2] / "multiproc" / "losses"))
import tensor_parallel_ranks  # pyright: ignore[reportMissingImports]
from tensor_parallel_ranks import (  # pyright: ignore[reportMissingImports]
    FUSED_LAYOUTS,
    Ranks,
    fused_linear,
    vocab_parallel,
)

ISOLATION = getattr(getattr(torch._C, "_distributed_c10d", None), "_set_thread_isolation_mode", None)
pytestmark = [
    pytest.mark.timeout(60),
    pytest.mark.skipif(ISOLATION is None, reason="this torch keeps one register of groups for all threads"),
]
RANKS = 2
TOLERANCE = 1e-12


@pytest.fixture(autouse=True)
def counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counts the collectives of each thread: all share the module whose functions a count of one would replace."""
    here = threading.local()

    class Counted(tensor_parallel_ranks.CountedCollectives):
        def __enter__(self) -> Counted:
            self.counts = here.counts = dict.fromkeys(self.NAMES, 0)
            return self

        def __exit__(self, *_: object) -> None:
            del here.counts

    def counting(name: str, original: Callable[..., object]) -> Callable[..., object]:
        def collective(*args: Any, **kwargs: Any) -> object:
            if hasattr(here, "counts"):
                here.counts[name] += 1
            return original(*args, **kwargs)

        return collective

    for name in Counted.NAMES:
        monkeypatch.setattr(vocab_shard, name, counting(name, getattr(vocab_shard, name)))
    monkeypatch.setattr(tensor_parallel_ranks, "CountedCollectives", Counted)


def on_ranks(does: Callable[[Ranks], Any], count: int = RANKS) -> list[Any]:
    """What each rank's thread returns."""
    multi_threaded_pg._install_threaded_pg()
    assert ISOLATION is not None
    ISOLATION(True)
    store, answers, errors = dist.HashStore(), [None] * count, []  # pyright: ignore[reportPrivateImportUsage]

    def be(rank: int) -> None:
        try:
            dist.init_process_group("threaded", rank=rank, world_size=count, store=store)
            answers[rank] = does(Ranks(count, rank, dist.group.WORLD))
        except BaseException as error:
            errors.append(error)
            multi_threaded_pg.ProcessLocalGroup.exception_handle(error)  # the others wait for it

    threads = [threading.Thread(target=be, args=(rank,), daemon=True) for rank in range(count)]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
    finally:
        multi_threaded_pg.ProcessLocalGroup.reset()
        ISOLATION(False)
        multi_threaded_pg._uninstall_threaded_pg()
    if errors:
        raise errors[0]
    assert not any(thread.is_alive() for thread in threads), "a rank waits for ever"
    return answers


def shard(ranks: Ranks) -> VocabShard:
    return VocabShard.of_rank(ranks.tp_rank, RANKS, 12, 11, ranks.group)


def test_collectives() -> None:
    def collect(ranks: Ranks) -> tuple[torch.Tensor, ...]:
        mine, rank = shard(ranks), ranks.tp_rank
        return (
            mine.gather_rows(torch.full((2, 3), float(rank))),
            mine.reduce_scatter_rows(torch.arange(12.0).view(4, 3).T.contiguous().T * (rank + 1)),
            mine.all_gather(torch.tensor([[rank], [rank + 10]])),
            mine.all_reduce_sum_(torch.ones(2, dtype=torch.float64) * (rank + 1)),
        )

    for rank, (rows, scattered, gathered, summed) in enumerate(on_ranks(collect)):
        assert rows.tolist() == [[0.0] * 3, [0.0] * 3, [1.0] * 3, [1.0] * 3]
        assert torch.equal(scattered, 3 * torch.arange(12.0).view(4, 3)[2 * rank : 2 * rank + 2])
        assert gathered.tolist() == [[[0], [10]], [[1], [11]]]
        assert torch.equal(summed, torch.full((2,), 3.0, dtype=torch.float64))


def test_collectives_stay_in_their_group() -> None:
    """Of four ranks, as with data parallelism two."""

    def collect(ranks: Ranks) -> list[list[float]]:
        pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
        rank = ranks.tp_rank
        mine = VocabShard.of_rank(rank % 2, 2, 12, 11, pairs[rank // 2])
        one = torch.full((1, 1), float(rank))
        found = mine.gather_rows(one), mine.reduce_scatter_rows(one.repeat(2, 1)), mine.all_reduce_sum_(one)
        return [tensor.flatten().tolist() for tensor in found]

    answers = on_ranks(collect, count=4)
    assert answers == [[[0.0, 1.0], [1.0], [1.0]]] * 2 + [[[2.0, 3.0], [5.0], [5.0]]] * 2


@pytest.mark.parametrize(("name", "direction"), [("asft", "reverse"), ("eaft", None)])
def test_vocab_parallel(name: str, direction: Any) -> None:
    chosen = variant_objective(name, direction)
    for found in on_ranks(lambda ranks: vocab_parallel(ranks, chosen, make_case())):
        assert found == pytest.approx(dict.fromkeys(found, 0.0), abs=TOLERANCE)


@pytest.mark.parametrize(
    ("name", "layout"), [*(("asft", layout) for layout in FUSED_LAYOUTS), ("sft", "sequence parallel")]
)
def test_fused_linear(name: str, layout: str) -> None:
    chosen = variant_objective(name, "forward")
    for found in on_ranks(lambda ranks: fused_linear(ranks, chosen, make_case(), **FUSED_LAYOUTS[layout])):
        assert found == pytest.approx(dict.fromkeys(found, 0.0), abs=TOLERANCE)


#: Over two ranks the second then holds padding alone.
PADDING_ALONE = 106


@pytest.mark.parametrize(("name", "direction"), [("asft", "forward"), ("asft", "reverse"), ("sft", None)])
def test_a_rank_of_padding_alone(name: str, direction: Any) -> None:
    chosen = variant_objective(name, direction)

    def both_losses(ranks: Ranks) -> dict[str, float]:
        return fused_linear(ranks, chosen, make_case(), PADDING_ALONE) | {
            f"logits, {what}": figure
            for what, figure in vocab_parallel(ranks, chosen, make_case(), PADDING_ALONE).items()
        }

    for found in on_ranks(both_losses):
        assert found == pytest.approx(dict.fromkeys(found, 0.0), abs=TOLERANCE)

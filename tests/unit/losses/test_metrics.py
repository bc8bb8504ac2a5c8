"""What every loss says of its tokens besides the loss: names, sums, denominators, and the terms of each sum."""

import math

import pytest
import torch
from loss_cases import VARIANT_IDS, VARIANTS, fused, make_case, metric_pairs, variant_objective, worst

from asft_nemo.losses import VocabShard, dense_loss, vocab_parallel_loss
from asft_nemo.losses.reduce import metrics_of_tokens
from asft_nemo.objectives import objective

ALWAYS = ["nll", "weighted_nll", "token_weight", "high_weight_share"]
NAMES = {
    "sft_kl-forward": [*ALWAYS, "kl"],
    "sft_kl-reverse": [*ALWAYS, "kl_reverse"],
    "asft-forward": [*ALWAYS, "kl"],
    "asft-reverse": [*ALWAYS, "kl_reverse"],
    "eaft": [*ALWAYS, "topk_entropy"],
}


def by_vocab_parallel(case, chosen):
    return vocab_parallel_loss(
        case.logits_TV,
        case.labels_T,
        case.loss_mask_T,
        objective=chosen,
        shard=VocabShard.full(case.vocab_size),
        ref_logits_TV=case.ref_logits_TV,
        **case.per_token,
    )


IMPLEMENTATIONS = {
    "dense": lambda case, chosen: case.dense(chosen)[0],
    "vocab_parallel": by_vocab_parallel,
    "fused": lambda case, chosen: fused(case, chosen, chunk_tokens=5).output,
    "fused, gradients in backward": lambda case, chosen: (
        fused(case, chosen, chunk_tokens=5, gradients_in="backward").output
    ),
    "fused, no gradients": lambda case, chosen: without_gradients(case, chosen),
}


def without_gradients(case, chosen):
    with torch.no_grad():
        return fused(case, chosen, chunk_tokens=5, backward=False).output


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("name", "direction"), VARIANTS, ids=VARIANT_IDS)
def test_every_metric_of_every_token_equals_the_definitions(name, direction, implementation):
    case, chosen = make_case(tokens=40, seed=3), variant_objective(name, direction)
    expected = case.dense(chosen)[0]
    output = IMPLEMENTATIONS[implementation](case, chosen)
    assert list(output.metrics) == list(output.token_metrics)
    assert list(output.metrics) == NAMES.get(VARIANT_IDS[VARIANTS.index((name, direction))], ALWAYS)
    assert torch.equal(output.index_N, case.loss_mask_T.nonzero()[:, 0])
    assert worst(*metric_pairs(output, expected)) <= 1e-12
    for metric, values_N in output.token_metrics.items():
        assert values_N.shape == output.index_N.shape
        assert not values_N.requires_grad
        assert worst((values_N, expected.token_metrics[metric])) <= 1e-12, metric
        total, denominator = output.metrics[metric]
        assert worst((values_N.sum(), total)) <= 1e-12, metric
        assert denominator == output.num_tokens == len(output.index_N)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_terms_follow_the_order_of_the_tokens(implementation):
    """A token's metrics stay with it when the tokens are shuffled: sums of any part of them are right."""
    case, chosen = make_case(tokens=40, seed=4), variant_objective("asft", "forward")
    order_T = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    straight, shuffled = (
        IMPLEMENTATIONS[implementation](one, chosen) for one in (case, case.tokens(order_T))
    )
    for name in straight.metrics:
        by_token_T, moved_T = torch.zeros(40).double(), torch.zeros(40).double()
        by_token_T[straight.index_N] = straight.token_metrics[name]
        moved_T[shuffled.index_N] = shuffled.token_metrics[name]
        assert worst((moved_T, by_token_T[order_T])) <= 1e-12, name


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_no_valid_token_gives_zero_sums_and_counts(implementation):
    output = IMPLEMENTATIONS[implementation](make_case(valid_share=0.0), variant_objective("eaft", None))
    assert [(total.item(), count.item()) for total, count in output.metrics.values()] == [(0.0, 0)] * 5
    assert all(values_N.shape == (0,) for values_N in output.token_metrics.values())


def test_high_weights_by_hand():
    """A weight counts above 0.9; the bound itself does not, and the share is over tokens, not over weights."""
    weight_N = torch.tensor([0.95, 0.9, 16.0, 0.0], dtype=torch.float64)
    metrics_MN = metrics_of_tokens(
        objective("dft"), nll_N=torch.ones_like(weight_N), weight_N=weight_N, kl_N=None, topk_entropy_N=None
    )
    assert metrics_MN[ALWAYS.index("high_weight_share")].tolist() == [1.0, 0.0, 1.0, 0.0]


def test_every_token_of_sft_has_a_high_weight():
    total, count = make_case().dense(objective("sft"))[0].metrics["high_weight_share"]
    assert total == count > 0


def test_topk_entropy_by_hand():
    """Twenty equal logits and one far below have entropy ln 20; a certain token has none."""
    logits_TV = torch.zeros(2, 21, dtype=torch.float64)
    logits_TV[0, 20] = -5.0
    logits_TV[1, 0] = 800.0
    output = dense_loss(
        logits_TV,
        torch.zeros(2, dtype=torch.int64),
        torch.ones(2, dtype=torch.bool),
        objective=objective("eaft"),
    )
    assert output.token_metrics["topk_entropy"].tolist() == pytest.approx([math.log(20), 0.0], abs=1e-14)

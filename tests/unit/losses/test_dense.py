"""The definition, against numeric derivatives and against formulas written out by hand."""

import math

import pytest
import torch
from loss_cases import VARIANT_IDS, VARIANTS, freeze_weight, make_case, variant_objective, worst

from asft_nemo.errors import DataError, ObjectiveError
from asft_nemo.losses import dense_loss
from asft_nemo.objectives import objective


@pytest.mark.parametrize(("name", "direction"), VARIANTS, ids=VARIANT_IDS)
def test_gradient_is_the_numeric_derivative_at_frozen_weights(name, direction):
    case = make_case(tokens=6, vocab=23, seed=3)
    anchored = variant_objective(name, direction)
    frozen = freeze_weight(anchored, case)
    logits_TV = case.logits_TV.requires_grad_()

    def value(logits, chosen):
        return dense_loss(
            logits,
            case.labels_T,
            case.loss_mask_T,
            objective=chosen,
            ref_logits_TV=case.ref_logits_TV,
            **case.per_token,
        ).loss_sum

    assert torch.autograd.gradcheck(lambda z: value(z, frozen), (logits_TV,), eps=1e-6, atol=1e-8, rtol=1e-6)
    (true_gradient,) = torch.autograd.grad(value(logits_TV, anchored), logits_TV)
    (frozen_gradient,) = torch.autograd.grad(value(logits_TV, frozen), logits_TV)
    assert worst((true_gradient, frozen_gradient)) <= 1e-14


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_one_token_by_hand(direction):
    """p = (1/2, 1/4, 1/4), q = (1/4, 1/4, 1/2), label 0: every number of the paper's Eq. 6 in closed form."""
    logits = torch.tensor([[0.5, 0.25, 0.25]], dtype=torch.float64).log().requires_grad_()
    ref_logits = torch.tensor([[0.25, 0.25, 0.5]], dtype=torch.float64).log()
    output = dense_loss(
        logits,
        torch.tensor([0]),
        torch.tensor([True]),
        objective=objective("asft", kl_weight=0.4, kl_direction=direction),
        ref_logits_TV=ref_logits,
    )
    log2 = math.log(2.0)
    forward_kl = -0.25 * log2 + 0.5 * log2
    reverse_kl = 0.5 * log2 - 0.25 * log2
    kl = {"forward": forward_kl, "reverse": reverse_kl}[direction]
    assert output.loss_sum.item() == pytest.approx(0.5 * log2 + 0.4 * kl, abs=1e-15)
    metrics = {name: (total.item(), count.item()) for name, (total, count) in output.metrics.items()}
    kl_name = {"forward": "kl", "reverse": "kl_reverse"}[direction]
    assert metrics == {
        "nll": pytest.approx((log2, 1), abs=1e-15),
        "weighted_nll": pytest.approx((0.5 * log2, 1), abs=1e-15),
        "token_weight": pytest.approx((0.5, 1), abs=1e-15),
        "high_weight_share": (0.0, 1),
        kl_name: pytest.approx((kl, 1), abs=1e-15),
    }
    output.loss_sum.backward()
    p, q = torch.tensor([0.5, 0.25, 0.25]).double(), torch.tensor([0.25, 0.25, 0.5]).double()
    d_kl = p - q if direction == "forward" else p * (p.log() - q.log() - kl)
    expected = 0.5 * (p - torch.tensor([1.0, 0.0, 0.0])) + 0.4 * d_kl
    assert worst((logits.grad[0], expected)) <= 1e-15


def test_psft_gradient_by_autograd_is_the_rows_weight_times_cross_entropy():
    case = make_case(tokens=200, seed=5)
    _, gradient_TV, _, _ = case.dense(objective("psft"))
    valid = case.loss_mask_T
    p_NV = case.logits_TV[valid].softmax(dim=1)
    labels_N = case.labels_T[valid]
    ratio_N = p_NV.gather(1, labels_N[:, None])[:, 0] / case.per_token["old_logprob_T"][valid].exp()
    weight_N = torch.where(ratio_N <= 1.28, ratio_N, torch.zeros_like(ratio_N))
    expected_NV = weight_N[:, None] * (p_NV - torch.nn.functional.one_hot(labels_N, case.vocab_size))
    assert worst((gradient_TV[valid], expected_NV)) <= 1e-12
    assert (ratio_N > 1.28).any(), "the case must reach the upper clip"
    assert (ratio_N < 0.8).any(), "the case must reach the lower clip"


def test_a_padded_vocabulary_given_as_minus_infinity_changes_nothing():
    case = make_case()
    padding = torch.full((case.logits_TV.shape[0], 5), -torch.inf, dtype=torch.float64)
    for name, direction in VARIANTS:
        chosen = variant_objective(name, direction)
        expected, gradient_TV, _, _ = case.dense(chosen)
        logits = torch.cat([case.logits_TV, padding], dim=1).requires_grad_()
        ref_logits = torch.cat([case.ref_logits_TV, padding], dim=1)
        ours = dense_loss(
            logits,
            case.labels_T,
            case.loss_mask_T,
            objective=chosen,
            ref_logits_TV=ref_logits,
            **case.per_token,
        )
        ours.loss_sum.backward()
        assert worst((ours.loss_sum, expected.loss_sum), (logits.grad[:, :-5], gradient_TV)) <= 1e-13
        assert (logits.grad[:, -5:] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_arithmetic_is_fp32_for_lower_precisions(dtype):
    case = make_case()
    logits = case.logits_TV.to(dtype).requires_grad_()
    output = dense_loss(
        logits,
        case.labels_T,
        case.loss_mask_T,
        objective=variant_objective("asft", "forward"),
        ref_logits_TV=case.ref_logits_TV.to(dtype),
    )
    assert output.loss_sum.dtype == torch.float32
    assert all(part.dtype == torch.float32 for pair in output.metrics.values() for part in pair)
    output.loss_sum.backward()
    assert logits.grad.dtype == dtype
    widened = dense_loss(
        logits.detach().float(),
        case.labels_T,
        case.loss_mask_T,
        objective=variant_objective("asft", "forward"),
        ref_logits_TV=case.ref_logits_TV.to(dtype).float(),
    )
    assert torch.equal(output.loss_sum, widened.loss_sum), "nothing is rounded on the way"
    assert all(torch.equal(output.metrics[name][0], total) for name, (total, _) in widened.metrics.items())


def test_a_label_outside_the_vocabulary_is_named_where_it_counts():
    case = make_case(vocab=11)
    labels = case.labels_T.clone()
    position = int(case.loss_mask_T.nonzero()[3])
    labels[position] = 11
    arguments = {"objective": objective("sft")}
    with pytest.raises(DataError, match=rf"label 11 at token {position} .*vocabulary of 11 rows"):
        dense_loss(case.logits_TV, labels, case.loss_mask_T, **arguments)
    mask = case.loss_mask_T.clone()
    mask[position] = False
    dense_loss(case.logits_TV, labels, mask, **arguments)


def test_what_an_objective_reads_must_be_given():
    case = make_case()
    base = (case.logits_TV, case.labels_T, case.loss_mask_T)
    with pytest.raises(ObjectiveError, match=r"kl_weight=0\.3 reads the reference .*reference=resident"):
        dense_loss(*base, objective=variant_objective("asft", "forward"))
    with pytest.raises(ObjectiveError, match="iw_sft reads segment_ids_T"):
        dense_loss(*base, objective=objective("iw_sft"), ref_logprob_T=case.per_token["ref_logprob_T"])
    with pytest.raises(ObjectiveError, match="psft reads old_logprob_T"):
        dense_loss(*base, objective=objective("psft"))

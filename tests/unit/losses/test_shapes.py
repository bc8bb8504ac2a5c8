"""The shapes of the public functions, checked where jaxtyping meets them."""

import pytest
from beartype import beartype
from jaxtyping import TypeCheckError, jaxtyped
from loss_cases import make_case, variant_objective

from asft_nemo.losses import (
    VocabShard,
    dense_loss,
    fused_label_logprob,
    fused_linear_loss,
    fused_linear_token_losses,
    vocab_parallel_loss,
)


def checked(function):
    return jaxtyped(typechecker=beartype)(function)


CASE = make_case()
ANCHORED = {"objective": variant_objective("asft", "forward")}
ON_LOGITS = [
    (dense_loss, ANCHORED | {"ref_logits_TV": CASE.ref_logits_TV}),
    (vocab_parallel_loss, ANCHORED | {"ref_logits_TV": CASE.ref_logits_TV, "shard": VocabShard.full(53)}),
]
REFERENCE = {"ref_hidden_TH": CASE.ref_hidden_TH, "ref_head_VH": CASE.ref_head_VH}
ON_HIDDEN = [
    (fused_linear_loss, ANCHORED | REFERENCE | {"shard": VocabShard.full(53)}),
    (fused_linear_token_losses, ANCHORED | REFERENCE | {"shard": VocabShard.full(53)}),
    (fused_label_logprob, {"shard": VocabShard.full(53)}),
]


@pytest.mark.parametrize(("function", "options"), ON_LOGITS)
def test_losses_of_logits(function, options):
    labels, mask, options = CASE.labels_T, CASE.loss_mask_T, dict(options)
    checked(function)(CASE.logits_TV, labels, mask, **options)
    for wrong in (
        (CASE.logits_TV[:5], labels, mask),
        (CASE.logits_TV, labels.float(), mask),
        (CASE.logits_TV, labels, mask.long()),
        (CASE.logits_TV, labels[:, None], mask),
    ):
        with pytest.raises(TypeCheckError):
            checked(function)(*wrong, **options)
    options["ref_logits_TV"] = CASE.ref_logits_TV[:, :9]
    with pytest.raises(TypeCheckError):
        checked(function)(CASE.logits_TV, labels, mask, **options)


@pytest.mark.parametrize(("function", "options"), ON_HIDDEN)
def test_losses_of_hidden_states(function, options):
    labels, mask = CASE.labels_T, CASE.loss_mask_T
    checked(function)(CASE.hidden_TH, CASE.head_VH, labels, mask, **options)
    for wrong in (
        (CASE.hidden_TH[:, :4], CASE.head_VH, labels, mask),
        (CASE.hidden_TH, CASE.head_VH, labels.int(), mask),
        (CASE.hidden_TH, CASE.head_VH, labels, mask[:3]),
        (CASE.hidden_TH.long(), CASE.head_VH, labels, mask),
    ):
        with pytest.raises(TypeCheckError):
            checked(function)(*wrong, **options)


def test_tensors_of_different_lengths_are_refused_without_jaxtyping_too():
    with pytest.raises(ValueError, match=r"loss_mask_T has shape \(3,\), labels_T has \(24,\)"):
        dense_loss(
            CASE.logits_TV, CASE.labels_T, CASE.loss_mask_T[:3], objective=variant_objective("sft", None)
        )
    with pytest.raises(ValueError, match="loss_mask_T must be bool"):
        dense_loss(
            CASE.logits_TV, CASE.labels_T, CASE.loss_mask_T.long(), objective=variant_objective("sft", None)
        )

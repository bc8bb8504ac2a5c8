"""The fused loss where only one of its inputs trains, or none, and where one rank is asked to behave like several."""

import pytest
import torch
from loss_cases import VARIANT_IDS, VARIANTS, make_case, variant_objective, worst

from asft_nemo.errors import ConfigError
from asft_nemo.losses import (
    HeadGradient,
    VocabShard,
    fused_label_logprob,
    fused_linear_loss,
    fused_linear_token_losses,
    row_blocks,
)

SCALE = 0.25


def gradients(case, chosen, *, hidden_trains, head_trains, shard=None, scale=SCALE, **options):
    """Loss sum, dHidden and dHead; None for what does not train."""
    hidden = case.hidden_TH.clone().requires_grad_(hidden_trains)
    head = case.head_VH.clone().requires_grad_(head_trains)
    output = fused_linear_loss(
        hidden,
        head,
        case.labels_T,
        case.loss_mask_T,
        objective=chosen,
        shard=shard or VocabShard.full(case.vocab_size),
        ref_hidden_TH=case.ref_hidden_TH,
        ref_head_VH=case.ref_head_VH,
        chunk_tokens=5,
        **case.per_token,
        **options,
    )
    if output.loss_sum.requires_grad:
        (output.loss_sum * scale).backward()
    return output.loss_sum.detach(), hidden.grad, head.grad


@pytest.mark.parametrize("gradients_in", ["forward", "backward"])
@pytest.mark.parametrize(("name", "direction"), VARIANTS, ids=VARIANT_IDS)
def test_what_does_not_train_gets_no_gradient_and_changes_none(name, direction, gradients_in):
    case, chosen = make_case(seed=4), variant_objective(name, direction)
    expected, _, hidden_TH, head_VH = case.dense(chosen)
    for hidden_trains, head_trains in ((True, False), (False, True), (True, True), (False, False)):
        loss, hidden, head = gradients(
            case, chosen, hidden_trains=hidden_trains, head_trains=head_trains, gradients_in=gradients_in
        )
        assert worst((loss, expected.loss_sum.detach())) <= 1e-12
        assert (hidden is not None, head is not None) == (hidden_trains, head_trains)
        if hidden_trains:
            assert worst((hidden, SCALE * hidden_TH)) <= 1e-12
        if head_trains:
            assert worst((head, SCALE * head_VH)) <= 1e-12


@pytest.mark.parametrize(
    ("gradients_in", "known"), [("forward", SCALE), ("forward", None), ("backward", None)]
)
def test_a_head_alone_adds_to_its_buffer(gradients_in, known):
    case, chosen = make_case(seed=6), variant_objective("asft", "reverse")
    _, _, _, expected = case.dense(chosen)
    buffer = torch.ones_like(case.head_VH)
    sink = HeadGradient(buffer, upstream_scale=known)
    _, hidden, head = gradients(
        case, chosen, hidden_trains=False, head_trains=True, gradients_in=gradients_in, head_gradient=sink
    )
    assert (hidden, head) == (None, None)
    assert worst((buffer, 1.0 + SCALE * expected)) <= 1e-12


@pytest.mark.parametrize("gradients_in", ["forward", "backward"])
def test_a_group_of_one_rank_may_say_sequence_parallel(gradients_in):
    """Gathers and scatters of one rank are nothing."""
    case, chosen = make_case(seed=8), variant_objective("asft", "forward")
    _, _, hidden_TH, head_VH = case.dense(chosen)
    shard = VocabShard.of_rank(0, 1, case.vocab_size, case.vocab_size, None, sequence_parallel=True)
    _, hidden, head = gradients(
        case, chosen, hidden_trains=True, head_trains=True, shard=shard, gradients_in=gradients_in
    )
    assert worst((hidden, SCALE * hidden_TH), (head, SCALE * head_VH)) <= 1e-12


def test_another_factor_than_was_said_is_told_whole():
    case, buffer = make_case(), torch.zeros(53, 6, dtype=torch.float64)
    with pytest.raises(RuntimeError) as stopped:
        gradients(
            case,
            variant_objective("sft", None),
            hidden_trains=True,
            head_trains=True,
            scale=0.5,
            head_gradient=HeadGradient(buffer, 1.0),
        )
    assert str(stopped.value) == (
        "the loss sum was multiplied by 0.5 before backward, upstream_scale said 1, and the head's gradient is already added: pass the "
        "factor that is used"
    )


def test_rows_that_fit_no_labels_are_told_whole():
    case, chosen = make_case(), variant_objective("asft", "forward")
    case.ref_hidden_TH = case.ref_hidden_TH[:12]
    with pytest.raises(ValueError) as refused:
        gradients(case, chosen, hidden_trains=True, head_trains=True)
    assert str(refused.value) == (
        "ref_hidden_TH has 12 rows on each of 1 rank(s) and there are 24 labels: under sequence parallelism pass this rank's part of the "
        "hidden states and all labels"
    )
    with pytest.raises(ValueError) as refused:
        gradients(make_case(), chosen, hidden_trains=True, head_trains=True, gradients_in="later")
    assert str(refused.value) == "gradients_in='later': choose forward or backward"


def losses_of_tokens(case, chosen, hidden, head, **options):
    return fused_linear_token_losses(
        hidden,
        head,
        case.labels_T,
        case.loss_mask_T,
        objective=chosen,
        shard=VocabShard.full(case.vocab_size),
        ref_hidden_TH=case.ref_hidden_TH,
        ref_head_VH=case.ref_head_VH,
        **case.per_token,
        **options,
    )


@pytest.mark.parametrize(
    ("hidden_trains", "head_trains"), [(True, False), (False, True), (True, True), (False, False)]
)
def test_losses_of_tokens_where_not_everything_trains(hidden_trains, head_trains):
    case, chosen = make_case(seed=4), variant_objective("asft", "reverse")
    expected, _, hidden_TH, head_VH = case.dense(chosen)
    hidden = case.hidden_TH.clone().requires_grad_(hidden_trains)
    head = case.head_VH.clone().requires_grad_(head_trains)
    losses_T = losses_of_tokens(case, chosen, hidden, head)
    assert worst((losses_T.sum(), expected.loss_sum)) <= 1e-12
    assert losses_T.requires_grad == (hidden_trains or head_trains)
    if not losses_T.requires_grad:
        return
    (SCALE * losses_T).sum().backward()
    for gradient, trains, whole in (
        (hidden.grad, hidden_trains, hidden_TH),
        (head.grad, head_trains, head_VH),
    ):
        assert (gradient is not None) == trains
        if trains:
            assert worst((gradient, SCALE * whole)) <= 1e-12


def test_losses_of_tokens_without_gradients_are_the_same():
    case, chosen = make_case(seed=4), variant_objective("asft", "forward")
    hidden, head = case.hidden_TH.requires_grad_(), case.head_VH.requires_grad_()
    expected = losses_of_tokens(case, chosen, hidden, head)
    with torch.no_grad():
        losses_T = losses_of_tokens(case, chosen, hidden, head)
    assert not losses_T.requires_grad
    assert torch.equal(losses_T, expected)


def test_losses_of_tokens_add_the_heads_gradient_to_its_buffer():
    case, chosen = make_case(seed=6), variant_objective("asft", "forward")
    _, _, hidden_TH, head_VH = case.dense(chosen)
    hidden, head = case.hidden_TH.clone().requires_grad_(), case.head_VH.clone().requires_grad_()
    buffer = torch.ones_like(case.head_VH)
    losses_T = losses_of_tokens(case, chosen, hidden, head, head_gradient=HeadGradient(buffer))
    (SCALE * losses_T).sum().backward()
    assert head.grad is None
    assert worst((hidden.grad, SCALE * hidden_TH), (buffer, 1.0 + SCALE * head_VH)) <= 1e-12


def test_log_probabilities_take_chunks_as_the_losses_do():
    case = make_case()

    def logprob(**options):
        shard = VocabShard.full(case.vocab_size)
        return fused_label_logprob(
            case.hidden_TH, case.head_VH, case.labels_T, case.loss_mask_T, shard=shard, **options
        )

    assert worst((logprob(chunk_tokens=5), logprob())) <= 1e-12
    with pytest.raises(ConfigError, match=r"loss\.chunk_tokens=0 "):
        logprob(chunk_tokens=0)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_factors_of_tokens_follow_them_into_blocks_of_rows(direction, monkeypatch):
    case, chosen = make_case(seed=7), variant_objective("asft", direction)
    factors_T = torch.linspace(-1.0, 2.0, 24, dtype=torch.float64)

    def in_blocks_of(rows):
        monkeypatch.setattr(row_blocks, "_BLOCK_BYTES", rows * case.vocab_size * 8)
        hidden, head = case.hidden_TH.clone().requires_grad_(), case.head_VH.clone().requires_grad_()
        losses_T = losses_of_tokens(case, chosen, hidden, head)
        (factors_T * losses_T).sum().backward()
        return losses_T, hidden.grad, head.grad

    assert worst(*zip(in_blocks_of(5), in_blocks_of(24), strict=True)) <= 1e-12

"""The fused loss on one rank against the definition; over ranks see tests/multiproc/losses."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_cases import (
    VARIANT_IDS,
    VARIANTS,
    freeze_weight,
    fused,
    make_case,
    metric_pairs,
    variant_objective,
    worst,
)
from torch.utils._python_dispatch import TorchDispatchMode

from asft_nemo.errors import ConfigError, DataError, LayoutError, ObjectiveError
from asft_nemo.losses import (
    VocabShard,
    fused_label_logprob,
    fused_linear_loss,
    fused_linear_token_losses,
    row_blocks,
)
from asft_nemo.objectives import objective

TOKEN_SCOPE = [(name, direction) for name, direction in VARIANTS if name != "iw_sft"]


@pytest.mark.parametrize(("name", "direction"), VARIANTS, ids=VARIANT_IDS)
@pytest.mark.parametrize("gradients_in", ["forward", "backward"])
@pytest.mark.parametrize("chunk_tokens", ["auto", 1, 7, 1000])
def test_equals_the_definition(name, direction, gradients_in, chunk_tokens):
    case = make_case()
    chosen = variant_objective(name, direction)
    expected, _, hidden_gradient, head_gradient = case.dense(chosen)
    ours = fused(case, chosen, padding=3, gradients_in=gradients_in, chunk_tokens=chunk_tokens)
    assert worst((ours.output.loss_sum, expected.loss_sum)) <= 1e-12
    assert worst((ours.hidden, hidden_gradient), (ours.head[:-3], head_gradient)) <= 1e-12
    assert worst(*metric_pairs(ours.output, expected)) <= 1e-12
    assert ours.output.num_tokens == expected.num_tokens
    assert (ours.head[-3:] == 0).all(), "padded rows have no gradient"
    assert (ours.hidden[~case.loss_mask_T] == 0).all(), "masked tokens have no gradient"


@pytest.mark.parametrize(("name", "direction"), VARIANTS, ids=VARIANT_IDS)
@pytest.mark.parametrize("gradients_in", ["forward", "backward"])
def test_a_chunk_of_several_blocks_of_rows(name, direction, gradients_in, monkeypatch):
    """17 valid tokens, 5 rows at a time: what a visit leaves behind for its gradient is that of all of them."""
    case, chosen = make_case(), variant_objective(name, direction)
    monkeypatch.setattr(row_blocks, "_BLOCK_BYTES", 5 * case.vocab_size * 8)
    expected, _, hidden_gradient, head_gradient = case.dense(chosen)
    ours = fused(case, chosen, gradients_in=gradients_in)
    assert worst((ours.output.loss_sum, expected.loss_sum)) <= 1e-12
    assert worst((ours.hidden, hidden_gradient), (ours.head, head_gradient)) <= 1e-12
    assert worst(*metric_pairs(ours.output, expected)) <= 1e-12


@pytest.mark.parametrize("missing", ["ref_hidden_TH", "ref_head_VH"])
def test_half_a_reference_is_none(missing):
    case, chosen = make_case(), variant_objective("asft", "forward")
    given = {"ref_hidden_TH": case.ref_hidden_TH, "ref_head_VH": case.ref_head_VH, missing: None}
    shard = VocabShard.full(case.vocab_size)
    with pytest.raises(ObjectiveError, match="reference"):
        fused_linear_loss(
            case.hidden_TH,
            case.head_VH,
            case.labels_T,
            case.loss_mask_T,
            objective=chosen,
            shard=shard,
            **given,
        )


@pytest.mark.parametrize(("name", "direction"), VARIANTS, ids=VARIANT_IDS)
@pytest.mark.parametrize("gradients_in", ["forward", "backward"])
def test_gradient_is_the_numeric_derivative_at_frozen_weights(name, direction, gradients_in):
    case = make_case(tokens=5, vocab=23, hidden=3, seed=3)
    frozen = freeze_weight(variant_objective(name, direction), case)

    def value(hidden_TH, head_VH):
        return fused_linear_loss(
            hidden_TH,
            head_VH,
            case.labels_T,
            case.loss_mask_T,
            objective=frozen,
            shard=VocabShard.full(case.vocab_size),
            ref_hidden_TH=case.ref_hidden_TH,
            ref_head_VH=case.ref_head_VH,
            gradients_in=gradients_in,
            **case.per_token,
        ).loss_sum

    inputs = (case.hidden_TH.requires_grad_(), case.head_VH.requires_grad_())
    assert torch.autograd.gradcheck(value, inputs, eps=1e-6, atol=1e-8, rtol=1e-6, fast_mode=False)


@pytest.mark.parametrize(("name", "direction"), VARIANTS, ids=VARIANT_IDS)
def test_order_of_tokens_and_padding_tokens_do_not_matter(name, direction):
    case = make_case()
    chosen = variant_objective(name, direction)
    plain = fused(case, chosen, chunk_tokens=5)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(1))
    shuffled = fused(case.tokens(order), chosen, chunk_tokens=4)
    assert worst((shuffled.output.loss_sum, plain.output.loss_sum), (shuffled.head, plain.head)) <= 1e-12
    assert worst((shuffled.hidden, plain.hidden[order])) <= 1e-12
    twice = case.tokens(torch.arange(48) % 24)
    padded = replace(twice, loss_mask_T=twice.loss_mask_T & (torch.arange(48) < 24))
    padded.hidden_TH[24:] = torch.nan  # padding never reaches the head
    padded = fused(padded, chosen, chunk_tokens=5)
    assert torch.equal(padded.output.loss_sum, plain.output.loss_sum)
    assert torch.equal(padded.head, plain.head)
    assert torch.equal(padded.hidden[:24], plain.hidden)


@pytest.mark.parametrize(("name", "direction"), TOKEN_SCOPE)
def test_every_token_may_have_its_own_upstream_factor(name, direction):
    case = make_case(tokens=12)
    chosen = variant_objective(name, direction)
    factors = torch.randn(12, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    hidden = case.hidden_TH.clone().requires_grad_()
    head = case.head_VH.clone().requires_grad_()
    losses = fused_linear_token_losses(
        hidden,
        head,
        case.labels_T,
        case.loss_mask_T,
        objective=chosen,
        shard=VocabShard.full(case.vocab_size),
        ref_hidden_TH=case.ref_hidden_TH,
        ref_head_VH=case.ref_head_VH,
        chunk_tokens=5,
        **case.per_token,
    )
    (losses * factors).sum().backward()
    expected_hidden, expected_head = torch.zeros_like(hidden), torch.zeros_like(head)
    for token in range(12):
        alone = replace(case, loss_mask_T=case.loss_mask_T & (torch.arange(12) == token))
        output, _, hidden_gradient, head_gradient = alone.dense(chosen)
        assert losses[token].item() == pytest.approx(output.loss_sum.item(), abs=1e-12)
        expected_hidden += factors[token] * hidden_gradient
        expected_head += factors[token] * head_gradient
    assert worst((hidden.grad, expected_hidden), (head.grad, expected_head)) <= 1e-12


def test_label_logprob_is_what_iw_sft_and_psft_read():
    case = make_case()
    ours = fused_label_logprob(
        case.ref_hidden_TH,
        case.ref_head_VH.requires_grad_(),
        case.labels_T,
        case.loss_mask_T,
        shard=VocabShard.full(case.vocab_size),
        chunk_tokens=5,
    )
    valid = case.loss_mask_T
    logp = case.ref_logits_TV.log_softmax(dim=1)[valid].gather(1, case.labels_T[valid][:, None])[:, 0]
    assert worst((ours[valid], logp)) <= 1e-12
    assert (ours[~valid] == 0).all()
    assert not ours.requires_grad


@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_equal_models_have_no_divergence_and_no_pull(direction, dtype):
    case = make_case(dtype=dtype, drift=0.0)
    ours = fused(case, variant_objective("asft", direction))
    plain = fused(case, objective("dft"))
    assert ours.output.metrics[{"forward": "kl", "reverse": "kl_reverse"}[direction]][0].item() == 0.0
    assert torch.equal(ours.output.loss_sum, plain.output.loss_sum)
    assert torch.equal(ours.hidden, plain.hidden)
    assert torch.equal(ours.head, plain.head)


@pytest.mark.parametrize("gradients_in", ["forward", "backward"])
@pytest.mark.parametrize(("name", "direction"), VARIANTS, ids=VARIANT_IDS)
def test_without_a_valid_token_the_loss_is_zero_and_attached(name, direction, gradients_in):
    case = make_case(valid_share=0.0)
    ours = fused(case, variant_objective(name, direction), gradients_in=gradients_in)
    assert ours.output.loss_sum.item() == 0.0
    assert ours.output.loss_sum.requires_grad
    assert ours.output.num_tokens.item() == 0
    assert (ours.hidden == 0).all()
    assert (ours.head == 0).all()


class TensorSizes(TorchDispatchMode):
    """Records the largest tensor any operation returns, and the matrix products."""

    def __init__(self):
        super().__init__()
        self.largest = 0
        self.gemms = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        outputs = result if isinstance(result, (tuple, list)) else (result,)
        self.largest = max([self.largest, *(out.numel() for out in outputs if isinstance(out, torch.Tensor))])
        self.gemms += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_)
        return result


@pytest.mark.parametrize(
    ("name", "gradients_in", "head_trains", "grad_enabled", "gemms"),
    [
        ("sft", "forward", True, True, 3),
        ("asft", "forward", True, True, 4),
        ("asft", "forward", False, True, 3),
        ("asft", "backward", True, True, 6),
        ("sft", "backward", True, True, 4),
        ("iw_sft", "forward", True, True, 4),
        ("sft", "forward", True, False, 1),
        ("asft", "forward", True, False, 2),
    ],
)
def test_head_gemms_and_no_logits_of_all_tokens(name, gradients_in, head_trains, grad_enabled, gemms):
    case = make_case(tokens=64, vocab=40, hidden=4, valid_share=1.1)
    hidden, head = case.hidden_TH.requires_grad_(), case.head_VH.requires_grad_(head_trains)
    with TensorSizes() as sizes, torch.set_grad_enabled(grad_enabled):
        output = fused_linear_loss(
            hidden,
            head,
            case.labels_T,
            case.loss_mask_T,
            objective=variant_objective(name, None),
            shard=VocabShard.full(40),
            ref_hidden_TH=case.ref_hidden_TH,
            ref_head_VH=case.ref_head_VH,
            chunk_tokens=16,
            gradients_in=gradients_in,
            **case.per_token,
        )
        if grad_enabled:
            output.loss_sum.backward()
    chunks = 4
    assert sizes.gemms == gemms * chunks
    assert sizes.largest == 16 * 40, "nothing larger than a chunk's logits"
    assert output.loss_sum.requires_grad == grad_enabled


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    tokens=st.integers(1, 9),
    vocab=st.integers(1, 40),
    padding=st.integers(0, 5),
    scale=st.sampled_from([1e-3, 1.0, 1e4]),
    variant=st.sampled_from(VARIANTS),
    valid_share=st.sampled_from([0.0, 0.3, 1.1]),
    chunk_tokens=st.sampled_from([1, 3, "auto"]),
)
def test_any_shape_mask_and_magnitude(
    seed, tokens, vocab, padding, scale, variant, valid_share, chunk_tokens
):
    case = make_case(tokens=tokens, vocab=vocab, hidden=3, seed=seed, valid_share=valid_share)
    case = replace(case, hidden_TH=case.hidden_TH * scale, ref_hidden_TH=case.ref_hidden_TH * scale)
    chosen = variant_objective(*variant)
    expected, _, hidden_gradient, head_gradient = case.dense(chosen)
    ours = fused(case, chosen, padding=padding, chunk_tokens=chunk_tokens)
    assert torch.isfinite(ours.output.loss_sum)
    assert worst((ours.output.loss_sum, expected.loss_sum), (ours.hidden, hidden_gradient)) <= 1e-10
    unit = max(
        1.0, scale
    )  # a head gradient is logit gradients times hidden states: its rounding errors grow with them
    assert worst((ours.head[:vocab] / unit, head_gradient / unit)) <= 1e-10


def test_dhidden_and_dhead_keep_the_dtypes_of_their_inputs():
    case = make_case(dtype=torch.bfloat16)
    ours = fused(case, variant_objective("asft", "forward"))
    assert (ours.hidden.dtype, ours.head.dtype) == (torch.bfloat16, torch.bfloat16)
    assert ours.output.loss_sum.dtype == torch.float32


@pytest.mark.parametrize("gradients_in", ["forward", "backward"])
def test_a_loss_of_no_token_is_fp32_too(gradients_in):
    case = make_case(dtype=torch.bfloat16, valid_share=0.0)
    output = fused(case, variant_objective("asft", "forward"), gradients_in=gradients_in).output
    assert output.loss_sum.dtype == torch.float32
    assert {total.dtype for total, _ in output.metrics.values()} == {torch.float32}


@pytest.mark.parametrize("chunk_tokens", [0, -1, 2.5, True, "many", None])
def test_a_chunk_without_tokens_is_refused(chunk_tokens):
    with pytest.raises(ConfigError, match=r"loss\.chunk_tokens=.* set it to auto or to a whole number"):
        fused(make_case(), objective("sft"), chunk_tokens=chunk_tokens)


def test_bad_input_is_said():
    case = make_case()
    arguments = {"objective": objective("sft"), "shard": VocabShard.full(case.vocab_size)}
    labels, mask = case.labels_T.clone(), case.loss_mask_T.clone()
    labels[0], mask[0] = 53, True
    with pytest.raises(DataError, match="label 53 at token 0 "):
        fused_linear_loss(case.hidden_TH, case.head_VH, labels, mask, **arguments)
    base = (case.labels_T, case.loss_mask_T)
    with pytest.raises(LayoutError, match="the head has 50 vocabulary rows"):
        fused_linear_loss(case.hidden_TH, case.head_VH[:50], *base, **arguments)
    with pytest.raises(ValueError, match=r"hidden_TH has 12 rows .* 24 labels"):
        fused_linear_loss(case.hidden_TH[:12], case.head_VH, *base, **arguments)
    with pytest.raises(ValueError, match="gradients_in='later'"):
        fused_linear_loss(case.hidden_TH, case.head_VH, *base, gradients_in="later", **arguments)
    arguments["objective"] = variant_objective("asft", "forward")
    with pytest.raises(ObjectiveError, match="reads the reference and got none"):
        fused_linear_loss(case.hidden_TH, case.head_VH, *base, ref_hidden_TH=case.ref_hidden_TH, **arguments)
    with pytest.raises(LayoutError, match="the reference's head has 50"):
        fused_linear_loss(
            case.hidden_TH,
            case.head_VH,
            *base,
            ref_hidden_TH=case.ref_hidden_TH,
            ref_head_VH=case.ref_head_VH[:50],
            **arguments,
        )


def test_a_reference_of_another_hidden_size():
    case = make_case()
    wide = replace(
        case,
        ref_hidden_TH=torch.cat([case.ref_hidden_TH, case.ref_hidden_TH], dim=1) / 2,
        ref_head_VH=torch.cat([case.ref_head_VH, case.ref_head_VH], dim=1),
    )
    chosen = variant_objective("asft", "forward")
    assert math.isclose(
        fused(wide, chosen).output.loss_sum.item(), fused(case, chosen).output.loss_sum.item(), abs_tol=1e-12
    )

"""The sharded loss on one rank against the definition; over ranks see tests/multiproc/losses."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_cases import (
    VARIANT_IDS,
    VARIANTS,
    freeze_weight,
    make_case,
    metric_pairs,
    variant_objective,
    worst,
)

from asft_nemo.errors import DataError, LayoutError
from asft_nemo.losses import VocabShard, chunks, dense_loss, row_blocks, vocab_parallel, vocab_parallel_loss
from asft_nemo.objectives import objective


def sharded(case, chosen, *, padding=0, logits=None, ref_logits=None):
    """Loss and dLogits of `vocab_parallel_loss` on one rank, the padded columns filled with NaN."""
    logits = case.logits_TV if logits is None else logits
    ref_logits = case.ref_logits_TV if ref_logits is None else ref_logits
    junk = torch.full((logits.shape[0], padding), torch.nan, dtype=logits.dtype)
    logits = torch.cat([logits, junk], dim=1).requires_grad_()
    shard = VocabShard.of_rank(0, 1, case.vocab_size + padding, case.vocab_size, None)
    output = vocab_parallel_loss(
        logits,
        case.labels_T,
        case.loss_mask_T,
        objective=chosen,
        shard=shard,
        ref_logits_TV=torch.cat([ref_logits, junk.to(ref_logits.dtype)], dim=1),
        **case.per_token,
    )
    output.loss_sum.backward()
    return output, logits.grad


@pytest.mark.parametrize(("name", "direction"), VARIANTS, ids=VARIANT_IDS)
@pytest.mark.parametrize("chunk_bytes", [chunks.CPU_CHUNK_BYTES, 3000], ids=["one-chunk", "many-chunks"])
def test_equals_the_definition(name, direction, chunk_bytes, monkeypatch):
    monkeypatch.setattr(chunks, "CPU_CHUNK_BYTES", chunk_bytes)
    case = make_case()
    chosen = variant_objective(name, direction)
    expected, gradient_TV, _, _ = case.dense(chosen)
    ours, our_gradient_TV = sharded(case, chosen, padding=4)
    assert worst((ours.loss_sum, expected.loss_sum), (our_gradient_TV[:, :-4], gradient_TV)) <= 1e-12
    assert worst(*metric_pairs(ours, expected)) <= 1e-12
    assert ours.num_tokens == expected.num_tokens == case.loss_mask_T.sum()
    assert (our_gradient_TV[:, -4:] == 0).all(), "padded columns have no gradient"
    assert our_gradient_TV[:, :-4].sum(dim=1).abs().max() <= 1e-13, (
        "a softmax has no gradient along constants"
    )
    assert (our_gradient_TV[~case.loss_mask_T] == 0).all(), "masked tokens have no gradient"


@pytest.mark.parametrize(("name", "direction"), [("asft", "forward"), ("asft", "reverse"), ("sft", None)])
def test_a_chunk_of_several_blocks_of_rows(name, direction, monkeypatch):
    """17 valid tokens, 5 rows at a time."""
    case, chosen = make_case(), variant_objective(name, direction)
    monkeypatch.setattr(row_blocks, "_BLOCK_BYTES", 5 * case.vocab_size * 8)
    expected, gradient_TV, _, _ = case.dense(chosen)
    ours, our_gradient_TV = sharded(case, chosen)
    assert worst((ours.loss_sum, expected.loss_sum), (our_gradient_TV, gradient_TV)) <= 1e-12
    assert worst(*metric_pairs(ours, expected)) <= 1e-12


def test_chunks_of_fp64_logits_keep_within_the_bytes(monkeypatch):
    case, rows = make_case(valid_share=1.1), []
    local_statistics = vocab_parallel.local_statistics

    def counted(objective, logits_NV, *rest):
        rows.append(len(logits_NV))
        return local_statistics(objective, logits_NV, *rest)

    monkeypatch.setattr(vocab_parallel, "local_statistics", counted)
    monkeypatch.setattr(chunks, "CPU_CHUNK_BYTES", 4 * case.vocab_size * (8 + 2))
    sharded(case, objective("sft"))
    assert rows == [4] * 6


@pytest.mark.parametrize(("name", "direction"), VARIANTS, ids=VARIANT_IDS)
def test_gradient_is_the_numeric_derivative_at_frozen_weights(name, direction):
    case = make_case(tokens=6, vocab=23, seed=3)
    frozen = freeze_weight(variant_objective(name, direction), case)

    def value(logits):
        return vocab_parallel_loss(
            logits,
            case.labels_T,
            case.loss_mask_T,
            objective=frozen,
            shard=VocabShard.full(case.vocab_size),
            ref_logits_TV=case.ref_logits_TV,
            **case.per_token,
        ).loss_sum

    logits_TV = case.logits_TV.requires_grad_()
    assert torch.autograd.gradcheck(value, (logits_TV,), eps=1e-6, atol=1e-8, rtol=1e-6, nondet_tol=0.0)


def test_upstream_scale_reaches_the_gradient():
    case = make_case()
    chosen = variant_objective("asft", "reverse")
    _, gradient_TV, _, _ = case.dense(chosen)
    logits = case.logits_TV.requires_grad_()
    output = vocab_parallel_loss(
        logits,
        case.labels_T,
        case.loss_mask_T,
        objective=chosen,
        shard=VocabShard.full(case.vocab_size),
        ref_logits_TV=case.ref_logits_TV,
    )
    (output.loss_sum * -2.5).backward()
    assert worst((logits.grad, -2.5 * gradient_TV)) <= 1e-12


@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_equal_models_have_no_divergence_and_no_pull(direction, dtype):
    case = make_case()
    same = case.logits_TV.to(dtype)
    ours, gradient = sharded(case, variant_objective("asft", direction), logits=same, ref_logits=same)
    plain, plain_gradient = sharded(case, objective("dft"), logits=same, ref_logits=same)
    name = {"forward": "kl", "reverse": "kl_reverse"}[direction]
    assert ours.metrics[name][0].item() == 0.0
    assert torch.equal(ours.loss_sum, plain.loss_sum)
    assert torch.equal(gradient, plain_gradient)


def test_kl_weight_zero_is_dft_exactly():
    case = make_case()
    ours, gradient = sharded(case, objective("asft", kl_weight=0.0))
    plain, plain_gradient = sharded(case, objective("dft"))
    assert torch.equal(ours.loss_sum, plain.loss_sum)
    assert torch.equal(gradient, plain_gradient)
    assert list(ours.metrics) == ["nll", "weighted_nll", "token_weight", "high_weight_share"]
    definition, _, _, _ = case.dense(objective("asft", kl_weight=0.0))
    assert torch.equal(definition.loss_sum, case.dense(objective("dft"))[0].loss_sum)


def test_sft_is_torchs_cross_entropy():
    case = make_case()
    ours, gradient = sharded(case, objective("sft"))
    logits = case.logits_TV.requires_grad_()
    loss = torch.nn.functional.cross_entropy(logits, case.labels_T, ignore_index=-100, reduction="sum")
    loss.backward()
    assert worst((ours.loss_sum, loss), (gradient, logits.grad)) <= 1e-12


@pytest.mark.parametrize(("name", "direction"), VARIANTS, ids=VARIANT_IDS)
def test_without_a_valid_token_the_loss_is_zero_and_attached(name, direction):
    case = make_case(valid_share=0.0)
    for output, gradient in (
        case.dense(variant_objective(name, direction))[:2],
        sharded(case, variant_objective(name, direction), padding=3),
    ):
        assert output.loss_sum.item() == 0.0
        assert output.loss_sum.requires_grad
        assert output.num_tokens.item() == 0
        assert output.num_tokens.dtype == torch.int64
        assert (gradient == 0).all()
        assert all(total == 0 and count == 0 for total, count in output.metrics.values())


def test_no_gradient_is_prepared_under_no_grad():
    case = make_case()
    with torch.no_grad():
        output = vocab_parallel_loss(
            case.logits_TV.requires_grad_(),
            case.labels_T,
            case.loss_mask_T,
            objective=objective("sft"),
            shard=VocabShard.full(case.vocab_size),
        )
    assert not output.loss_sum.requires_grad


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    tokens=st.integers(1, 9),
    vocab=st.integers(1, 40),
    padding=st.integers(0, 5),
    scale=st.sampled_from([1e-3, 1.0, 50.0, 1e4]),
    offset=st.sampled_from([0.0, 1e4, -1e4]),
    variant=st.sampled_from(VARIANTS),
    valid_share=st.sampled_from([0.0, 0.3, 1.0]),
)
def test_any_shape_mask_and_magnitude(seed, tokens, vocab, padding, scale, offset, variant, valid_share):
    """Extreme logits, one valid token or none, tiny vocabularies: finite, and equal to the definition."""
    case = make_case(tokens=tokens, vocab=vocab, hidden=3, seed=seed, valid_share=valid_share)
    chosen = variant_objective(*variant)
    logits, ref_logits = case.logits_TV * scale + offset, case.ref_logits_TV * scale - offset
    case.per_token["ref_logprob_T"].clamp_(min=-20.0)
    definition_logits = logits.clone().requires_grad_()
    expected = dense_loss(
        definition_logits,
        case.labels_T,
        case.loss_mask_T,
        objective=chosen,
        ref_logits_TV=ref_logits,
        **case.per_token,
    )
    expected.loss_sum.backward()
    ours, gradient = sharded(case, chosen, padding=padding, logits=logits, ref_logits=ref_logits)
    assert torch.isfinite(ours.loss_sum)
    assert torch.isfinite(gradient).all()
    assert worst((ours.loss_sum, expected.loss_sum), (gradient[:, :vocab], definition_logits.grad)) <= 1e-10
    assert (gradient[:, vocab:] == 0).all()


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_bf16_logits_are_as_good_as_their_own_rounding(direction):
    """Against fp64 on the same bf16 logits only the rounding of dLogits remains: relative 2^-8."""
    case = make_case(tokens=64, vocab=400)
    logits, ref_logits = case.logits_TV.bfloat16(), case.ref_logits_TV.bfloat16()
    chosen = variant_objective("asft", direction)
    exact, exact_gradient = sharded(case, chosen, logits=logits.double(), ref_logits=ref_logits.double())
    ours, gradient = sharded(case, chosen, logits=logits, ref_logits=ref_logits)
    assert ours.loss_sum.dtype == torch.float32
    assert gradient.dtype == torch.bfloat16
    assert ours.loss_sum.item() == pytest.approx(exact.loss_sum.item(), rel=1e-5)
    error = (gradient.double() - exact_gradient).abs() / exact_gradient.abs().clamp(min=1e-6)
    assert error.max() <= 2**-8 * 1.001 + 1e-4


def test_bad_input_is_said():
    case = make_case()
    shard = VocabShard.full(case.vocab_size)
    labels = case.labels_T.masked_fill(case.loss_mask_T, -3)
    with pytest.raises(DataError, match="label -3 at token"):
        vocab_parallel_loss(case.logits_TV, labels, case.loss_mask_T, objective=objective("sft"), shard=shard)
    with pytest.raises(LayoutError, match="53 vocabulary rows on rank 0, its shard has 64"):
        vocab_parallel_loss(
            case.logits_TV,
            case.labels_T,
            case.loss_mask_T,
            objective=objective("sft"),
            shard=VocabShard.of_rank(0, 1, 64, 53, None),
        )

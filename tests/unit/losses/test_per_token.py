"""Which tokens count, what is kept of each, and how a loss refuses what does not fit, sentence by sentence."""

import pytest
import torch
from loss_cases import make_case, worst

from asft_nemo.errors import ConfigError, DataError, LayoutError, ObjectiveError
from asft_nemo.losses import VocabShard, dense_loss, fused_linear_loss, vocab_parallel_loss
from asft_nemo.losses.chunks import resolve_chunk_tokens
from asft_nemo.losses.logit_grad import logit_gradient
from asft_nemo.losses.per_token import accumulation_dtype, require_reference, valid_tokens
from asft_nemo.losses.reduce import HIGH_WEIGHT, metric_names, metrics_of_tokens
from asft_nemo.losses.statistics import Exponentials, TokenStatistics
from asft_nemo.objectives import objective

LABELS = torch.tensor([3, -100, 0, 9, -100])
MASK = torch.tensor([True, False, True, True, False])
NUMBERS = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5])


def kept(name="sft", labels=LABELS, mask=MASK, vocab=10, **per_token):
    given = {"segment_ids_T": None, "ref_logprob_T": None, "old_logprob_T": None} | per_token
    return valid_tokens(labels, mask, objective(name), vocab, **given)


def refusal(kind, call, *arguments, **named):
    with pytest.raises(kind) as refused:
        call(*arguments, **named)
    return str(refused.value)


def test_valid_tokens_keep_their_order_and_what_the_objective_reads():
    tokens = kept("iw_sft", segment_ids_T=torch.arange(5), ref_logprob_T=NUMBERS, old_logprob_T=NUMBERS)
    assert (tokens.count, tokens.num_tokens, tokens.everything_valid) == (3, 5, False)
    assert tokens.index_N.tolist() == [0, 2, 3]
    assert tokens.labels_N.tolist() == [3, 0, 9]
    assert tokens.segment_ids_N.tolist() == [0, 2, 3]
    assert tokens.ref_logprob_N.tolist() == NUMBERS[[0, 2, 3]].tolist()
    assert tokens.old_logprob_N is None, "iw_sft reads no snapshot"
    part = tokens.weight_inputs(torch.zeros(2), None, slice(1, 3))
    assert part.segment_ids_N.tolist() == [2, 3]
    assert part.ref_label_logprob_N.tolist() == NUMBERS[[2, 3]].tolist()


def test_psft_keeps_the_snapshot_alone():
    tokens = kept("psft", segment_ids_T=torch.arange(5), ref_logprob_T=NUMBERS, old_logprob_T=NUMBERS)
    assert (tokens.segment_ids_N, tokens.ref_logprob_N) == (None, None)
    assert (
        tokens.weight_inputs(torch.zeros(3), None, slice(None)).old_label_logprob_N.tolist()
        == NUMBERS[[0, 2, 3]].tolist()
    )


def test_what_is_kept_takes_no_gradient():
    numbers = NUMBERS.clone().requires_grad_()
    assert not kept("psft", old_logprob_T=numbers).old_logprob_N.requires_grad


def test_rows_come_and_go_at_their_places():
    tokens = kept()
    rows = torch.arange(10.0).view(5, 2)
    assert tokens.select(rows).tolist() == rows[[0, 2, 3]].tolist()
    assert tokens.scatter(torch.ones(3, 2)).tolist() == [[1, 1], [0, 0], [1, 1], [1, 1], [0, 0]]
    everything = kept(labels=torch.tensor([1, 2]), mask=torch.tensor([True, True]))
    assert everything.everything_valid
    assert everything.select(rows) is rows, "no copy where every token counts"
    assert everything.scatter(rows) is rows


@pytest.mark.parametrize("label", [-1, 10])
def test_labels_outside_the_vocabulary_are_counted_and_the_first_is_named(label):
    labels = torch.tensor([3, -100, 0, label, label])
    mask = torch.tensor([True, False, True, True, True])
    assert refusal(DataError, kept, labels=labels, mask=mask) == (
        f"label {label} at token 3 counts in the loss and is outside the vocabulary of 10 rows (2 such labels): mask it, or use the "
        "tokenizer the model was trained with"
    )


def test_the_ends_of_the_vocabulary_are_labels():
    assert kept(labels=torch.tensor([0, 9]), mask=torch.tensor([True, True])).count == 2


@pytest.mark.parametrize(
    ("name", "missing"), [("iw_sft", "segment_ids_T"), ("iw_sft", "ref_logprob_T"), ("psft", "old_logprob_T")]
)
def test_what_is_read_per_token_must_be_given(name, missing):
    given = {
        "segment_ids_T": torch.arange(5),
        "ref_logprob_T": NUMBERS,
        "old_logprob_T": NUMBERS,
        missing: None,
    }
    said = refusal(ObjectiveError, kept, name, **given)
    assert said == f"objective {name} reads {missing} and got none: pass it per token"


@pytest.mark.parametrize(
    ("name", "given"),
    [("iw_sft", "segment_ids_T"), ("iw_sft", "ref_logprob_T"), ("psft", "old_logprob_T")],
)
def test_tensors_of_other_lengths_are_refused_by_name(name, given):
    full = {"segment_ids_T": torch.arange(5), "ref_logprob_T": NUMBERS, "old_logprob_T": NUMBERS}
    said = refusal(ValueError, kept, name, **{**full, given: full[given][:4]})
    assert said == f"{given} has shape (4,), labels_T has (5,)"
    assert refusal(ValueError, kept, mask=MASK[:3]) == "loss_mask_T has shape (3,), labels_T has (5,)"


def test_a_mask_of_numbers_is_refused():
    said = refusal(ValueError, kept, mask=MASK.long())
    assert said == "loss_mask_T must be bool (True counts), got torch.int64"


def test_an_anchor_without_a_reference_is_refused():
    anchored = objective("asft", kl_weight=0.3)
    assert refusal(ObjectiveError, require_reference, anchored, torch.zeros(1), None) == (
        "objective asft with kl_weight=0.3 reads the reference and got none: set reference=resident, or kl_weight=0 if you want no anchor"
    )
    require_reference(anchored, torch.zeros(1), torch.zeros(1))
    require_reference(objective("asft", kl_weight=0.0), None)


@pytest.mark.parametrize(
    ("given", "found"),
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
    ],
)
def test_sums_are_in_fp32_at_least(given, found):
    assert accumulation_dtype(given) == found


@pytest.mark.parametrize("asked", [0, -3, "many", True, 2.5, None])
def test_chunks_of_nothing_are_refused(asked):
    named = {
        "num_tokens": 5,
        "objective": objective("sft"),
        "shard": VocabShard.full(7),
        "dtype": torch.float32,
        "visits_head": True,
    }
    said = refusal(ConfigError, resolve_chunk_tokens, asked, **named, device=torch.device("cpu"))
    assert said == (
        f"loss.chunk_tokens={asked!r} leaves nothing to compute: set it to auto or to a whole number of at least 1"
    )


def test_shards_that_do_not_fit_are_refused():
    group = object()
    assert refusal(LayoutError, VocabShard.of_rank, 0, 4, 102, 100, group) == (
        "a vocabulary of 100 rows padded to 102 does not fit tensor parallel size 4: pad it to a multiple of 4 of at least 100"
    )
    assert "of 0 rows padded to 8" in refusal(LayoutError, VocabShard.of_rank, 0, 4, 8, 0, group)
    assert "of at least 1" in refusal(LayoutError, VocabShard.of_rank, 0, 4, 8, 0, group)
    assert "of 9 rows padded to 8" in refusal(LayoutError, VocabShard.of_rank, 0, 4, 8, 9, group)
    for rank in (-1, 2):
        assert refusal(LayoutError, VocabShard.of_rank, rank, 2, 8, 8, group) == (
            f"rank {rank} is not in a group of 2: pass the rank within the group"
        )
    assert refusal(LayoutError, VocabShard.of_rank, 0, 2, 8, 8, None) == (
        "a vocabulary over 2 ranks needs their process group: pass group="
    )
    shard = VocabShard.of_rank(1, 2, 8, 7, group, True)
    assert (shard.start, shard.num_valid, shard.num_valid_of_largest, shard.sequence_parallel) == (
        4,
        3,
        4,
        True,
    )
    assert not VocabShard.of_rank(1, 2, 8, 7, group).sequence_parallel
    assert refusal(LayoutError, shard.check_rows, 5, "the head") == (
        "the head has 5 vocabulary rows on rank 1, its shard has 4: pass the rank's own slice and a shard made with the same padded "
        "vocabulary size"
    )


def test_metrics_of_each_token_in_the_order_of_their_names():
    weights, nll = torch.tensor([HIGH_WEIGHT, 0.95, 0.1]), torch.tensor([1.0, 2.0, 3.0])
    entropy = torch.tensor([0.5, 0.6, 0.7], requires_grad=True)
    shared = objective("asft_sft", alpha=0.5)
    found = metrics_of_tokens(shared, nll_N=nll, weight_N=weights, kl_N=None, topk_entropy_N=entropy)
    expected = [nll, (weights + 0.5) * nll, weights, torch.tensor([0.0, 1.0, 0.0]), entropy.detach()]
    assert torch.equal(found, torch.stack(expected))
    assert not found.requires_grad
    common = ("nll", "weighted_nll", "token_weight", "high_weight_share")
    assert metric_names(objective("sft")) == common
    assert metric_names(objective("eaft")) == (*common, "topk_entropy")
    assert metric_names(objective("asft", kl_weight=1.0)) == (*common, "kl")
    assert metric_names(objective("asft", kl_weight=1.0, kl_direction="reverse")) == (*common, "kl_reverse")


def test_statistics_of_some_tokens_are_a_part_of_each():
    whole = [torch.arange(5.0) + 10 * number for number in range(5)]
    part = TokenStatistics(*whole)[slice(1, 3)]
    found = (part.lse_N, part.label_logprob_N, part.ref_lse_N, part.kl_N, part.topk_entropy_N)
    assert torch.equal(torch.stack(found), torch.stack(whole)[:, 1:3])
    plain = TokenStatistics(*whole[:2])[slice(1, 3)]
    assert (plain.ref_lse_N, plain.kl_N, plain.topk_entropy_N) == (None, None, None)


@pytest.mark.parametrize(("asked", "found"), [(None, torch.float64), (torch.bfloat16, torch.bfloat16)])
def test_a_logit_gradient_in_the_dtype_asked_for(asked, found):
    share_NV = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]], dtype=torch.float64)
    zeros_N, own_N = torch.zeros(2).double(), torch.tensor([True, False])
    gradient_NV = logit_gradient(
        objective("sft"),
        Exponentials(share_NV.clone(), None),
        TokenStatistics(zeros_N, zeros_N),
        zeros_N + 2.0,
        own_N,
        torch.tensor([1, 0]),
        dtype=asked,
    )
    expected_NV = 2.0 * torch.tensor([[0.5, -0.7, 0.2], [0.1, 0.1, 0.8]], dtype=torch.float64)
    assert gradient_NV.dtype == found
    assert worst((gradient_NV.double(), expected_NV)) <= (2**-9 * 2 if asked else 1e-15)


def of_shards(case, chosen, **changes):
    """`vocab_parallel_loss` on one rank."""
    given = {"shard": VocabShard.full(case.vocab_size), "ref_logits_TV": case.ref_logits_TV} | changes
    return vocab_parallel_loss(case.logits_TV, case.labels_T, case.loss_mask_T, objective=chosen, **given)


def test_logits_that_fit_no_shard_are_refused_by_name():
    case, anchored = make_case(), objective("asft", kl_weight=0.3)
    rest = "pass the rank's own slice and a shard made with the same padded vocabulary size"
    wide = VocabShard.of_rank(0, 1, 64, 53, None)
    assert refusal(LayoutError, of_shards, case, anchored, shard=wide) == (
        f"the logits tensor has 53 vocabulary rows on rank 0, its shard has 64: {rest}"
    )
    assert refusal(LayoutError, of_shards, case, anchored, ref_logits_TV=case.ref_logits_TV[:, :50]) == (
        f"the reference's logits tensor has 50 vocabulary rows on rank 0, its shard has 53: {rest}"
    )
    assert "reads the reference and got none" in refusal(
        ObjectiveError, of_shards, case, anchored, ref_logits_TV=None
    )


def test_a_reference_that_nothing_reads_may_have_any_shape():
    case, chosen = make_case(), objective("sft")
    expected = dense_loss(case.logits_TV, case.labels_T, case.loss_mask_T, objective=chosen)
    found = of_shards(case, chosen, ref_logits_TV=case.ref_logits_TV[:, :50])
    assert worst((found.loss_sum, expected.loss_sum)) <= 1e-12
    fused = fused_linear_loss(
        case.hidden_TH,
        case.head_VH,
        case.labels_T,
        case.loss_mask_T,
        objective=chosen,
        shard=VocabShard.full(case.vocab_size),
        ref_hidden_TH=case.ref_hidden_TH[:3],
        ref_head_VH=case.ref_head_VH[:3],
    )
    assert worst((fused.loss_sum, expected.loss_sum)) <= 1e-12


def test_a_vocabulary_of_fewer_rows_than_the_entropy_takes():
    case, chosen = make_case(vocab=7), objective("eaft")
    expected = dense_loss(case.logits_TV, case.labels_T, case.loss_mask_T, objective=chosen)
    found = of_shards(case, chosen)
    assert worst((found.loss_sum, expected.loss_sum)) <= 1e-12
    assert found.metrics["topk_entropy"][0].item() == pytest.approx(
        expected.metrics["topk_entropy"][0].item(), rel=1e-12
    )


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_a_vocabulary_of_one_row_has_nothing_to_learn(direction):
    """p = q = 1: every loss, divergence and gradient is 0."""
    case, chosen = make_case(vocab=1), objective("asft", kl_weight=0.3, kl_direction=direction)
    logits_TV = case.logits_TV.requires_grad_()
    found = vocab_parallel_loss(
        logits_TV,
        case.labels_T,
        case.loss_mask_T,
        objective=chosen,
        shard=VocabShard.full(1),
        ref_logits_TV=case.ref_logits_TV,
    )
    found.loss_sum.backward()
    assert found.loss_sum.item() == 0.0
    assert not logits_TV.grad.any()

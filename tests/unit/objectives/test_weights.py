"""The weight rules against their papers' formulas, one token at a time in plain Python."""

import math

import pytest
import torch

from asft_nemo.errors import ObjectiveError
from asft_nemo.objectives import TOP_K, WeightInputs, objective, topk_entropy

LOGPROB = [-0.01, -0.7, -2.3, -5.0, -0.2, -1.1, -9.0]
REF = [-0.5, -0.6, -4.1, -5.0, -7.0, -0.1, -30.0]
OLD = [-0.02, -1.3, -2.1, -4.6, -0.2, -1.5, -8.7]
ENTROPY = [0.0, 0.3, 1.2, 2.9, math.log(20), 0.8, 2.0]
SEGMENTS = [4, 4, 4, 9, 9, -1, -1]


def mean(values):
    values = list(values)
    return sum(values) / len(values)


def iw_weight(i, temperature=1.0):
    same = [j for j in range(len(LOGPROB)) if SEGMENTS[j] == SEGMENTS[i]]
    log_ratio = mean(LOGPROB[j] - REF[j] for j in same)
    return min(max(math.exp(temperature * log_ratio), 0.0), 16.0)


def psft_weight(i, clip_high=0.28):
    ratio = math.exp(LOGPROB[i] - OLD[i])
    return ratio if ratio <= 1 + clip_high else 0.0


ORACLES = [
    ("sft", {}, lambda i: 1.0),
    ("dft", {}, lambda i: math.exp(LOGPROB[i])),
    ("sft_kl", {}, lambda i: 1.0),
    ("asft", {}, lambda i: math.exp(LOGPROB[i])),
    ("asft_sft", {"alpha": 0.4}, lambda i: math.exp(LOGPROB[i])),
    ("iw_sft", {}, iw_weight),
    ("iw_sft", {"temperature": 0.5}, lambda i: iw_weight(i, 0.5)),
    ("eaft", {}, lambda i: ENTROPY[i] / math.log(20)),
    ("eaft", {"exponent": 2.0}, lambda i: (ENTROPY[i] / math.log(20)) ** 2),
    ("psft", {}, psft_weight),
    ("psft", {"clip_high": 0.9}, lambda i: psft_weight(i, 0.9)),
]


def given_inputs() -> WeightInputs:
    def column(values):
        return torch.tensor(values, dtype=torch.float64, requires_grad=True)

    return WeightInputs(column(LOGPROB), column(REF), column(OLD), column(ENTROPY), torch.tensor(SEGMENTS))


@pytest.mark.parametrize(("name", "options", "oracle"), ORACLES)
def test_weight_rule(name, options, oracle):
    weights = objective(name, kl_weight=0.05, **options).token_weight(given_inputs())
    assert weights.tolist() == pytest.approx([oracle(i) for i in range(len(LOGPROB))], abs=1e-14)
    assert not weights.requires_grad


def test_the_cases_reach_the_clamps():
    assert max(iw_weight(i) for i in range(7)) == 16.0
    assert 0.0 in [psft_weight(i) for i in range(7)]
    assert psft_weight(3) < 0.8


def test_the_ce_share_is_added_to_the_value_and_not_to_the_weight():
    inputs = given_inputs()
    value = objective("asft_sft", alpha=0.4).cross_entropy_value(inputs)
    expected = [(math.exp(logprob) + 0.4) * -logprob for logprob in LOGPROB]
    assert value.tolist() == pytest.approx(expected, abs=1e-14)


def test_psft_reports_the_clipped_surrogate():
    value = objective("psft").cross_entropy_value(given_inputs())
    expected = []
    for logprob, old in zip(LOGPROB, OLD, strict=True):
        ratio = math.exp(logprob - old)
        expected.append(-min(ratio, min(max(ratio, 0.8), 1.28)))
    assert value.tolist() == pytest.approx(expected, abs=1e-14)


def test_topk_entropy_of_known_shares():
    uniform = torch.zeros(1, TOP_K, dtype=torch.float64)
    assert topk_entropy(uniform).item() == pytest.approx(math.log(20), abs=1e-14)
    halves = torch.full((1, TOP_K), -torch.inf, dtype=torch.float64)
    halves[0, :2] = 3.0
    assert topk_entropy(halves).item() == pytest.approx(math.log(2), abs=1e-14)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        (
            "iw_sft",
            "the reference's label log probabilities (ref_logprob_T) and got none: run the reference ahead of the step (reference=resident)",
        ),
        ("eaft", "the top-k entropy and got none: pass the policy's logits through the loss"),
        (
            "psft",
            "the snapshot's label log probabilities (old_logprob_T) and got none: run the snapshot of the policy ahead of the step",
        ),
    ],
)
def test_what_is_read_must_be_there(name, sentence):
    with pytest.raises(ObjectiveError) as refused:
        objective(name).token_weight(WeightInputs(torch.zeros(2)))
    assert str(refused.value) == f"the objective reads {sentence}"


def test_iw_sft_must_know_the_sequences():
    with pytest.raises(ObjectiveError) as refused:
        objective("iw_sft").token_weight(WeightInputs(torch.zeros(2), ref_label_logprob_N=torch.zeros(2)))
    expected = "the objective reads segment ids (segment_ids_T) and got none: number the sequences of the micro batch"
    assert str(refused.value) == expected


@pytest.mark.parametrize("name", ["iw_sft", "psft"])
def test_weights_are_in_the_dtype_of_the_policys_log_probabilities(name):
    """What a reference or a snapshot left in another precision must not decide it."""
    given = given_inputs()
    mixed = WeightInputs(
        given.label_logprob_N.float(),
        given.ref_label_logprob_N,
        given.old_label_logprob_N,
        segment_ids_N=given.segment_ids_N,
    )
    chosen = objective(name)
    assert chosen.token_weight(mixed).dtype == torch.float32
    assert chosen.token_weight(mixed).tolist() == pytest.approx(chosen.token_weight(given).tolist(), rel=1e-5)


def test_sequences_that_the_policy_prefers_less_count_less_also_those_of_one_token():
    def column(*values):
        return torch.tensor(values, dtype=torch.float64)

    given = WeightInputs(
        column(-2.0, -1.0, -0.5),
        ref_label_logprob_N=column(-1.0, -0.5, -2.5),
        segment_ids_N=torch.tensor([5, 5, 0]),
    )
    found = objective("iw_sft").token_weight(given).tolist()
    assert found == pytest.approx([math.exp(-0.75), math.exp(-0.75), math.exp(2.0)], abs=1e-14)


def test_at_its_upper_clip_a_ratio_still_counts():
    """The surrogate's kink: the unclipped branch is taken there, as in the paper's minimum."""
    same = torch.tensor([-0.5], dtype=torch.float64)
    chosen = objective("psft", clip_high=0.0)
    assert chosen.token_weight(WeightInputs(same, old_label_logprob_N=same)).item() == 1.0

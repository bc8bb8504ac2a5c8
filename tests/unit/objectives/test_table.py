"""The table of objectives and what it says of each."""

import pickle

import pytest

from asft_nemo.errors import ObjectiveError
from asft_nemo.objectives import OBJECTIVES, Objective, objective, objective_names

READS = {
    "sft": set(),
    "dft": {"label_logprob"},
    "sft_kl": {"ref_hidden"},
    "asft": {"label_logprob", "ref_hidden"},
    "asft_sft": {"label_logprob"},
    "iw_sft": {"label_logprob", "ref_label_logprob"},
    "eaft": {"topk_entropy"},
    "psft": {"label_logprob", "old_label_logprob"},
}
OPTIONS = {
    "asft_sft": {"alpha": 0.1},
    "iw_sft": {"temperature": 1.0},
    "eaft": {"exponent": 1.0},
    "psft": {"clip_low": 0.2, "clip_high": 0.28, "refresh_every": 4},
}


def test_the_table_holds_the_eight_objectives():
    assert objective_names() == tuple(OBJECTIVES) == tuple(READS)


@pytest.mark.parametrize("name", list(READS))
def test_what_each_objective_reads_and_owns(name):
    chosen = objective(name, kl_weight=0.05)
    assert chosen.reads == READS[name]
    assert chosen.options == OPTIONS.get(name, {})
    assert chosen.needs_reference == any(read.startswith("ref_") for read in READS[name])
    assert chosen.needs_old_policy == (name == "psft")
    assert chosen.scope == ("sequence" if name == "iw_sft" else "token")
    assert chosen.ce_share == (0.1 if name == "asft_sft" else 0.0)
    assert OBJECTIVES[name].summary


@pytest.mark.parametrize("name", ["sft_kl", "asft"])
def test_the_divergence_and_its_name(name):
    assert objective(name, kl_weight=0.05).divergence == "forward"
    assert objective(name, kl_weight=0.05).kl_metric == "kl"
    reverse = objective(name, kl_weight=0.05, kl_direction="reverse")
    assert (reverse.divergence, reverse.kl_metric) == ("reverse", "kl_reverse")


def test_kl_weight_zero_drops_the_reference():
    unanchored = objective("asft", kl_weight=0)
    assert unanchored.reads == {"label_logprob"}
    assert not unanchored.needs_reference
    assert unanchored.divergence is None
    assert unanchored.kl_metric is None


@pytest.mark.parametrize("name", [name for name, row in OBJECTIVES.items() if row.direction is None])
def test_a_row_without_a_divergence_takes_none_from_shared_settings(name):
    chosen = objective(name, kl_weight=0.05, kl_direction="reverse")
    assert (chosen.kl_weight, chosen.kl_direction, chosen.divergence) == (0.0, None, None)
    assert chosen == objective(name)


def test_an_objective_is_a_value():
    one = objective("psft", clip_high=0.5)
    assert one == objective("psft", clip_high=0.5, clip_low=None)
    assert hash(one) == hash(objective("psft", clip_high=0.5))
    assert one != objective("psft")
    assert pickle.loads(pickle.dumps(one)) == one
    with pytest.raises(AttributeError):
        one.kl_weight = 1.0  # type: ignore[misc]
    assert isinstance(one.options["refresh_every"], int)
    assert isinstance(one, Objective)


REFRESH = "refresh_every (steps between snapshots of the policy; at 1 the ratio is always 1) is a whole number of at least 1"
CLIP_LOW = "clip_low (lower clip of r; never acts on the gradient) is a number of at least 0 and at most 1"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            {"name": "asfd"},
            "unknown objective 'asfd': choose one of sft, dft, sft_kl, asft, asft_sft, iw_sft, eaft, psft",
        ),
        (
            {"name": "asft"},
            "objective asft has a KL term and needs kl_weight: give it (the paper uses 0.05)",
        ),
        (
            {"name": "asft", "kl_weight": -0.1},
            "asft: kl_weight=-0.1 would push the policy away from the reference: set it to 0 or more",
        ),
        (
            {"name": "dft", "kl_weight": -0.1},
            "dft: kl_weight=-0.1 would push the policy away from the reference: set it to 0 or more",
        ),
        (
            {"name": "asft", "kl_weight": float("nan")},
            "asft: kl_weight must be a finite number, got nan: give a number",
        ),
        (
            {"name": "asft", "kl_weight": "0.05"},
            "asft: kl_weight must be a finite number, got '0.05': give a number",
        ),
        (
            {"name": "asft", "kl_weight": True},
            "asft: kl_weight must be a finite number, got True: give a number",
        ),
        (
            {"name": "asft", "kl_weight": 0.05, "kl_direction": "backward"},
            "asft: unknown kl_direction 'backward': choose forward, KL(ref||policy), or reverse, KL(policy||ref)",
        ),
        (
            {"name": "dft", "alpha": 0.1},
            "objective dft has no option 'alpha' (it belongs to asft_sft; it has no options): remove it",
        ),
        (
            {"name": "psft", "alpha": 0.1},
            "objective psft has no option 'alpha' (it belongs to asft_sft; its options are clip_low, clip_high, "
            "refresh_every): remove it",
        ),
        (
            {"name": "eaft", "power": 2},
            "objective eaft has no option 'power' (no objective has it; its options are exponent): remove it",
        ),
        (
            {"name": "asft_sft", "alpha": -1},
            "asft_sft: alpha=-1 does not fit: alpha (share of plain cross entropy) is a number of at least 0, "
            "set it so or leave it out for 0.1",
        ),
        (
            {"name": "asft_sft", "alpha": "much"},
            "asft_sft: alpha (share of plain cross entropy) must be a finite number, got 'much': give a number",
        ),
        (
            {"name": "psft", "clip_low": 1.5},
            f"psft: clip_low=1.5 does not fit: {CLIP_LOW}, set it so or leave it out for 0.2",
        ),
        (
            {"name": "psft", "refresh_every": 0},
            f"psft: refresh_every=0 does not fit: {REFRESH}, set it so or leave it out for 4",
        ),
        (
            {"name": "psft", "refresh_every": 2.5},
            f"psft: refresh_every=2.5 does not fit: {REFRESH}, set it so or leave it out for 4",
        ),
    ],
)
def test_bad_settings_are_said_with_their_cure(arguments, sentence):
    with pytest.raises(ObjectiveError) as refused:
        objective(**arguments)
    assert str(refused.value) == sentence


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [
        ("asft_sft", "alpha", 0),
        ("psft", "clip_low", 0),
        ("psft", "clip_low", 1),
        ("psft", "refresh_every", 1.0),
    ],
)
def test_the_ends_of_a_range_belong_to_it(name, option, value):
    assert objective(name, **{option: value}).options[option] == value


def test_an_option_left_none_counts_as_not_given():
    assert objective("dft", alpha=None, exponent=None) == objective("dft")

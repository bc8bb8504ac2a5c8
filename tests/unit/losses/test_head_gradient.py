"""The head's gradient added to a buffer instead of handed to autograd."""

import pytest
import torch
from loss_cases import fused, make_case, variant_objective, worst

from asft_nemo.losses import HeadGradient

CHOSEN = variant_objective("asft", "forward")


@pytest.mark.parametrize(
    ("gradients_in", "known_scale"),
    [("forward", 0.3), ("forward", 1.0), ("forward", 2.0), ("forward", None), ("backward", None)],
)
@pytest.mark.parametrize(
    "chosen", [CHOSEN, variant_objective("iw_sft", None)], ids=["a token's weight", "a sequence's"]
)
def test_gradients_add_up_over_micro_batches(gradients_in, known_scale, chosen):
    scale = known_scale or 0.3  # no number of fp32
    cases = [make_case(seed=1), make_case(seed=2, valid_share=0.2)]
    buffer = torch.full((53, 6), 3.0, dtype=torch.float64)
    expected = buffer.clone()
    sink = HeadGradient(buffer, upstream_scale=known_scale)
    for case in cases:
        _, _, hidden_gradient, head_gradient = case.dense(chosen)
        ours = fused(case, chosen, gradients_in=gradients_in, head_gradient=sink, scale=scale, chunk_tokens=5)
        assert ours.head is None, "autograd gets no gradient of the head"
        assert worst((ours.hidden, scale * hidden_gradient)) <= 1e-12
        expected += scale * head_gradient
    assert worst((buffer, expected)) <= 1e-12


@pytest.mark.parametrize("gradients_in", ["forward", "backward"])
def test_padded_rows_of_the_buffer_are_left_alone(gradients_in):
    buffer = torch.full((56, 6), 3.0, dtype=torch.float64)
    fused(make_case(), CHOSEN, padding=3, gradients_in=gradients_in, head_gradient=HeadGradient(buffer))
    assert (buffer[53:] == 3.0).all()
    assert (buffer[:53] != 3.0).any()


def test_a_dummy_reaches_autograd_once_per_backward():
    handed = []

    def dummy():
        handed.append(torch.zeros(53, 6, dtype=torch.float64))
        return handed[-1]

    buffer = torch.zeros(53, 6, dtype=torch.float64)
    ours = fused(make_case(), CHOSEN, head_gradient=HeadGradient(buffer, 1.0, dummy))
    assert len(handed) == 1
    assert torch.equal(ours.head, torch.zeros(53, 6, dtype=torch.float64))
    assert buffer.abs().max() > 0


def test_another_factor_than_was_said_stops():
    buffer = torch.zeros(53, 6, dtype=torch.float64)
    with pytest.raises(
        RuntimeError, match=r"multiplied by 0\.5 before backward.* said 1, .* pass the factor"
    ):
        fused(make_case(), CHOSEN, head_gradient=HeadGradient(buffer, 1.0), scale=0.5)


def test_validation_adds_nothing():
    buffer = torch.zeros(53, 6, dtype=torch.float64)
    with torch.no_grad():
        fused(make_case(), CHOSEN, head_gradient=HeadGradient(buffer, 1.0), backward=False)
    assert (buffer == 0).all()


def test_a_frozen_head_adds_nothing():
    buffer = torch.zeros(53, 6, dtype=torch.float64)
    ours = fused(make_case(), CHOSEN, head_gradient=HeadGradient(buffer, 1.0), head_trains=False)
    assert (buffer == 0).all()
    assert ours.hidden.abs().max() > 0


@pytest.mark.parametrize("known_scale", [1.0, None])
def test_a_low_precision_model_adds_to_an_fp32_buffer_without_rounding(known_scale):
    case = make_case(dtype=torch.bfloat16)
    exact = make_case(dtype=torch.bfloat16).double()
    buffer = torch.zeros(53, 6, dtype=torch.float32)
    fused(case, CHOSEN, head_gradient=HeadGradient(buffer, known_scale))
    _, _, _, head_gradient = exact.dense(CHOSEN)
    assert worst((buffer.double(), head_gradient)) <= 1e-5
    low = torch.zeros(53, 6, dtype=torch.bfloat16)
    fused(case, CHOSEN, head_gradient=HeadGradient(low, known_scale))
    assert worst((low.double(), head_gradient)) <= 2**-8 * 1.01
    assert low.dtype == torch.bfloat16


def test_a_buffer_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"buffer_VH has shape \(50, 6\), the head \(53, 6\)"):
        fused(make_case(), CHOSEN, head_gradient=HeadGradient(torch.zeros(50, 6)))

"""What the Triton kernels must do, on any device: on a GPU compiled, on a CPU in Triton's interpreter.

Each case is a function of the device that raises where something is wrong. As a script this file runs them all
on the CPU and writes `{name: traceback or null}` as JSON to the path it is given; the interpreter must be
switched on before Python starts, which is why the tests run it as a process of its own.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path

import torch
from loss_cases import VARIANTS, LossCase, fused, make_case, variant_objective
from torch import Tensor

from asft_nemo.losses import VocabShard
from asft_nemo.losses.logit_grad import logit_gradient
from asft_nemo.losses.statistics import (
    RawLogits,
    TokenStatistics,
    combine,
    floats_per_token,
    local_statistics,
    probabilities,
)
from asft_nemo.losses.triton import launch
from asft_nemo.objectives import Objective, objective

Device = torch.device
DIRECTIONS = [None, "forward", "reverse"]


@contextmanager
def kernels(on: bool, device: Device, block: int | None = None) -> Iterator[list[None]]:
    """Switches the kernels on or off; gives a list that grows by one entry a launch."""
    launches: list[None] = []
    before = os.environ.get("ASFT_TRITON"), launch.BLOCK_COLUMNS, launch._kernels

    def counted():
        launches.append(None)
        return before[2]()

    os.environ["ASFT_TRITON"] = "0" if not on else ("1" if device.type == "cuda" else "interpret")
    launch._kernels = counted
    launch.BLOCK_COLUMNS = block or launch.BLOCK_COLUMNS
    try:
        yield launches
    finally:
        _, launch.BLOCK_COLUMNS, launch._kernels = before
        if before[0] is None:
            del os.environ["ASFT_TRITON"]
        else:
            os.environ["ASFT_TRITON"] = before[0]
    assert bool(launches) == on, f"{len(launches)} launches with the kernels {'on' if on else 'off'}"


def on_device(case: LossCase, device: Device) -> LossCase:
    tensors = {field.name: getattr(case, field.name).to(device) for field in fields(case)[:-1]}
    return replace(
        case, **tensors, per_token={name: tensor.to(device) for name, tensor in case.per_token.items()}
    )


def relative(ours: Tensor, exact: Tensor) -> float:
    """The error's norm over the exact one's."""
    return ((ours.double() - exact.double()).norm() / exact.double().norm().clamp(min=1e-30)).item()


def assert_as_good(ours: dict[str, float], torchs: dict[str, float], small: float = 1e-5) -> None:
    """Errors of the kernels against those of PyTorch: of the same size, and below `small`.

    Either error is that of a few roundings to fp32 (6e-8) a number, which fall better or worse; over many
    numbers that evens out. The loss sum is one number, where PyTorch's error may be next to nothing.
    """
    for name, error in ours.items():
        floor = 5e-7 if name == "loss" else 1e-7
        assert error <= 2 * torchs[name] + floor, f"{name}: {error:.2e}, PyTorch has {torchs[name]:.2e}"
        assert error <= small, f"{name}: {error:.2e}"


# The whole loss, from hidden states -------------------------------------------------------------------------


def loss_errors(case: LossCase, chosen: Objective, device: Device, on: bool, block: int | None, **options):
    """Loss, dHidden and dHead against the dense definition in fp64."""
    vocab = case.vocab_size
    exact, _, exact_hidden, exact_head = case.double().dense(chosen)
    with kernels(on, device, block):
        found = fused(case, chosen, padding=3, **options)
    assert found.hidden is not None
    assert found.head is not None
    assert not found.head[vocab:].any(), "padded rows have no gradient"
    return {
        "loss": relative(found.output.loss_sum.detach(), exact.loss_sum.detach()),
        "hidden": relative(found.hidden, exact_hidden),
        "head": relative(found.head[:vocab], exact_head),
    }


def loss_is_exact(
    device: Device, *, name: str, direction: str | None, vocab: int, block: int | None, **options
) -> None:
    """As exact as with PyTorch."""
    case = on_device(make_case(dtype=torch.float32, vocab=vocab, tokens=16), device)
    chosen = variant_objective(name, direction)
    assert_as_good(*(loss_errors(case, chosen, device, on, block, **options) for on in (True, False)))


def one_token(device: Device) -> None:
    case = make_case(dtype=torch.float32, tokens=5, vocab=37)
    labels_T = torch.full_like(case.labels_T, 7)
    case = on_device(replace(case, loss_mask_T=torch.arange(5) == 3, labels_T=labels_T), device)
    chosen = variant_objective("asft", "forward")
    assert_as_good(*(loss_errors(case, chosen, device, on, 16) for on in (True, False)))


def no_token(device: Device) -> None:
    """Nothing is launched; the loss and both gradients are 0."""
    case = make_case(dtype=torch.float32, tokens=5, vocab=37)
    case = on_device(replace(case, loss_mask_T=torch.zeros(5, dtype=torch.bool)), device)
    with kernels(False, device):
        os.environ["ASFT_TRITON"] = "1" if device.type == "cuda" else "interpret"
        found = fused(case, variant_objective("asft", "forward"))
    assert found.output.num_tokens.item() == 0
    assert found.output.loss_sum.item() == 0
    assert found.hidden is not None
    assert found.head is not None
    assert not found.hidden.any()
    assert not found.head.any()


def fp64_stays_with_pytorch(device: Device) -> None:
    chosen = variant_objective("asft", "forward")
    case = on_device(make_case(), device)
    exact, _, exact_hidden, _ = case.dense(chosen)
    with kernels(False, device):
        os.environ["ASFT_TRITON"] = "1" if device.type == "cuda" else "interpret"
        found = fused(case, chosen)
    assert found.hidden is not None
    assert relative(found.output.loss_sum.detach(), exact.loss_sum.detach()) <= 1e-12
    assert relative(found.hidden, exact_hidden) <= 1e-12


# The elementwise stage alone --------------------------------------------------------------------------------


@dataclass
class Stage:
    """What the stage gives for a vocabulary over several ranks, all of them here."""

    packed_RNK: Tensor
    statistics: TokenStatistics
    gradient_NV: Tensor


@dataclass
class StageCase:
    """Logits of both models over the whole vocabulary, and the tokens' labels, weights and factors."""

    objective: Objective
    logits_NV: Tensor
    ref_logits_NV: Tensor | None
    labels_N: Tensor
    weight_N: Tensor
    upstream_N: Tensor | None = None

    def double(self) -> StageCase:
        def wide(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.double()

        return StageCase(
            self.objective,
            self.logits_NV.double(),
            wide(self.ref_logits_NV),
            self.labels_N,
            self.weight_N.double(),
            wide(self.upstream_N),
        )

    def run(self, ranks: int = 1, *, again: bool = False, dtype: torch.dtype | None = None) -> Stage:
        """Statistics of each rank's columns, combined, and each rank's gradient.

        With `again` the gradient is made from logits that are visited a second time.
        """
        vocab = self.logits_NV.shape[1]
        # With several ranks the last has no rows that count, where the vocabulary is small enough.
        size = -(-vocab // max(ranks - 1, 1))
        shards = [VocabShard(rank, ranks, size, vocab) for rank in range(ranks)]
        parts = []
        for shard in shards:
            columns = slice(shard.start, shard.start + shard.num_valid)
            z, y = self.logits_NV[:, columns], None
            if self.ref_logits_NV is not None:
                y = self.ref_logits_NV[:, columns].clone()
            parts.append(local_statistics(self.objective, z.clone(), y, *shard.local_index(self.labels_N)))
        packed_RNK = torch.stack([packed for packed, _ in parts])
        statistics = combine(self.objective, packed_RNK)
        gradients = []
        for shard, (_, left) in zip(shards, parts, strict=True):
            if again:
                columns = slice(shard.start, shard.start + shard.num_valid)
                y = None if self.ref_logits_NV is None else self.ref_logits_NV[:, columns].clone()
                left = probabilities(self.objective, self.logits_NV[:, columns].clone(), y, statistics)
            own = shard.local_index(self.labels_N)
            gradients.append(
                logit_gradient(self.objective, left, statistics, self.weight_N, *own, self.upstream_N, dtype)
            )
        return Stage(packed_RNK, statistics, torch.cat(gradients, dim=1))


def stage_case(
    device: Device,
    direction: str | None,
    *,
    tokens: int = 9,
    vocab: int = 53,
    scale: float = 3.0,
    drift: float = 0.3,
    kl_weight: float = 0.3,
    upstream: str = "none",
) -> StageCase:
    generator = torch.Generator().manual_seed(3)
    logits_NV = scale * torch.randn(tokens, vocab, generator=generator)
    ref_logits_NV = logits_NV + drift * torch.randn(tokens, vocab, generator=generator)
    labels_N = torch.randint(vocab, (tokens,), generator=generator)
    labels_N[:3] = torch.tensor([0, vocab - 1, vocab // 2])
    weight_N = torch.rand(tokens, generator=generator)
    factor_N = torch.rand(tokens, generator=generator) + 0.5
    factors = {"none": None, "scalar": torch.tensor(0.7).to(device), "token": factor_N.to(device)}
    name = "asft_sft" if direction is None else "asft"
    return StageCase(
        variant_objective(name, direction, kl_weight) if direction else objective(name),
        logits_NV.to(device),
        None if direction is None else ref_logits_NV.to(device),
        labels_N.to(device),
        weight_N.to(device),
        factors[upstream],
    )


def assert_stage_as_good(device: Device, case: StageCase, block: int, small: float = 1e-5, **options) -> None:
    exact = case.double().run(**options)
    errors = []
    for on in (True, False):
        with kernels(on, device, block):
            found = case.run(**options)
        assert found.packed_RNK.shape == exact.packed_RNK.shape
        assert found.packed_RNK.shape[2] == floats_per_token(case.objective)
        pairs = {
            "lse": (found.statistics.lse_N, exact.statistics.lse_N),
            "label log probability": (found.statistics.label_logprob_N, exact.statistics.label_logprob_N),
            "gradient": (found.gradient_NV, exact.gradient_NV),
        }
        if found.statistics.kl_N is not None and exact.statistics.kl_N is not None:
            pairs["kl"] = (found.statistics.kl_N, exact.statistics.kl_N)
        errors.append({name: relative(*pair) for name, pair in pairs.items()})
    assert_as_good(*errors, small)


def same_statistics(device: Device, *, direction: str | None) -> None:
    """The layout that is exchanged: a rank may use PyTorch and its neighbour the kernels."""
    case = stage_case(device, direction)
    with kernels(False, device):
        expected = case.run(4).packed_RNK
    with kernels(True, device, 16):
        found = case.run(4).packed_RNK
    assert expected[3, :, 0].eq(-torch.inf).all(), "the last rank has no vocabulary rows"
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def stage_is_exact(device: Device, *, direction: str | None, ranks: int, again: bool, upstream: str) -> None:
    assert_stage_as_good(
        device, stage_case(device, direction, upstream=upstream), 16, ranks=ranks, again=again
    )


def extreme_logits(device: Device, *, direction: str | None) -> None:
    """Logits of +-1e4 that differ by as much between the models; neighbouring fp32 numbers there are 1e-3 apart."""
    case = stage_case(device, direction, vocab=21)
    generator = torch.Generator().manual_seed(5)

    def extreme() -> Tensor:
        return 1e4 * torch.randint(-1, 2, (9, 21), generator=generator).float().to(device)

    case.logits_NV = extreme()
    case.ref_logits_NV = None if direction is None else extreme()
    assert_stage_as_good(device, case, 8, small=1e-3)


def equal_models(device: Device, *, direction: str, vocab: int, block: int | None) -> None:
    """KL and its gradient are 0 to the last bit, at any number of ranks."""
    case = stage_case(device, direction, vocab=vocab, tokens=7)
    case.ref_logits_NV = case.logits_NV.clone()
    case.weight_N = torch.zeros_like(case.weight_N)
    for ranks in (1, 3):
        with kernels(True, device, block):
            found = case.run(ranks)
        assert found.statistics.kl_N is not None
        assert not found.statistics.kl_N.any(), found.statistics.kl_N
        assert not found.gradient_NV.any(), found.gradient_NV.abs().max()


def narrow_gradient(device: Device, *, direction: str | None) -> None:
    """In bf16 the gradient is the fp32 one rounded, or cut off by the interpreter, which does not round."""
    case = stage_case(device, direction)
    with kernels(True, device, 32):
        wide, narrow = case.run().gradient_NV, case.run(dtype=torch.bfloat16).gradient_NV
    assert narrow.dtype == torch.bfloat16
    cut = (wide.view(torch.int32) & -0x10000).view(torch.float32)
    assert torch.equal(narrow, wide.bfloat16() if device.type == "cuda" else cut.bfloat16())


def not_finite(device: Device, *, direction: str | None) -> None:
    """NaN and +inf reach the statistics of their token and of no other."""
    case = stage_case(device, direction)
    case.logits_NV[2, 40], case.logits_NV[5, 3] = torch.nan, torch.inf
    with kernels(True, device, 32):
        lse_N = case.run().statistics.lse_N
    assert (~lse_N.isfinite()).nonzero().flatten().tolist() == [2, 5]


def minus_infinity(device: Device) -> None:
    """Blocks of nothing but -inf before the first finite logit count as nothing."""
    case = stage_case(device, None)
    case.logits_NV[:, :33] = -torch.inf
    case.labels_N.clamp_(min=33)
    with kernels(True, device, 16):
        found = case.run()
    assert not found.gradient_NV[:, :33].any()
    exact = replace(case, logits_NV=case.logits_NV[:, 33:], labels_N=case.labels_N - 33).double().run()
    assert relative(found.statistics.lse_N, exact.statistics.lse_N) <= 1e-6
    assert relative(found.gradient_NV[:, 33:], exact.gradient_NV) <= 1e-6


def rows_apart(device: Device) -> None:
    """Rows at a distance, as in a part of a wider buffer; the columns between are left alone."""
    case = stage_case(device, "forward")
    buffer = torch.full((2, 9, 64), 7.0, device=device)
    z, y = buffer[0, :, :53], buffer[1, :, :53]
    z.copy_(case.logits_NV)
    y.copy_(case.ref_logits_NV)
    own = VocabShard.full(53).local_index(case.labels_N)
    with kernels(True, device, 32):
        expected = case.run()
        packed_NK, left = local_statistics(case.objective, z, y, *own)
        assert isinstance(left, RawLogits)
        gradient = logit_gradient(case.objective, left, expected.statistics, case.weight_N, *own)
    assert torch.equal(packed_NK, expected.packed_RNK[0])
    assert torch.equal(gradient, expected.gradient_NV)
    assert gradient.data_ptr() == buffer.data_ptr(), "the gradient lies where the logits were"
    assert (buffer[:, :, 53:] == 7.0).all()


def refusal(kind: type[Exception], call: Callable[[], object]) -> str:
    """What a call is refused with; pytest need not be there on a GPU's machine."""
    try:
        call()
    except kind as error:
        return str(error)
    raise AssertionError("it was not refused")


def columns_apart(device: Device) -> None:
    """Columns at a distance are refused: the kernels would read the numbers between them. Of a single column nothing is between."""
    case, chosen = stage_case(device, "forward"), objective("sft")
    own_N, label_index_N = VocabShard.full(53).local_index(case.labels_N)
    apart_NV = case.logits_NV.T.contiguous().T
    said = refusal(ValueError, lambda: launch.row_statistics(chosen, apart_NV, None, own_N, label_index_N))
    assert said == "logits with strides (1, 9): the last dim must be contiguous"
    one_N1 = torch.ones(9, 4, device=device)[:, :1].T.contiguous().T
    found_NK = launch.row_statistics(chosen, one_N1, None, own_N, torch.zeros_like(label_index_N))
    assert (found_NK[:, 1] == 1.0).all(), "the sum of exponentials of one logit"


def tried_out(device: Device) -> None:
    """What is run before the kernels are used: two equal logits. A kernel that computes something else is told."""
    launch.try_out(device)
    right = launch.row_gradient
    try:
        launch.row_gradient = lambda *given: right(*given) + 0.25
        said = refusal(RuntimeError, lambda: launch.try_out(device))
    finally:
        launch.row_gradient = right
    assert said == "the gradient of two equal logits is off by 0.25"


def _cases() -> dict[str, Callable[[Device], None]]:
    named: dict[str, Callable[[Device], None]] = {}
    for name, direction in VARIANTS:
        label = name if direction is None else f"{name}-{direction}"
        add = partial(loss_is_exact, name=name, direction=direction)
        named[f"loss-{label}"] = partial(add, vocab=53, block=32)
        if name in ("sft", "asft"):
            named[f"loss-{label}-chunks-in-backward"] = partial(
                add, vocab=53, block=32, gradients_in="backward", chunk_tokens=7
            )
    for name, direction in (("sft", None), ("asft", "forward"), ("sft_kl", "reverse"), ("eaft", None)):
        # Two blocks of the size that is used, the second one not full.
        named[f"loss-{name}-{direction}-large"] = partial(
            loss_is_exact, name=name, direction=direction, vocab=5001, block=None
        )
    for direction in DIRECTIONS:
        named[f"layout-{direction}"] = partial(same_statistics, direction=direction)
        named[f"extreme-{direction}"] = partial(extreme_logits, direction=direction)
        named[f"bf16-{direction}"] = partial(narrow_gradient, direction=direction)
        named[f"not-finite-{direction}"] = partial(not_finite, direction=direction)
        for ranks, again, upstream in ((1, False, "none"), (4, False, "scalar"), (4, True, "token")):
            named[f"stage-{direction}-{ranks}-{upstream}"] = partial(
                stage_is_exact, direction=direction, ranks=ranks, again=again, upstream=upstream
            )
    for direction in ("forward", "reverse"):
        named[f"equal-models-{direction}"] = partial(equal_models, direction=direction, vocab=53, block=32)
        named[f"equal-models-{direction}-large"] = partial(
            equal_models, direction=direction, vocab=9001, block=None
        )
    return named | {
        "one-token": one_token,
        "no-token": no_token,
        "fp64": fp64_stays_with_pytorch,
        "minus-infinity": minus_infinity,
        "rows": rows_apart,
        "columns": columns_apart,
        "tried-out": tried_out,
    }


CASES = _cases()


def main(out: Path) -> None:
    torch.set_num_threads(1)
    outcomes: dict[str, str | None] = {}
    for name, case in CASES.items():
        try:
            case(torch.device("cpu"))
            outcomes[name] = None
        except Exception:
            outcomes[name] = traceback.format_exc()
    out.write_text(json.dumps(outcomes))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

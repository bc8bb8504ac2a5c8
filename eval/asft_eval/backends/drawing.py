"""Drawing tokens so that a completion depends on its own seed alone, not on what shares its batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch


class SeededDraw:
    """A logits processor after which the most probable token is a draw from the distribution before it.

    Gumbel's trick: `argmax_v (l_v / T + g_v)` with independent standard Gumbel `g_v` is distributed as `softmax(l / T)`. Each row has a
    generator of its own, so greedy decoding behind this draws every completion from its own seed.

    Args:
        seeds: one a row of the batch.
        temperature: T, above 0.
        top_p: only the smallest set of tokens of this probability is drawn from.
    """

    def __init__(self, seeds: Sequence[int], *, temperature: float, top_p: float):
        # On the CPU, so that a seed means the same tokens on every device.
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self._temperature, self._top_p = temperature, top_p

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores `[b, v]` in fp32, noise added; tokens outside `top_p` get minus infinity."""
        del input_ids
        scaled_BV = scores.float() / self._temperature
        if self._top_p < 1:
            scaled_BV = _nucleus(scaled_BV, self._top_p)
        width = scaled_BV.shape[-1]
        uniform_BV = torch.stack(
            [torch.rand(width, generator=g, dtype=torch.float64) for g in self._generators]
        )
        noise_BV = -torch.log(-torch.log(uniform_BV.clamp_min(1e-300)))
        return scaled_BV + noise_BV.to(scaled_BV)


def _nucleus(scores_BV: torch.Tensor, top_p: float) -> torch.Tensor:
    ordered_BV, places_BV = scores_BV.sort(dim=-1, descending=True)
    before_BV = ordered_BV.softmax(-1).cumsum(-1) - ordered_BV.softmax(-1)
    outside_BV = torch.zeros_like(before_BV, dtype=torch.bool).scatter(-1, places_BV, before_BV >= top_p)
    return scores_BV.masked_fill(outside_BV, float("-inf"))

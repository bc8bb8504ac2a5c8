"""Blends: items of several domains in given shares, as one stream with random access.

Which domain stands at a position is a schedule of one period, repeated: with shares p_d of a period Q = sum of p_d, domain d stands at p_d
of every Q positions, spread so evenly that after n positions it has stood at n p_d / Q of them, give or take less than one. What a domain
gives at its turns is its own items, one shuffled epoch after another.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from asft_nemo.data.sampler import Shuffled

LONGEST_PERIOD = 100_000  # so shares of up to five decimals are exact


class Blend:
    """An `asft_nemo.data.sampler.Order` that draws from several domains.

    After n positions the number of draws from domain d lies strictly within 1 of n p_d / Q (see `even_schedule`). Where the weights have
    no common denominator up to `LONGEST_PERIOD`, p_d / Q is a weight rounded to 1 / `LONGEST_PERIOD`, and at least that.

    Args:
        members: each domain's items, int64 indices; none is empty.
        weights: each domain's share of the draws, above 0, of any sum.
        seed: of the shuffles.

    Attributes:
        shares: p_d.
        period: Q.
    """

    def __init__(self, members: Sequence[np.ndarray], weights: Sequence[Fraction], *, seed: int):
        self.shares = integer_shares(weights)
        self.period = sum(self.shares)
        self._members = list(members)
        self._epochs = [
            Shuffled(len(items), seed=seed, stream=domain) for domain, items in enumerate(members)
        ]
        self._schedule = even_schedule(self.shares)
        self._turns = [np.flatnonzero(self._schedule == domain) for domain in range(len(members))]
        # how often a position's domain stood in the period before it
        self._before = np.empty(self.period, dtype=np.int64)
        for turns in self._turns:
            self._before[turns] = np.arange(len(turns))

    def at(self, positions: Sequence[int] | np.ndarray) -> np.ndarray:
        """See `asft_nemo.data.sampler.Order.at`."""
        rounds, slots = np.divmod(np.asarray(positions, dtype=np.int64), self.period)
        domains, items = self._schedule[slots], np.empty_like(slots)
        for domain in np.unique(domains).tolist():
            here = domains == domain
            draws = rounds[here] * self.shares[domain] + self._before[slots[here]]
            items[here] = self._members[domain][self._epochs[domain].at(draws)]
        return items

    def draws(self, positions: int) -> list[int]:
        """How often each domain stands at the first `positions` positions."""
        rounds, rest = divmod(positions, self.period)
        return [
            rounds * share + int(np.searchsorted(turns, rest))
            for share, turns in zip(self.shares, self._turns, strict=True)
        ]

    def epochs(self, positions: int) -> list[float]:
        """How often the first `positions` positions go through each domain's items."""
        return [count / len(items) for count, items in zip(self.draws(positions), self._members, strict=True)]

    def positions_within(self, epochs: float) -> int:
        """The most positions at which no domain is drawn from more than `epochs` times its items."""
        return min(
            self._position_of(domain, math.floor(epochs * len(items)))
            for domain, items in enumerate(self._members)
        )

    def _position_of(self, domain: int, draw: int) -> int:
        """The position of a domain's draw, counted from 0."""
        rounds, rest = divmod(draw, self.shares[domain])
        return rounds * self.period + int(self._turns[domain][rest])


def integer_shares(weights: Sequence[Fraction]) -> tuple[int, ...]:
    """Whole numbers in the proportion of the weights, in lowest terms.

    Where their sum would exceed `LONGEST_PERIOD`, the nearest such numbers of that sum: rounded by the largest remainder, none below 1.
    """
    total = sum(weights)
    parts = [weight / total for weight in weights]
    period = math.lcm(*(part.denominator for part in parts))
    if period <= LONGEST_PERIOD:
        return tuple(int(part * period) for part in parts)
    wanted = [part * LONGEST_PERIOD for part in parts]
    shares = [max(1, math.floor(one)) for one in wanted]
    while (missing := LONGEST_PERIOD - sum(shares)) != 0:
        step = 1 if missing > 0 else -1
        able = [domain for domain, share in enumerate(shares) if share + step > 0]
        furthest = max(able, key=lambda domain: step * (wanted[domain] - shares[domain]))
        shares[furthest] += step
    return tuple(shares)


def even_schedule(shares: Sequence[int]) -> np.ndarray:
    """The domain at each position of one period, int64 [sum of shares]: the most even order there is.

    The j-th draw (from 0) of a domain of share p belongs between the positions floor(j Q / p) and ceil((j + 1) Q / p) - 1; of the draws whose
    time has come, the one whose time ends first is taken. All draws fit: each position can be divided among the domains in proportion to
    their shares, which keeps all windows, so whole draws can keep them too (bipartite matching), and for jobs of one unit the earliest
    deadline first finds a way where there is one. Windows kept mean that after n positions a domain has at least floor(n p / Q) and at most
    ceil(n p / Q) draws. (Baruah, Cohen, Plaxton, Varvel: Proportionate progress, Algorithmica 1996.)
    """
    period = sum(shares)
    drawn = [0] * len(shares)
    waiting = [(0, domain) for domain in range(len(shares))]  # (first position of the next draw, domain)
    ready: list[tuple[int, int]] = []  # (end of the window, domain)
    schedule = np.empty(period, dtype=np.int64)
    for position in range(period):
        while waiting and waiting[0][0] <= position:
            _, domain = heapq.heappop(waiting)
            heapq.heappush(ready, (-(-(drawn[domain] + 1) * period // shares[domain]), domain))
        _, domain = heapq.heappop(ready)
        schedule[position] = domain
        drawn[domain] += 1
        heapq.heappush(waiting, (drawn[domain] * period // shares[domain], domain))
    return schedule

"""How far ahead to draft: each row's window by what its own drafts did so far, and by what a longer call costs.

With a_j the probability that draft j stands if all before it do, a round of W drafts gives 1 + sum_w prod_(j<=w) a_j
tokens and costs c(W + 1), a call's seconds over so many tokens: the window is what makes the quotient largest. The
a_j are counted from verdicts alone, which are final: a window that hung on drafts not yet verified would bend the
distribution (docs/exactness.md, 'What breaks it'). And the cost is a setting, not a clock that runs while drawing: so
an image doesn't depend on its batch, nor on how busy the machine is.
"""

from __future__ import annotations

from typing import Any

import numpy as np

Costs = tuple[tuple[int, float], ...]
"""(tokens, seconds) of calls of the model, measured: `genlab sample --sampler auto` does."""


def cost_of(costs: Costs, tokens: int) -> float:
    """Seconds of a call of that many tokens: straight lines between what was measured, and beyond.

    Raises:
        ValueError: if nothing was measured, or a cost isn't positive.
    """
    if not costs or any(n < 1 or s <= 0 for n, s in costs):
        raise ValueError(f"costs are pairs of tokens (1, 2, …) and seconds, got {costs}")
    n, seconds = (np.array(column, dtype=float) for column in zip(*sorted(costs), strict=True))
    if len(n) > 1 and tokens > n[-1]:
        slope = max(0.0, (seconds[-1] - seconds[-2]) / (n[-1] - n[-2]))
        return float(seconds[-1] + slope * (tokens - n[-1]))
    return float(np.interp(tokens, n, seconds))


class Window:
    """The window of each row of a batch."""

    def __init__(
        self,
        rows: int,
        most: int,
        costs: Costs = (),
        draft_cost: float = 0.0,
        forget: float = 0.95,
        belief: float = 2.0,
    ) -> None:
        """Start with the longest window.

        Args:
            rows: rows.
            most: the longest window; without costs, the window.
            costs: see `cost_of`.
            draft_cost: seconds a draft costs before it is verified.
            forget: weight of a verdict, each round later.
            belief: verdicts that a draft's own count must outweigh: it is first held to fare like the one before it.

        Raises:
            ValueError: for a window without a draft, or costs that are none.
        """
        if most < 1:
            raise ValueError(f"the window must hold at least one draft, got {most}")
        self.most, self.forget, self.belief = most, forget, belief
        self.seconds = np.array([cost_of(costs, w + 1) + w * draft_cost for w in range(1, most + 1)]) if costs else None
        self.tested, self.stood = np.zeros((rows, most)), np.zeros((rows, most))

    def choose(self) -> list[int]:
        """Drafts of the next round, a row."""
        if self.seconds is None or not self.tested.any():
            return [self.most] * len(self.tested)
        rate, tokens, reach = np.full(len(self.tested), 0.8), np.ones(len(self.tested)), np.ones(len(self.tested))
        gain = []
        for j in range(self.most):
            rate = (self.stood[:, j] + self.belief * rate) / (self.tested[:, j] + self.belief)
            reach = reach * rate
            tokens = tokens + reach
            gain.append(tokens / self.seconds[j])
        return (np.argmax(gain, 0) + 1).tolist()

    def learn(self, drafted: list[int], stood: list[int]) -> None:
        """Count a round: how many drafts each row had verified, and how many stood before the first that fell."""
        if self.seconds is None:
            return
        at, n, s = np.arange(self.most), np.array(drafted)[:, None], np.array(stood)[:, None]
        live = np.where(n > 0, self.forget, 1.0)
        self.tested = self.tested * live + (at < np.minimum(s + 1, n))
        self.stood = self.stood * live + (at < s)


class JacobiWindow(Window):
    """The same where drafts are refined while they wait: the longer the window, the more often.

    So verdicts are counted by age, the iterations a draft has been through, a(k). In a window of W that moves R places
    an iteration, the draft at place j has age (W - j) / R; R is the fixed point of 1 + sum_w prod_(j<=w) a((W-j) / R).
    """

    OLDEST = 15
    HOPE = 0.8  # an age not seen yet is held to fail a fifth less often than the one before: else it is never tried

    def __init__(
        self,
        rows: int,
        most: int,
        costs: Costs = (),
        own_cost: float = 0.0,
        forget: float = 0.99,
        belief: float = 1.0,
    ) -> None:
        """As `Window`; own_cost: seconds a call that aren't the model's, which make long windows worth more."""
        super().__init__(rows, most, tuple((n, s + own_cost) for n, s in costs), 0.0, forget, belief)
        self.age = np.zeros((rows, most), dtype=int)
        self.tested, self.stood = np.zeros((rows, self.OLDEST + 1)), np.zeros((rows, self.OLDEST + 1))
        # places that are 12 % apart are enough
        self.widths = np.array(sorted({min(most, max(i, round(1.12**i))) for i in range(1, 60)}))

    def choose(self) -> list[int]:
        """Drafts of the next round, a row; the longest window until a few verdicts are in."""
        if self.seconds is None:
            return [self.most] * len(self.tested)
        rates, rate = [], np.full(len(self.tested), 0.5)
        for k in range(self.OLDEST + 1):
            hope = 1 - self.HOPE * (1 - rate) if k else rate
            rate = (self.stood[:, k] + self.belief * hope) / (self.tested[:, k] + self.belief)
            rates.append(rate)
        rate_RK, rows = np.stack(rates, 1), np.arange(len(self.tested))[:, None, None]
        place = np.arange(1, self.most + 1)
        pace = np.full((len(self.tested), len(self.widths), 1), 2.0)
        for _ in range(8):
            age = (self.widths[:, None] - place).clip(min=0) / pace
            low = np.minimum(age.astype(int), self.OLDEST - 1)
            share = np.minimum(age - low, 1.0)
            a = rate_RK[rows, low] * (1 - share) + rate_RK[rows, low + 1] * share
            reach = np.cumprod(np.where(place <= self.widths[:, None], a, 0.0), -1)
            pace = 0.5 * (pace + 1 + reach.sum(-1, keepdims=True))
        best = self.widths[np.argmax(pace[..., 0] / self.seconds[self.widths - 1], -1)]
        best = np.maximum(best, (self.age > 0).sum(1))  # what has been refined is not thrown away: fewer new ones come
        return np.where(self.tested.sum(1) < 8, self.most, best).tolist()

    def learn(self, drafted: list[int], stood: list[int]) -> None:
        """Count a round's verdicts by age; drafts behind them grow older, and move to the front."""
        if self.seconds is None:
            return
        for b, (n, s) in enumerate(zip(drafted, stood, strict=True)):
            if not n:
                continue
            self.tested[b] *= self.forget
            self.stood[b] *= self.forget
            seen = np.minimum(self.age[b, : min(s + 1, n)], self.OLDEST)
            np.add.at(self.tested[b], seen, 1.0)
            np.add.at(self.stood[b], seen[:s], 1.0)
            left = self.age[b, s + 1 : n] + 1
            self.age[b] = 0
            self.age[b, : len(left)] = left
            if s < n:  # the place behind the window's end was drawn, too: it waits there, once refined
                self.age[b, len(left) : len(left) + 1] = 1


class Count:
    """What became of drafts, for `Stats`: those that were tested (all before them stood) and those that stood."""

    def __init__(self, length: int) -> None:
        """Args: length: positions of an image."""
        self.drafted = 0
        self.step = np.zeros((2, length + 1), dtype=int)
        self.position = np.zeros((2, length), dtype=int)

    def add(self, at: list[int], drafted: list[int], stood: list[int]) -> None:
        """Count a round: each row's position, drafts and drafts that stood."""
        begin, n, s = np.array(at), np.array(drafted), np.array(stood)
        self.drafted += int(n.sum())
        for row, many in enumerate((np.minimum(s + 1, n), s)):
            self.step[row] += _covered(np.zeros_like(many), many, self.step.shape[1])
            self.position[row] += _covered(begin, begin + many, self.position.shape[1])

    def stats(self) -> dict[str, Any]:
        """Fields of `Stats`."""
        deepest = int((self.step[0] > 0).sum())
        by_step, by_position = ([(int(t), int(s)) for t, s in x.T] for x in (self.step[:, :deepest], self.position))
        return {
            "proposed": self.drafted,
            "accepted": int(self.step[1].sum()),
            "by_step": by_step,
            "by_position": by_position,
        }


def _covered(begin: np.ndarray, end: np.ndarray, size: int) -> np.ndarray:
    """How many of the intervals [begin, end) hold each of 0 … size - 1."""
    edges = np.bincount(begin, minlength=size + 1) - np.bincount(end, minlength=size + 1)
    return edges.cumsum()[:size]

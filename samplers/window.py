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


class Count:
    """What became of drafts, for `Stats`: those that were tested (all before them stood) and those that stood."""

    def __init__(self, length: int) -> None:
        """Args: length: positions of an image."""
        self.drafted = 0
        self.step = np.zeros((2, length + 1), dtype=int)
        self.position = np.zeros((2, length), dtype=int)

    def add(self, at: list[int], drafted: list[int], stood: list[int]) -> None:
        """Count a round: each row's position, drafts and drafts that stood."""
        for begin, n, s in zip(at, drafted, stood, strict=True):
            self.drafted += n
            for row, many in enumerate((min(s + 1, n), s)):
                self.step[row, :many] += 1
                self.position[row, begin : begin + many] += 1

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

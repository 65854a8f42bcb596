"""CSpD's published rule (Wang et al., arXiv 2411.11925): whole tokens, tested by the last step alone. Approximate.

A token's density can't be computed: it is an integral over all paths. The paper puts in its place the last step's
density, at the end of a path that target and draft walk with the same noise ("trajectory alignment"), times the ratio
of the other steps' spreads, as if aligned paths differed by those alone:

    r = prod_{t >= 2} (|S_q,t| / |S_p,t|)^(1/2)  N(x_0; mu_p(x_1^p), S_p) / N(x_0; mu_q(x_1^q), S_q)

Accept if u < min(1, r), in logarithms. At the first rejection later drafts are dropped and the token is drawn from the
positive part of D p - q by rejection, D being the product above: propose y ~ N(mu_p(x_1^p), S_p), keep it with
probability max(0, 1 - q(y) / (D p(y))). The target draws the first tokens ("token pre-filling"). The law that comes
out is near the target's, not the target's: the audit measures how far (`docs/exactness.md`).
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch

from genlab.distributions import Chain, Gaussian
from genlab.noise import Noise

from .base import Stats
from .continuous_walk import Models

_MOST = 1 << 12  # proposals a residual may take: D p - q can be almost nowhere positive


@dataclass(frozen=True, eq=False)
class Aligned:
    """The end of a path: the event (B, G, C), the last step's Gaussian, and the other steps' log std, summed (B, G)."""

    event: torch.Tensor
    last: Gaussian
    spread: torch.Tensor

    @classmethod
    def walk(cls, chain: Chain, noise: Noise, stats: Stats) -> Aligned:
        """Walk a chain with the noise of its positions: the same as `Chain.path`'s."""
        C = chain.start.mean.shape[-1]
        x = chain.start.at(noise.at(purpose="start").normal(C).to(chain.start.mean))
        spread: Any = 0.0
        for i in range(chain.steps):
            p = chain.transition(x, i)
            p = Gaussian(p.mean, p.std.expand_as(x))
            if i < chain.steps - 1:
                spread = spread + p.std.log().sum(-1)
            x = p.at(noise.at(step=i, purpose="step").normal(C).to(x))
        stats.head_calls += chain.steps
        return cls(x, p, spread + torch.zeros_like(x[..., 0]))


def log_density(p: Gaussian, x: torch.Tensor, tempering: float) -> torch.Tensor:
    """Log-density, its exponent divided by `tempering`."""
    return (-0.5 / tempering * ((x - p.mean) / p.std) ** 2 - p.std.log()).sum(-1)


def draw_paper(models: Models, noise: Noise, c: Any, stats: Stats) -> None:
    """Draw all tokens of a batch into the models' states.

    Raises:
        ValueError: without a drafting model.
    """
    if models.draft is None:
        raise ValueError("the published rule needs a drafting model: --set draft=CHECKPOINT")
    order_BL, tally = models.order_BL, torch.zeros(2, models.order_BL.shape[1], dtype=torch.long)
    B, L = order_BL.shape
    for i in range(round(c.prefill * L)):
        chain = models.own(models.next())
        event = chain.sample(noise.at(position=order_BL[:, i : i + 1]))
        stats.head_calls += chain.steps
        for state in (models.state, models.ahead):
            models.settle(state, event, models.n_B < L)
    if int(models.n_B.min()) < L:
        models.own(models.next())  # the grid of times
    rows, turn = torch.arange(B, device=order_BL.device), 0
    while int((n_B := models.n_B).min()) < L:
        width = min(c.window, L - int(n_B.min()))
        at_BW = n_B[:, None] + torch.arange(width + 1, device=n_B.device)
        valid, position = at_BW < L, order_BL.gather(1, at_BW.clamp(max=L - 1))
        q: list[Aligned] = []
        for k in range(width):
            q.append(Aligned.walk(models.drafted(), noise.at(position=position[:, k : k + 1]), stats))
            models.settle(models.ahead, q[-1].event, valid[:, k] & valid[:, k + 1])
        parts = models.many([a.event for a in q][: width if int(at_BW.min(0).values[-1]) < L else width - 1])
        index = torch.arange(width + 1, device=n_B.device).clamp(max=len(parts) - 1).expand(B, -1)
        p = Aligned.walk(models.own(parts[0].select(parts[1:], index)), noise.at(position=position), stats)

        draft = torch.cat([a.event for a in q], 1)
        D = torch.cat([a.spread for a in q], 1) - p.spread[:, :-1]
        q_last = Gaussian(torch.cat([a.last.mean for a in q], 1), torch.cat([a.last.std for a in q], 1))
        p_last = Gaussian(p.last.mean[:, :-1], p.last.std[:, :-1])
        log_r = D + log_density(p_last, draft, c.tempering) - log_density(q_last, draft, c.tempering)
        u = noise.at(position=position[:, :-1], step=turn, purpose="paper accept").uniform(1)[..., 0]
        good = valid[:, :-1]
        accepted = good & (u.log() < log_r)
        leading, drafted = accepted.long().cumprod(1).sum(1), good.sum(1)
        stats.proposed, stats.accepted = stats.proposed + int(drafted.sum()), stats.accepted + int(leading.sum())
        tested = good & (torch.arange(width, device=n_B.device) <= leading[:, None])
        for i, which in enumerate((tested, tested & accepted)):
            tally[i] += torch.bincount(at_BW[:, :-1][which].cpu(), minlength=L)
        new = p.event.clone()
        rejected = (leading < drafted).nonzero()[:, 0]
        if len(rejected):
            at = (rejected, leading[rejected])
            here = noise.rows(rejected).at(position=position[at][:, None], step=turn)
            ends = [Gaussian(d.mean[at], d.std[at]) for d in (p_last, q_last)]
            new[at] = _residual(ends[0], ends[1], D[at], c.tempering, here, stats)
        models.rewind(n_B)
        for state in (models.state, models.ahead):
            for k in range(width):
                models.settle(state, draft[:, k : k + 1], leading > k)
            models.settle(state, new[rows, leading][:, None], valid[rows, leading])
        turn += 1
    stats.by_position = [(int(a), int(b)) for a, b in tally.T]


def _residual(
    p: Gaussian, q: Gaussian, D_N: torch.Tensor, tempering: float, noise: Noise, stats: Stats
) -> torch.Tensor:
    """Draws (N, C) from the positive part of D p - q, a growing block of proposals at a time.

    The blocks grow alike whatever the batch, so that a row's draw is its own: many rows are taken in parts.
    """
    N, C = p.mean.shape
    out, left, block, before = p.mean.clone(), torch.arange(N, device=p.mean.device), 16, 0
    while len(left):
        found = []
        for rows in left.split(max(1, (1 << 20) // (C * block))):
            P, Q = (Gaussian(d.mean[rows, None], d.std[rows, None]) for d in (p, q))
            here = noise.rows(rows)
            y = P.at(here.at(purpose=f"paper residual {block}").normal(block, C)[:, 0].to(out))
            log_ratio = log_density(Q, y, tempering) - log_density(P, y, tempering) - D_N[rows, None]
            keep = here.at(purpose=f"paper keep {block}").uniform(block)[:, 0] < -torch.expm1(log_ratio)
            first = keep.int().argmax(1)  # the first proposal where none is kept
            out[rows] = y[torch.arange(len(rows), device=y.device), first]
            found.append(keep.any(1))
            stats.trials += int(torch.where(found[-1], first + 1, block).sum())
        left, before, block = left[~torch.cat(found)], before + block, 2 * block
        if before >= _MOST and len(left):
            warnings.warn(
                f"{len(left)} residuals of the published rule found nothing in {before} proposals: "
                "plain draws of the target's last step stand in their place",
                stacklevel=2,
            )
            break
    return out

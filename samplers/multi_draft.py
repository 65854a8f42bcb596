"""Several candidates for one place: take one of n drafts from q such that the place follows p.

With replacement (n independent draws) the rule is SpecTr's k-sequential selection (Sun et al., arXiv 2310.15141,
algorithm 3); without, recursive rejection (Jeon et al., arXiv 2402.14160): after each rejection p becomes the residual
and q loses the rejected id. `best_acceptance` is what no rule can beat, from the dual of the transport problem (Hu et
al., arXiv 2502.18779). All need one head; `joint` turns a product of a few small heads into one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from genlab.distributions import Categorical
from genlab.noise import Noise

from .verify import invert

MOST_IDS = 1 << 20
"""Joint ids that a table may have."""


@dataclass(frozen=True, eq=False)
class Choice:
    """What became of n candidates a place."""

    index: torch.Tensor
    """The candidate that was taken, (B, G); n where none was."""
    ids: torch.Tensor
    """The id to use, (B, G)."""


def joint(d: Categorical) -> Categorical:
    """K heads over V ids as one head over V ** K, first head the highest digit.

    Raises:
        ValueError: if that were more than a million ids.
    """
    K, V = d.logits_BGKV.shape[2:]
    if V**K > MOST_IDS:
        raise ValueError(f"{K} heads of {V} ids make {V**K} joint ids: too many for a table")
    log = d.log_probs
    table = log[:, :, 0]
    for k in range(1, K):
        table = (table[..., None] + log[:, :, k, None, :]).flatten(-2)
    return Categorical(table[:, :, None])


def _probs(d: Categorical) -> torch.Tensor:
    if d.logits_BGKV.shape[2] != 1:
        raise ValueError(f"several candidates need one head, got {d.logits_BGKV.shape[2]}: use `joint` first")
    return d.probs[:, :, 0]


def candidates(q: Categorical, n: int, noise: Noise, *, replace: bool = True) -> torch.Tensor:
    """N drafts a place, (B, G, n); without replacement in the order drawn, -1 where q has no more ids."""
    probs = _probs(q)
    B, G, V = probs.shape
    if replace:
        b, g = torch.arange(B, device=probs.device)[:, None, None], torch.arange(G, device=probs.device)[:, None]
        return invert(probs.cumsum(-1), (b, g), noise.uniform(n))
    keys = probs.log() + noise.gumbel(V)  # the n largest, in order: draws without replacement
    value, ids = keys.topk(min(n, V), -1)
    ids = torch.where(value > -torch.inf, ids, -1)
    return torch.cat([ids, ids.new_full((B, G, n - ids.shape[-1]), -1)], -1)


def choose(p: Categorical, q: Categorical, drafts_BGn: torch.Tensor, noise: Noise, *, replace: bool = True) -> Choice:
    """Take a candidate, or draw from what is left of p: the outcome follows p.

    Args:
        p: the target, one head, (B, G) places.
        q: what `candidates` drew from.
        drafts_BGn: the candidates; -1 stands for one that isn't there (without any, p is drawn from).
        noise: fresh noise, with the positions of the places.
        replace: as in `candidates`.
    """
    P, Q = _probs(p), _probs(q)
    n = drafts_BGn.shape[-1]
    u = noise.at(purpose=f"{noise.purpose}/accept").uniform(n)
    if replace:
        take, P = _k_sequential(P, Q, drafts_BGn, u)
    else:
        take, P = _recursive(P, Q, drafts_BGn, u)
    index = torch.where(take.any(-1), take.int().argmax(-1), n)
    B, G = index.shape
    at = torch.arange(B, device=P.device)[:, None], torch.arange(G, device=P.device)
    fresh = invert(P.cumsum(-1), at, noise.at(purpose=f"{noise.purpose}/residual").uniform(1)[..., 0])
    chosen = drafts_BGn.gather(-1, index.clamp(max=n - 1)[..., None])[..., 0]
    return Choice(index, torch.where(index < n, chosen, fresh))


def _k_sequential(
    P: torch.Tensor, Q: torch.Tensor, drafts: torch.Tensor, u: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which candidates pass min(1, p / (rho q)), and the residual; rho is the least that keeps it positive."""
    there, drafts = drafts >= 0, drafts.clamp(min=0)
    n = there.sum(-1, keepdim=True).clamp(min=1).to(P)

    def rate(rho: torch.Tensor) -> torch.Tensor:
        return torch.minimum(P / rho, Q).sum(-1, keepdim=True)

    low, high = torch.ones_like(n), n
    for _ in range(30):  # 1 - (1 - beta)^n <= rho beta holds at rho = n; halve down to where it begins to
        middle = (low + high) / 2
        beta = rate(middle)
        good = 1 - (1 - beta) ** n <= middle * beta
        low, high = torch.where(good, low, middle), torch.where(good, middle, high)
    beta = rate(high)
    passes = (u < P.gather(-1, drafts) / (high * Q.gather(-1, drafts))) & there
    factor = torch.where(beta > 0, (1 - (1 - beta) ** n) / beta.clamp(min=1e-300), n)
    rest = (P - torch.minimum(P / high, Q) * factor).clamp(min=0)
    drawn = there.any(-1, keepdim=True) & (rest.sum(-1, keepdim=True) > 0)
    return passes, torch.where(drawn, rest, P)


def _recursive(
    P: torch.Tensor, Q: torch.Tensor, drafts: torch.Tensor, u: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which candidates pass, each against the residual its predecessors left; and what the last one leaves."""
    passes = []
    for i in range(drafts.shape[-1]):
        x = drafts[..., i : i + 1]
        there, x = x >= 0, x.clamp(min=0)
        passes.append((u[..., i : i + 1] * Q.gather(-1, x) < P.gather(-1, x)) & there)
        rest = (P - Q).clamp(min=0)
        mass = rest.sum(-1, keepdim=True)
        P = torch.where(there & (mass > 0), rest / mass.clamp(min=1e-300), P)
        left = Q.scatter(-1, x, 0.0)
        mass = left.sum(-1, keepdim=True)
        Q = torch.where(there & (mass > 0), left / mass.clamp(min=1e-300), Q)
    return torch.cat(passes, -1), P


def best_acceptance(p: Categorical, q: Categorical, n: int, *, replace: bool = True) -> torch.Tensor:
    """The largest probability, (B, G), that any exact rule takes one of n candidates: an upper bound to hold rules to.

    The dual is min over sets H of ids of p(H) + 1 - P(all candidates in H); the minimum is at one of the V + 1 sets of
    the ids with the largest q / p.
    """
    P, Q = _probs(p), _probs(q)
    order = torch.where(P > 0, Q / P.clamp(min=1e-300), torch.where(Q > 0, torch.inf, -1.0)).argsort(
        -1, descending=True
    )
    P, Q = P.gather(-1, order), Q.gather(-1, order)
    inside = Q.cumsum(-1).clamp(max=1)
    inside = inside**n if replace else _all_inside(Q, n)
    return (P.cumsum(-1) + 1 - inside).amin(-1).clamp(max=1)


def _all_inside(Q: torch.Tensor, n: int) -> torch.Tensor:
    """P(n draws without replacement fall into the first v ids), (B, G, V).

    As a race of exponential clocks of rates q: n ids inside must ring before any outside, whose rates add up to c:
    the integral over t of c exp(-c t) P(at least n inside by t), by the trapezoid rule in log t.
    """
    t = torch.arange(-20.0, 36.0, 0.05, dtype=torch.float64, device=Q.device).exp()
    fewer = [torch.ones((*Q.shape[:-1], len(t)), dtype=torch.float64, device=Q.device)]
    fewer += [torch.zeros_like(fewer[0]) for _ in range(n - 1)]  # P(j inside by t), j < n
    outside, result = Q.sum(-1), []
    support = (Q > 0).sum(-1)
    for v in range(Q.shape[-1]):
        ring = -torch.expm1(-Q[..., v, None] * t)
        for j in reversed(range(n)):
            fewer[j] = fewer[j] * (1 - ring) + (fewer[j - 1] * ring if j else 0)
        outside = outside - Q[..., v]
        c = outside[..., None]
        race = (c * t * (-c * t).exp() * (1 - sum(fewer))).sum(-1) * 0.05
        enough = ((Q[..., : v + 1] > 0).sum(-1) >= torch.clamp(support, max=n)).double()
        result.append(torch.where(outside > 1e-12, race, enough))
    return torch.stack(result, -1)

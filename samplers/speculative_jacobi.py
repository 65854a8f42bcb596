"""Speculative Jacobi decoding (Teng et al., arXiv 2410.01699): a window of drafts, one forward to verify it.

Every draft carries the distribution it was drawn from. Drafts up to the first rejection become tokens; behind it
all places are drawn anew from what the forward just said, which is then their q. The draws of consecutive
iterations may be coupled, so that a draft survives a small change of its distribution:

- `none`: drawn anew with fresh noise, the paper's rule.
- `maximal`: accepted or replaced against the new p, as verification does (cf. MC-SJD).
- `gumbel`: one vector of Gumbel noise a position, for good. Then a draft is right exactly if it is what its position
  draws in the end, and the tokens are those of a Gumbel-max sampler that takes one at a time, whatever the drafts.

All three are exact for every initialisation (docs/exactness.md): what stands at a position hangs on the positions
before it and on noise of its own, never on what follows. Rows advance on their own.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F

from genlab.config import config
from genlab.distributions import Categorical
from genlab.generators.base import Condition, Generator
from genlab.noise import Noise
from genlab.tokens import Tokens

from .ancestral import CategoricalConfig
from .base import Sampler, Stats
from .verify import Heads, gumbel_draw, verify


@config
class SpeculativeJacobiConfig(CategoricalConfig):
    """Window, and where drafts come from."""

    window: int = 16
    """Drafts a forward (the paper's window less one)."""
    init: Literal["random", "model", "horizontal", "vertical"] = "model"
    """What a position starts with as it enters the window: any id; a draw from the newest distribution to its left;
    the id to its left, or above it (in the first row: left). Spatial ones need tokens in raster order."""
    coupling: Literal["none", "maximal", "gumbel"] = "maximal"
    """How drafts of consecutive iterations hang together."""
    heads: Heads = "joint"
    """Several sub-token heads: one test of the whole token, or each head on its own."""


def in_single_file(generator: Generator) -> bool:
    """Whether it predicts ids, one position after the other."""
    return generator.predicts is Categorical and not generator.any_order and generator.n_groups == generator.spec.length


def advance(generator: Generator, state: object, new_BTK: torch.Tensor, take_B: list[int]) -> None:
    """Commit the first take_B[b] of row b's events."""
    begin = list(state.n)  # type: ignore[attr-defined]
    for t in range(max(take_B)):
        generator.commit(state, new_BTK[:, t : t + 1])
    generator.crop(state, [n + t for n, t in zip(begin, take_B, strict=True)])


class SpeculativeJacobiSampler(Sampler):
    """A window of drafts, each with the distribution it was drawn from; one forward verifies them all."""

    name = "speculative-jacobi"
    Config = SpeculativeJacobiConfig
    config: SpeculativeJacobiConfig
    verify = staticmethod(verify)

    @classmethod
    def supports(cls, generator: Generator) -> bool:
        """Generators over ids that draw one position after the other."""
        return in_single_file(generator)

    def draw(self, generator: Generator, labels: Condition, noise: Noise) -> tuple[Tokens, Stats]:
        """One batch; each row as fast as its own drafts allow.

        Raises:
            ValueError: for a spatial initialisation of tokens that have no neighbours, or no window.
        """
        c, spec, L = self.config, generator.spec, generator.n_groups
        if c.window < 1:
            raise ValueError(f"the window must hold at least one draft, got {c.window}")
        if c.init in ("horizontal", "vertical") and (spec.order != "raster" or len(spec.grid) < 2):
            raise ValueError(
                f"init {c.init!r} needs tokens in raster order, not {spec.describe()}: use model or random"
            )
        state = generator.start(labels, c.guidance)
        B, K, V, device = len(state.n), spec.depth, spec.vocab or 0, generator.device
        row, position = torch.arange(B, device=device)[:, None], torch.cat([generator.where(g) for g in range(L)])
        ids_BLK = torch.zeros(B, L, K, dtype=torch.long, device=device)  # tokens, and drafts behind them
        q_BWKV = torch.zeros(B, 0, K, V, device=device)  # what the drafts were drawn from
        newest_BKV = torch.zeros(B, K, V, device=device)
        stats, iteration = Stats(), 0
        while min(state.n) < L:
            n_B1 = torch.tensor(state.n, device=device)[:, None]
            width = min(c.window, L - min(state.n) - 1)
            q_BWKV = self._top_up(ids_BLK, q_BWKV, newest_BKV, n_B1, width, spec.grid[-1], noise.at(position=position))
            at_BW = n_B1 + torch.arange(width + 1, device=device)
            valid, place_BW = at_BW[:, :-1] < L - 1, at_BW.clamp(max=L - 1)
            drafts = ids_BLK[row, place_BW[:, :-1]]
            dists = generator.predict_many(state, list(drafts.split(1, 1)) if width else [])
            p = c.shape(Categorical(torch.cat([d.logits_BGKV for d in dists], 1)))  # type: ignore[attr-defined]
            here = noise.at(position=position[place_BW], step=iteration)
            if c.coupling == "gumbel":
                new = gumbel_draw(p, here.at(step=0, purpose="gumbel"))
                leading = (valid & (new[:, :-1] == drafts).all(-1)).long().cumprod(1).sum(1)
            else:
                new, leading = p.sample(here.at(purpose="redraw")), n_B1[:, 0] * 0
                if width:
                    v = self.verify(
                        Categorical(p.logits_BGKV[:, :-1]),
                        Categorical(q_BWKV),
                        drafts,
                        here.at(position=here.position[:, :-1], purpose="verify"),  # type: ignore[index]
                        heads=c.heads,
                        in_order=c.coupling == "none",
                        where=valid,
                    )
                    leading = v.leading
                    keep = valid if c.coupling == "maximal" else valid & (at_BW[:, :-1] <= n_B1 + leading[:, None])
                    new[:, :-1] = torch.where(keep[..., None], v.replacement, new[:, :-1])
            take = torch.where(n_B1[:, 0] < L, leading + 1, 0)
            stats.proposed += int(valid.sum())
            stats.accepted += int(leading.sum())
            b, j = (at_BW < L).nonzero(as_tuple=True)
            ids_BLK[b, at_BW[b, j]] = new[b, j]
            advance(generator, state, new, take.tolist())
            # what is left of the window moves to its front; every draft in it follows its p
            last = (L - 1 - n_B1[:, 0]).clamp(0, width)
            newest_BKV = p.logits_BGKV[row[:, 0], last]
            q_BWKV = self._shift(p.logits_BGKV, take)
            iteration += 1
        return generator.tokens(state), Stats(
            model_calls=state.calls, rows=state.rows_computed, proposed=stats.proposed, accepted=stats.accepted
        )

    @staticmethod
    def _shift(p_BWKV: torch.Tensor, take_B: torch.Tensor) -> torch.Tensor:
        """Drop the first take_B[b] places of row b; NaN where nothing is left."""
        B, W = p_BWKV.shape[:2]
        at = take_B[:, None] + torch.arange(W, device=take_B.device)
        moved = p_BWKV[torch.arange(B, device=take_B.device)[:, None], at.clamp(max=W - 1)]
        return moved.masked_fill((at >= W)[..., None, None], torch.nan)

    def _top_up(
        self,
        ids_BLK: torch.Tensor,
        q_BWKV: torch.Tensor,
        newest_BKV: torch.Tensor,
        n_B1: torch.Tensor,
        width: int,
        columns: int,
        noise: Noise,
    ) -> torch.Tensor:
        """Start the positions that have just entered the window: their ids (in place), and the window's q."""
        c, (B, L, K), (W, V) = self.config, ids_BLK.shape, (q_BWKV.shape[1], q_BWKV.shape[-1])
        rows = torch.arange(B, device=ids_BLK.device)
        q = q_BWKV[:, :width]
        if width > W:
            q = torch.cat([q, q.new_full((B, width - W, K, V), torch.nan)], 1)
        for j in range(width):
            at = n_B1[:, 0] + j
            fresh = q[:, j, 0, 0].isnan() & (at < L)
            if not bool(fresh.any()):
                continue
            at = at.clamp(max=L - 1)
            positions: torch.Tensor = noise.position  # type: ignore[assignment]
            here = noise.at(position=positions[at][:, None], purpose="init")
            flat = newest_BKV if c.init == "model" else torch.zeros_like(newest_BKV)
            ids = Categorical(flat[:, None]).sample(here)[:, 0]
            if c.init in ("horizontal", "vertical"):
                source = at - (columns if c.init == "vertical" else 1)
                source = torch.where(source < 0, at - 1, source)
                copied = ids_BLK[rows, source.clamp(min=0)]
                sure = torch.where(F.one_hot(copied, V).bool(), 0.0, -torch.inf).to(flat)
                near = (source >= 0)[:, None]
                ids, flat = torch.where(near, copied, ids), torch.where(near[..., None], sure, flat)
            ids_BLK[rows[fresh], at[fresh]] = ids[fresh]
            q[:, j] = torch.where(fresh[:, None, None], flat, q[:, j])
        return q.nan_to_num(nan=0.0, neginf=-torch.inf)

"""Speculative Jacobi decoding (Teng et al., arXiv 2410.01699): a window of drafts, one forward to verify it.

Every draft carries the distribution it was drawn from. Drafts up to the first rejection become tokens; behind it
all places are drawn anew from what the forward just said, which is then their q. The draws of consecutive
iterations may be coupled, so that a draft survives a small change of its distribution:

- `none`: drawn anew with fresh noise, the paper's rule.
- `maximal`: accepted or replaced against the new p, as verification does (cf. MC-SJD).
- `gumbel`: one vector of Gumbel noise a position, for good. Then a draft is right exactly if it is what its position
  draws in the end, and the tokens are those of a Gumbel-max sampler that takes one at a time, whatever the drafts.
  Nothing is tested, so an iteration costs least beside the model's call.

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
from .verify import Heads, verify
from .window import Costs, Count, JacobiWindow


@config
class SpeculativeJacobiConfig(CategoricalConfig):
    """Window, and where drafts come from."""

    window: int = 16
    """Drafts a forward (the paper's window less one); with `costs`, the most."""
    costs: Costs = ()
    """(tokens, seconds) of calls, measured. With them each row's window adapts to what its drafts did so far."""
    own_cost: float = 0.0
    """With `costs`: seconds a call that the sampler takes beside the model, measured."""
    init: Literal["random", "model", "horizontal", "vertical"] = "model"
    """What a position starts with as it enters the window: any id; a draw from the newest distribution to its left;
    the id to its left, or above it (in the first row: left). Spatial ones need tokens in raster order."""
    coupling: Literal["none", "maximal", "gumbel"] = "gumbel"
    """How drafts of consecutive iterations hang together."""
    heads: Heads = "joint"
    """Several sub-token heads: one test of the whole token, or each head on its own."""


def in_single_file(generator: Generator) -> bool:
    """Whether it predicts ids, one position after the other, and several positions at a call."""
    ids = generator.predicts is Categorical and not generator.any_order
    ids = ids and type(generator).predict_many is not Generator.predict_many
    # a coarse-to-fine generator may be asked for its first tokens only
    return ids and (generator.n_groups == generator.spec.length or generator.spec.order == "coarse_to_fine")


_BLOCK = 16  # positions whose Gumbel noise is made at once


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
        if c.init in ("horizontal", "vertical") and (spec.order != "raster" or len(spec.grid) < 2):
            raise ValueError(
                f"init {c.init!r} needs tokens in raster order, not {spec.describe()}: use model or random"
            )
        window = JacobiWindow(len(labels), c.window, c.costs, c.own_cost)
        state = generator.start(labels, c.guidance)
        B, K, V, device = len(state.n), spec.depth, spec.vocab or 0, generator.device
        row, position = torch.arange(B, device=device)[:, None], torch.cat([generator.where(g) for g in range(L)])
        ids_BLK = torch.zeros(B, L, K, dtype=torch.long, device=device)  # tokens, and drafts behind them
        p = Categorical(torch.zeros(B, 1, K, V, device=device))
        held_B1 = row * 0  # drafts behind each row's end, and what they were drawn from
        q_BWKV, newest_BKV, gumbel = p.logits_BGKV[:, :0], p.logits_BGKV[:, 0], _Gumbel(noise, position, K, V)
        count, iteration = Count(L), 0
        while min(state.n) < L:
            n_B1 = torch.tensor(state.n, device=device)[:, None]
            width_B1 = torch.minimum(torch.tensor(window.choose(), device=device)[:, None], (L - 1 - n_B1).clamp(min=0))
            width = int(width_B1.max())
            j = torch.arange(width + 1, device=device)
            at_BW, inside = n_B1 + j, j <= width_B1
            place_BW, valid = at_BW.clamp(max=L - 1), (j < width_B1)[:, :-1]
            here = noise.at(position=position[place_BW], step=iteration)
            noise_BWKV = gumbel.at(place_BW) if c.coupling == "gumbel" else None
            fresh = valid & (j[:-1] >= held_B1)
            q_BWKV = self._start(ids_BLK, q_BWKV, newest_BKV, place_BW, fresh, spec.grid[-1], here, noise_BWKV)
            drafts = ids_BLK[row, place_BW[:, :-1]]
            dists = generator.predict_many(state, list(drafts.split(1, 1)) if width else [])
            p = c.shape(Categorical(torch.cat([d.logits_BGKV for d in dists], 1)))  # type: ignore[attr-defined]
            if noise_BWKV is not None:
                new = (p.logits_BGKV + noise_BWKV).argmax(-1)
                leading = (valid & (new[:, :-1] == drafts).all(-1)).long().cumprod(1).sum(1)
            else:
                new, leading = self._redraw(p, width_B1, here.at(purpose="redraw")), n_B1[:, 0] * 0
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
            running = n_B1[:, 0] < L
            take = torch.where(running, leading + 1, 0)
            drafted, stood = (width_B1[:, 0] * running).tolist(), leading.tolist()
            iteration += 1
            window.learn(drafted, stood)
            count.add(state.n, drafted, stood)
            b, i = (inside & (at_BW < L)).nonzero(as_tuple=True)
            ids_BLK[b, at_BW[b, i]] = new[b, i]
            generator.advance(state, new, take.tolist())
            # what is left of the window moves to its front; every draft in it follows its p
            held_B1 = width_B1 + 1 - take[:, None]
            newest_BKV = p.logits_BGKV[row[:, 0], width_B1[:, 0]]
            if noise_BWKV is None:
                q_BWKV = p.logits_BGKV[row, (take[:, None] + j).clamp(max=width)]
        return generator.tokens(state), Stats(model_calls=state.calls, rows=state.rows_computed, **count.stats())

    def _redraw(self, p: Categorical, width_B1: torch.Tensor, noise: Noise) -> torch.Tensor:
        """Ids of every place; coupled drafts change by verification, so that only the window's last place is drawn."""
        if self.config.coupling == "none" or p.logits_BGKV.shape[1] == 1:
            return p.sample(noise)
        rows = torch.arange(len(width_B1), device=width_B1.device)[:, None]
        last = Categorical(p.logits_BGKV[rows, width_B1]).sample(noise.at(position=noise.position[rows, width_B1]))  # type: ignore[index]
        return last.expand(-1, p.logits_BGKV.shape[1], -1).clone()

    def _start(
        self,
        ids_BLK: torch.Tensor,
        q_BWKV: torch.Tensor,
        newest_BKV: torch.Tensor,
        place_BW: torch.Tensor,
        fresh_BW: torch.Tensor,
        columns: int,
        noise: Noise,
        gumbel_BWKV: torch.Tensor | None,
    ) -> torch.Tensor:
        """Start the positions that have just entered the window: their ids (in place), and the window's q."""
        new = fresh_BW.any(0).nonzero()[:, 0].tolist()
        width, missing = fresh_BW.shape[1], fresh_BW.shape[1] - q_BWKV.shape[1]
        q = q_BWKV[:, :width]
        if gumbel_BWKV is None and missing > 0:
            q = torch.cat([q, q.new_zeros(len(q), missing, *q.shape[2:])], 1)
        if not new:
            return q
        init, rows, at = self.config.init, torch.arange(len(q), device=q.device), place_BW[:, new]
        flat = newest_BKV[:, None] if init == "model" else torch.zeros_like(newest_BKV[:, None])
        flat, fresh = flat.expand(-1, len(new), -1, -1), fresh_BW[:, new]
        if gumbel_BWKV is not None:  # its own noise: then it is right as soon as its distribution is
            ids = (flat + gumbel_BWKV[:, new]).argmax(-1)
        else:
            ids = Categorical(flat).sample(noise.at(position=noise.position[:, new], purpose="init"))  # type: ignore[index]
        if init in ("horizontal", "vertical"):
            flat = flat.clone()
            for i in range(len(new)):  # from left to right: a position may copy one that has just been started
                above = at[:, i] - columns
                source = torch.where((above < 0) | (init == "horizontal"), at[:, i] - 1, above)
                copied, near = ids_BLK[rows, source.clamp(min=0)], (source >= 0)[:, None]
                ids[:, i] = torch.where(near, copied, ids[:, i])
                f = fresh[:, i]
                ids_BLK[rows[f], at[f, i]] = ids[f, i]
                if gumbel_BWKV is None:
                    sure = torch.where(F.one_hot(copied, flat.shape[-1]).bool(), 0.0, -torch.inf).to(flat)
                    flat[:, i] = torch.where(near[..., None], sure, flat[:, i])
        b, k = fresh.nonzero(as_tuple=True)
        ids_BLK[b, at[b, k]] = ids[b, k]
        if gumbel_BWKV is None:  # elsewhere drafts are tested, against what they were drawn from
            q = q.clone()
            q[b, torch.tensor(new, device=q.device)[k]] = flat[b, k]
        return q


class _Gumbel:
    """The Gumbel noise of every position, made as the window comes to it."""

    def __init__(self, noise: Noise, position_L: torch.Tensor, K: int, V: int) -> None:
        self.noise, self.position, self.shape = noise.at(purpose="gumbel"), position_L, (K, V)
        self.blocks: dict[int, torch.Tensor] = {}

    def at(self, place_BW: torch.Tensor) -> torch.Tensor:
        """(B, W, K, V) float32; places never go back."""
        low, high = int(place_BW.min()) // _BLOCK, int(place_BW.max()) // _BLOCK
        for i in range(low, high + 1):
            if i not in self.blocks:
                part = self.position[i * _BLOCK : (i + 1) * _BLOCK]
                self.blocks[i] = self.noise.at(position=part).gumbel(*self.shape).float()
        self.blocks = {i: g for i, g in self.blocks.items() if i >= low}
        window = torch.cat([self.blocks[i] for i in range(low, high + 1)], 1)
        return window[torch.arange(len(place_BW), device=place_BW.device)[:, None], place_BW - low * _BLOCK]

"""Exact continuous speculative decoding inside each token's denoising chain (cf. arXiv 2501.05370 and 2411.11925).

The unit of acceptance is the transition: one denoising step of one token, whose two Gaussians have densities, while
the chain's end has none. The draft is the target itself, its last output held for several steps: it evaluates
nothing and lives on the target's own grid of times. One batched call of the target verifies all steps of the window;
after a rejection drafting restarts at that very step, from what the target just said there. The last step is
always the target's own draw, noiseless or not, so that tokens and whatever is conditioned on them are the target's.

Positions advance on their own within a call of the generator; it is called again when all of them are done.
"""

from __future__ import annotations

import torch

from genlab.config import config
from genlab.distributions import Chain, Gaussian, JointChain
from genlab.generators.base import Condition, Generator
from genlab.noise import Noise
from genlab.tokens import Tokens

from .base import Sampler, Stats
from .chain import ChainConfig, ChainSampler, cosine_counts, prepare
from .verify import verify


@config
class ChainSpeculativeConfig(ChainConfig):
    """How far the draft runs ahead."""

    window: int = 4
    """Denoising steps drafted a call of the head."""
    widen: float = 1.0
    """Factor of the draft's standard deviation; 1 keeps covariances equal where the target's don't hang on x."""


class ChainSpeculativeSampler(Sampler):
    """Draft denoising steps with the target's own last output, verify them all in one call.

    `proposed` and `accepted` count transitions, `model_calls` the generator's calls.
    """

    name = "chain-speculative"
    Config = ChainSpeculativeConfig
    config: ChainSpeculativeConfig
    verify = staticmethod(verify)

    @classmethod
    def supports(cls, generator: Generator) -> bool:
        """Generators that predict chains whose positions may stand at steps of their own."""
        return ChainSampler.supports(generator) and not issubclass(generator.predicts, JointChain)

    def draw(self, generator: Generator, labels: Condition, noise: Noise) -> tuple[Tokens, Stats]:
        """One batch.

        Raises:
            ValueError: for no window, or a draft without spread.
        """
        c = self.config
        if c.window < 1 or c.widen <= 0:
            raise ValueError(f"window must be at least 1 and widen positive, got {c.window} and {c.widen}")
        state, stats = generator.start(labels, c.guidance), Stats()

        def step(here: torch.Tensor, where: torch.Tensor | None) -> None:
            chain = prepare(generator.predict(state, where), c)  # type: ignore[arg-type]
            event, proposed, accepted, calls = self.run(chain, noise.at(position=here))
            stats.proposed, stats.accepted = stats.proposed + proposed, stats.accepted + accepted
            stats.head_calls += calls
            generator.commit(state, event, where)

        if generator.any_order:
            order = noise.at(purpose="order").uniform(generator.n_groups).argsort(stable=True, dim=-1)
            for where in order.split(cosine_counts(generator.n_groups, c.calls), 1):
                step(where, where)
        else:
            for group in range(generator.n_groups):
                step(generator.where(group), None)
        stats.model_calls, stats.rows = state.calls, state.rows_computed
        return generator.tokens(state), stats

    def run(self, chain: Chain, noise: Noise) -> tuple[torch.Tensor, int, int, int]:
        """The chain's end (B, G, C), transitions proposed, transitions accepted, and calls of `chain.transition`."""
        W, S = self.config.window, chain.steps
        B, G, C = chain.start.mean.shape
        x = chain.start.at(noise.at(purpose="start").normal(C).to(chain.start.mean))
        s_BG = torch.zeros(B, G, dtype=torch.long, device=x.device)
        seeds = noise.seeds_B[:, None].expand(B, G).flatten()
        position = torch.as_tensor(noise.position, device=x.device).expand(B, G).reshape(-1, 1)
        flat = Noise(seeds, position)  # a row a place: each has an order of steps of its own
        anchor: tuple[torch.Tensor, torch.Tensor, Gaussian] | None = None
        proposed = accepted = calls = 0
        while bool((s_BG < S).any()):
            # draft from the target's last output; the last step is left to the target
            ahead = 0 if anchor is None else min(W, S - 1 - int(s_BG.min()))
            steps = s_BG + torch.arange(ahead + 1, device=x.device)[:, None, None]
            points, q = [x], []
            held = self._hold(chain, *anchor) if anchor is not None and ahead else None
            for j in range(ahead):
                assert held is not None
                q.append(held(points[-1], steps[j].clamp(max=S - 1)))
                z = flat.at(step=steps[j].reshape(-1, 1), purpose=f"draft{calls}").normal(C).view(B, G, C)
                points.append(q[-1].mean + q[-1].std * z.to(x))
            path = torch.stack(points)
            p = chain.transition(path, steps.clamp(max=S - 1))
            p = Gaussian(p.mean, p.std.expand_as(p.mean))
            leading, calls = torch.zeros_like(s_BG), calls + 1
            new = p.mean
            if ahead:
                # (W, B, G, C) -> a row a place, the window behind it
                rows = lambda v: v.flatten(1, 2).transpose(0, 1)  # noqa: E731
                valid = rows(steps[:-1, ..., None] < S - 1)[..., 0]
                spread = torch.stack([d.std.expand_as(x) for d in q])
                v = self.verify(
                    # a place without a draft passes as its own target, and is not looked at
                    Gaussian(rows(p.mean[:-1]), rows(p.std[:-1]).masked_fill(~valid[..., None], 1.0)),
                    Gaussian(rows(torch.stack([d.mean for d in q])), rows(spread).masked_fill(~valid[..., None], 1.0)),
                    rows(path[1:]),
                    flat.at(step=rows(steps[:-1, ..., None])[..., 0], purpose=f"verify{calls}"),
                    in_order=True,
                    where=valid,
                )
                leading = v.leading.view(B, G)
                proposed, accepted = proposed + int(valid.sum()), accepted + int(leading.sum())
                replaced = v.replacement.transpose(0, 1).unflatten(1, (B, G))
                rejected = leading < valid.sum(1).view(B, G)
            at = leading[None, ..., None].expand(1, B, G, C)
            here, mean, std = (t.gather(0, at)[0] for t in (path, p.mean, p.std))
            z = flat.at(step=(s_BG + leading).reshape(-1, 1), purpose=f"bonus{calls}").normal(C).view(B, G, C)
            new = mean + std * z.to(mean)
            if ahead:
                fixed = replaced.gather(0, at.clamp(max=ahead - 1))[0]
                new = torch.where(rejected[..., None], fixed, new)
            running = s_BG < S
            anchor = here, (s_BG + leading).clamp(max=S - 1), Gaussian(mean, std)
            x = torch.where(running[..., None], new, x)
            s_BG = torch.where(running, s_BG + leading + 1, s_BG)
        return x, proposed, accepted, calls

    def _hold(self, chain: Chain, x, step, p):
        """The draft: the target's output held; where the chain can't, its drift and spread as they were."""
        widen = self.config.widen
        drift = lambda y, _: Gaussian(y + (p.mean - x), p.std)  # noqa: E731
        held = drift if chain.hold is None else chain.hold(x, step, p)
        return held if widen == 1 else lambda y, s: Gaussian((d := held(y, s)).mean, d.std * widen)

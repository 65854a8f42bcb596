"""MAR's diffusion head: the distribution of one continuous token given a vector (Li et al., arXiv 2406.11838, §3.2).

A small MLP predicts the noise of x_t and, by its learned range, the variance of each step (improved DDPM, arXiv
2102.09672). Its ancestral sampler is a `Chain`: every step's mean and standard deviation stand open, for any
leading axes, so that a speculative sampler checks all tokens and all steps in one batched call.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from genlab.distributions import Chain, Gaussian, along
from genlab.noise import Noise

from .layers import TimestepEmbedding, modulate

TRAIN_STEPS = 1000
PRIOR = 0.1
"""Variance of a clean token (whose own is about 1) that is left where its context is known, as a draft assumes it."""


class Process:
    """The cosine noise schedule of improved DDPM (eq. 17), thinned to some of its 1000 steps.

    Attributes, each (n,) float64, indexed by the step of the thinned process, 0 the least noisy: `t`, its number
    among the 1000; `signal`, `sigma`: x_t = signal x_0 + sigma eps; `from_x0`, `from_xt`: the posterior mean of
    q(x_{t-1} | x_t, x_0); `log_beta`, `log_posterior`: its variance's upper and lower bound; `held`, (n, 6): all that
    `DiffusionChain` needs to carry what the network said on to other steps.
    """

    def __init__(self, n: int = TRAIN_STEPS) -> None:
        """Args: n: steps, 2 to 1000. Raises: ValueError: for others."""
        if not 2 <= n <= TRAIN_STEPS:
            raise ValueError(f"the diffusion head takes 2 to {TRAIN_STEPS} steps, got {n}")

        def level(u: float) -> float:
            return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2

        betas = [min(1 - level((i + 1) / TRAIN_STEPS) / level(i / TRAIN_STEPS), 0.999) for i in range(TRAIN_STEPS)]
        kept = torch.tensor([round(i * (TRAIN_STEPS - 1) / (n - 1)) for i in range(n)])
        power = (1 - torch.tensor(betas, dtype=torch.float64)).cumprod(0)[kept]
        before = torch.cat([torch.ones(1, dtype=torch.float64), power[:-1]])
        beta = 1 - power / before
        posterior = beta * (1 - before) / (1 - power)
        posterior[0] = posterior[1]  # it is 0 there; the log needs something
        self.n, self.t = n, kept
        self.signal, self.sigma = power.sqrt(), (1 - power).sqrt()
        self.from_x0 = beta * before.sqrt() / (1 - power)
        self.from_xt = (1 - before) * (1 - beta).sqrt() / (1 - power)
        self.log_beta, self.log_posterior = beta.log(), posterior.log()
        pull, trust = self.signal / self.sigma**2, 1 / (1 / PRIOR + (self.signal / self.sigma) ** 2)
        low, width = self.log_posterior / 2, (self.log_beta - self.log_posterior) / 2
        self.held = torch.stack([pull, trust, self.from_x0, self.from_xt, low, width], -1)

    def to(self, device: torch.device) -> Process:
        """The same tables on a device."""
        for name, value in vars(self).items():
            if isinstance(value, torch.Tensor):
                setattr(self, name, value.to(device))
        return self


@lru_cache(maxsize=64)
def process(n: int, device: torch.device) -> Process:
    """The `Process` of n steps, made once a device."""
    with torch.inference_mode(False):
        return Process(n).to(device)


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.ada_lin = nn.Linear(width, 3 * width)

    def forward(self, x: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        shift, scale, gate = self.ada_lin(condition).chunk(3, -1)
        return x + gate * self.mlp(modulate(self.norm(x), shift, scale))


class DiffusionHead(nn.Module):
    """Noise and variance range of a noisy token, given its condition: an MLP of modulated residual blocks."""

    def __init__(self, channels: int, condition: int, width: int, depth: int, clip: float = 0.0) -> None:
        """A head.

        Args:
            channels: of a token.
            condition: size of the vector.
            width: of the MLP.
            depth: of the MLP.
            clip: largest magnitude of the clean token that a step assumes; 0: any. The noisiest steps divide the
                error of the noise by a signal of 5e-5: a head that hasn't trained for long needs it.
        """
        super().__init__()
        self.channels, self.clip = channels, clip
        self.time_embed = TimestepEmbedding(width)
        self.cond_embed = nn.Linear(condition, width)
        self.input_proj = nn.Linear(channels, width)
        self.blocks = nn.ModuleList(_Residual(width) for _ in range(depth))
        self.final_ada_lin = nn.Linear(width, 2 * width)
        self.final = nn.Linear(width, 2 * channels)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for name, p in self.named_parameters():
            if name.startswith("time_embed") and p.ndim == 2:
                nn.init.normal_(p, std=0.02)
            elif "ada_lin" in name or name.startswith("final"):
                nn.init.zeros_(p)

    def forward(self, x: torch.Tensor, t: torch.Tensor, embedded: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Predicted noise, and the place in the variance range, -1 (least) to 1: each like x.

        Args:
            x: noisy tokens (..., C).
            t: training steps 0 … 999, that broadcast to x's leading axes.
            embedded: `cond_embed` of the conditions, likewise.
        """
        condition = F.silu(self.time_embed(t) + embedded)
        h = self.input_proj(x.to(self.input_proj.weight))
        for block in self.blocks:
            h = block(h, condition)
        shift, scale = self.final_ada_lin(condition).chunk(2, -1)
        h = modulate(F.layer_norm(h, h.shape[-1:], eps=1e-6), shift, scale)
        eps, fraction = self.final(h).chunk(2, -1)
        return eps, fraction

    def reverse(
        self, x: torch.Tensor, eps: torch.Tensor, fraction: torch.Tensor, step: torch.Tensor, p: Process
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and log-variance of p(x_{t-1} | x_t), float64; `step` of the process p broadcasts to x."""
        x, eps, fraction = x.double(), eps.double(), fraction.double()
        x0 = (x - p.sigma[step] * eps) / p.signal[step]
        x0 = x0.clamp(-self.clip, self.clip) if self.clip else x0
        high = 0.5 * (fraction + 1)
        return p.from_x0[step] * x0 + p.from_xt[step] * x, high * p.log_beta[step] + (1 - high) * p.log_posterior[step]

    def loss(self, x_BNC: torch.Tensor, z_BND: torch.Tensor, noise: Noise, repeats: int) -> dict[str, torch.Tensor]:
        """Error of the noise, and the variational bound in bits a channel, which trains the range alone.

        The bound's term of the last step is the plain Gaussian likelihood of the token (pixels have another).

        Args:
            x_BNC: clean tokens.
            z_BND: their conditions.
            noise: of the batch.
            repeats: draws of time and noise a token.
        """
        p = process(TRAIN_STEPS, x_BNC.device)
        B, N, C = x_BNC.shape
        at = noise.at(purpose="time").uniform(N, repeats)
        step = (at * p.n).long().clamp(max=p.n - 1)[..., None]
        eps = noise.at(purpose="noise").normal(N, repeats, C).float()
        x0 = x_BNC[:, :, None]
        x_t = p.signal[step].float() * x0 + p.sigma[step].float() * eps
        guess, fraction = self(x_t, step[..., 0], self.cond_embed(z_BND)[:, :, None])
        mean, logvar = self.reverse(x_t, guess.detach().float(), fraction.float(), step, p)
        true_mean, true_logvar = p.from_x0[step] * x0.double() + p.from_xt[step] * x_t.double(), p.log_posterior[step]
        kl = 0.5 * (logvar - true_logvar + (true_logvar - logvar).exp() + (true_mean - mean) ** 2 / logvar.exp() - 1)
        last = 0.5 * (math.log(2 * math.pi) + logvar + (x0.double() - mean) ** 2 / logvar.exp())
        bound = torch.where(step == 0, last, kl).mean().float() / math.log(2)
        mse = F.mse_loss(guess.float(), eps)
        return {"loss": mse + bound, "mse": mse.detach(), "bound": bound.detach()}


class DiffusionChain(Chain):
    """The head's ancestral sampler for tokens (B, G, C) as a chain; it holds its conditions, so it never gets stale.

    Transitions take a step, 0 the noisiest, in all the forms of `Chain`. The last step is noiseless, as MAR's;
    `last_std` gives it some. Apply `respaced` first, then `temperature`, then `last_std`.
    """

    def __init__(self, head: DiffusionHead, embedded_HBGW: torch.Tensor, scale_BG: torch.Tensor, steps: int) -> None:
        """A chain.

        Args:
            head: the network.
            embedded_HBGW: `cond_embed` of the conditions: H = 1, or 2 with the unconditional ones second.
            scale_BG: guidance, used where H = 2: eps = u + s (c - u); the range is the conditional one's.
            steps: of the thinned process.
        """
        B, G = embedded_HBGW.shape[1:3]
        zero = torch.zeros(B, G, head.channels, dtype=torch.float64, device=embedded_HBGW.device)
        super().__init__(Gaussian(zero, torch.ones_like(zero[..., :1])), self._step, steps, self._hold)
        self.head, self.embedded_HBGW, self.scale_BG = head, embedded_HBGW, scale_BG
        self.process = process(steps, zero.device)

    def _step(self, x: torch.Tensor, step: int | torch.Tensor) -> Gaussian:
        at = along(self.steps - 1 - torch.as_tensor(step, device=x.device), x)
        t = self.process.t[at]
        t = t[..., 0] if t.ndim else t
        if len(self.embedded_HBGW) == 1:
            eps, fraction = self.head(x, t, self.embedded_HBGW[0])
        else:
            halves = self.embedded_HBGW.unflatten(0, (2, *[1] * (x.ndim - 3)))
            (eps, other), (fraction, _) = self.head(x.expand(2, *x.shape), t, halves)
            eps = other.double() + self.scale_BG[..., None] * (eps.double() - other.double())
        mean, logvar = self.head.reverse(x, eps, fraction, at, self.process)
        return Gaussian(mean, torch.where(at == 0, 0.0, (0.5 * logvar).exp()))

    def _hold(self, x: torch.Tensor, step: torch.Tensor, p: Gaussian) -> Any:
        """What the network said at (x, step), read off the Gaussian it led to, carried on to later steps.

        The clean token that it sees there is a posterior mean. Had the token a normal prior of variance `PRIOR`, that
        would tell the prior's mean, and so the posterior mean at any later (x, step): little of a step's noise where
        noise is all there is, all of it at the end. The place in the variance's range stays as it was.
        """
        process, at = self.process, along(self.steps - 1 - step, x)
        pull, trust, from_x0, from_xt, low, width = process.held[at[..., 0]].split(1, -1)
        prior = (p.mean - from_xt * x) / from_x0 / trust - pull * x
        place, clip = (p.std.log() - low) / width, self.head.clip

        def transition(x: torch.Tensor, step: torch.Tensor) -> Gaussian:
            at = along(self.steps - 1 - step, x)
            pull, trust, from_x0, from_xt, low, width = process.held[at[..., 0]].split(1, -1)
            x0 = torch.addcmul(prior, pull, x) * trust
            x0 = x0.clamp(-clip, clip) if clip else x0
            return Gaussian(from_x0 * x0 + from_xt * x, torch.addcmul(low, width, place).exp())

        return transition

    def respaced(self, steps: int) -> DiffusionChain:
        """The same chain in another number of steps."""
        return DiffusionChain(self.head, self.embedded_HBGW, self.scale_BG, steps)

    def select(self, others: Sequence[Chain], index_BJ: torch.Tensor) -> DiffusionChain:
        """Position j of row b is the index_BJ[b, j]-th chain's only one; self is number 0."""
        if not others:
            return self.positions(index_BJ)
        return DiffusionChain.join([self, *others]).positions(index_BJ)  # type: ignore[list-item]

    def positions(self, index_BJ: torch.Tensor) -> DiffusionChain:
        """Each row's chain at these of its positions."""
        at = index_BJ[None, ..., None].expand(len(self.embedded_HBGW), -1, -1, self.embedded_HBGW.shape[-1])
        scale = self.scale_BG.gather(1, index_BJ)
        return DiffusionChain(self.head, self.embedded_HBGW.gather(2, at), scale, self.steps)

    @staticmethod
    def join(parts: list[DiffusionChain]) -> DiffusionChain:
        """Several chains of one head as one, their positions side by side: one call for all."""
        first = parts[0]
        assert all(p.head is first.head and p.steps == first.steps for p in parts), "chains of different heads"
        halves = max(len(p.embedded_HBGW) for p in parts)  # one without guidance: any second half, at a scale of 1
        embedded = torch.cat([p.embedded_HBGW.expand(halves, -1, -1, -1) for p in parts], 2)
        return DiffusionChain(first.head, embedded, torch.cat([p.scale_BG for p in parts], 1), first.steps)

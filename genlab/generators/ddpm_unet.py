"""The baseline: a class-conditional DDPM with diffusers' U-Net over the whole token map at once.

Ho et al., arXiv 2006.11239, with the cosine schedule and respaced sampling of Nichol & Dhariwal, arXiv 2102.09672.
It stands beside the autoregressive generators in the benches, under the same tokens, loop and metrics.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange

from genlab.config import config
from genlab.distributions import Gaussian, JointChain
from genlab.noise import Noise
from genlab.tokens import Tokens, TokenSpec

from .base import Condition, Generator, Guidance, State


@config
class DDPMUNetConfig:
    """Sizes of the baseline."""

    kind: Literal["ddpm_unet"] = "ddpm_unet"
    grid: tuple[int, int] = (8, 8)
    """Rows and columns of the token map."""
    channels: int = 16
    """Channels of a token."""
    num_classes: int = 10
    """Classes; one more stands for "no class"."""
    widths: tuple[int, ...] = (128, 256)
    """Channels of each level; each but the last halves the map."""
    layers: int = 1
    """Residual blocks a level."""
    steps: int = 1000
    """Noise levels in training."""
    sample_steps: int = 100
    """Steps of sampling, spread evenly over the levels."""
    label_drop: float = 0.1
    """Share of training labels replaced by "no class"."""
    clip: float = 6.0
    """While sampling, predicted clean tokens stay in [-clip, clip]: at the noisiest levels a small error of the noise
    is a huge one of the tokens (whose standard deviation is 1)."""


@dataclass(eq=False)
class MapState(State):
    """The whole map, once it is drawn."""

    x_BLC: torch.Tensor | None = None


class DDPMUNet(Generator):
    """One group: the whole map. Predicts a `Chain` of ancestral steps."""

    kind = "ddpm_unet"
    Config = DDPMUNetConfig
    predicts = JointChain
    config: DDPMUNetConfig

    def __init__(self, config: DDPMUNetConfig) -> None:
        """Args: config: sizes."""
        import diffusers

        super().__init__(config)
        c = config
        self.num_classes, self.n_groups = c.num_classes, 1
        n = len(c.widths)
        unet: Any = diffusers.UNet2DModel  # its lazy import hides from the type checker that it is a Module
        self.unet = unet(
            sample_size=c.grid,
            in_channels=c.channels,
            out_channels=c.channels,
            layers_per_block=c.layers,
            block_out_channels=c.widths,
            down_block_types=("AttnDownBlock2D",) * n,
            up_block_types=("AttnUpBlock2D",) * n,
            num_class_embeds=c.num_classes + 1,
            attention_head_dim=32,
        )
        t = torch.arange(c.steps + 1, dtype=torch.float64) / c.steps
        f = torch.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2
        beta = (1 - f[1:] / f[:-1]).clamp(max=0.999)
        self.alpha_bar = (1 - beta).cumprod(0)  # no buffer: float64 whatever the weights are

    @property
    def spec(self) -> TokenSpec:
        """A raster of continuous tokens."""
        return TokenSpec(kind="continuous", grid=self.config.grid, dim=self.config.channels)

    @property
    def default_guidance(self) -> Guidance:
        """Constant, mild."""
        return Guidance(scale=1.5, schedule="constant")

    def where(self, group: int) -> torch.Tensor:
        """All positions."""
        return torch.arange(self.spec.length, device=self.device)

    def epsilon(self, x_BLC: torch.Tensor, t_B: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The predicted noise of tokens (B, L, C)."""
        x = rearrange(x_BLC, "b (h w) c -> b c h w", h=self.config.grid[0]).to(self.unet.conv_in.weight.dtype)
        return rearrange(self.unet(x, t_B, class_labels=labels).sample, "b c h w -> b (h w) c")

    def loss(self, tokens: torch.Tensor, labels: Condition, noise: Noise) -> dict[str, torch.Tensor]:
        """Mean squared error of the noise at a uniform level."""
        labels = self.drop_labels(labels, self.config.label_drop, noise)
        t = (noise.at(purpose="time").uniform(1)[:, 0] * self.config.steps).long()
        eps = noise.at(purpose="noise").normal(*tokens.shape[1:]).float()
        a = self.alpha_bar.to(t.device)[t, None, None].float()
        x_t = a.sqrt() * tokens + (1 - a).sqrt() * eps
        return {"loss": F.mse_loss(self.epsilon(x_t, t, labels).float(), eps)}

    def start(self, labels: Condition, guidance: Guidance | None = None) -> MapState:
        """An empty state."""
        labels = self.check_labels(labels)
        return MapState(labels_B=labels, guidance=guidance or self.default_guidance, n=[0] * len(labels))

    def predict(self, state: MapState, where: torch.Tensor | None = None) -> JointChain:
        """The ancestral chain over `sample_steps` respaced levels; its last step is noiseless."""
        ticket, B, scale = state.ticket, len(state.labels_B), state.guidance.at(1.0)
        levels = torch.linspace(self.config.steps - 1, 0, self.config.sample_steps).round().long().tolist()
        labels, alpha_bar, clip = state.labels_B, self.alpha_bar.to(self.device), self.config.clip
        if scale != 1:
            labels = torch.cat([labels, torch.full_like(labels, self.num_classes)])

        def transition(x: torch.Tensor, step: int | torch.Tensor) -> Gaussian:
            state.check(ticket)
            i = int(step)
            t = torch.full((len(labels),), levels[i], device=x.device)
            eps = self.epsilon(x.float().repeat(len(labels) // B, 1, 1), t, labels).double()
            if scale != 1:
                cond, uncond = eps.chunk(2)
                eps = uncond + scale * (cond - uncond)
            state.calls, state.rows_computed = state.calls + 1, state.rows_computed + len(labels)
            a = alpha_bar[levels[i]]
            before = alpha_bar[levels[i + 1]] if i + 1 < len(levels) else torch.ones_like(a)
            beta = 1 - a / before
            x0 = ((x - (1 - a).sqrt() * eps) / a.sqrt()).clamp(-clip, clip)
            mean = (before.sqrt() * beta * x0 + (a / before).sqrt() * (1 - before) * x) / (1 - a)
            std = (beta * (1 - before) / (1 - a)).sqrt()
            return Gaussian(mean, std.expand_as(x[..., :1]))

        zero = torch.zeros(B, self.spec.length, self.config.channels, dtype=torch.float64, device=self.device)
        return JointChain(Gaussian(zero, torch.ones_like(zero[..., :1])), transition, len(levels))

    def commit(self, state: MapState, event: torch.Tensor, where: torch.Tensor | None = None) -> None:
        """Fix the map."""
        state.x_BLC, state.n, state.ticket = event, [1] * len(state.n), state.ticket + 1

    def crop(self, state: MapState, n: list[int]) -> None:
        """Forget the map (all rows) or keep it."""
        if set(n) == {0}:
            state.x_BLC, state.n, state.ticket = None, list(n), state.ticket + 1
        elif n != state.n:
            raise ValueError(f"can't crop rows at {state.n} groups to {n}")

    def tokens(self, state: MapState) -> Tokens:
        """The finished map."""
        if state.x_BLC is None:
            raise ValueError("nothing is committed yet")
        return Tokens(state.x_BLC.float(), self.spec)

"""The baseline: its ancestral chain against the exact posterior of a Gaussian, in any arithmetic."""

import pytest
import torch

from genlab.generators.base import Guidance
from genlab.generators.ddpm_unet import DDPMUNet, DDPMUNetConfig
from samplers.chain import ChainSampler


def model(**changes):
    torch.manual_seed(0)
    return DDPMUNet(
        DDPMUNetConfig(**{"grid": (4, 4), "channels": 2, "num_classes": 2, "widths": (32, 32), **changes})
    ).eval()


def test_ideal_noise_gives_the_data_back():
    """Data N(mu, s^2): with the ideal epsilon the chain must draw it. 16,384 numbers: bounds of 5 standard errors."""
    net, mu, s = model(sample_steps=250), 0.7, 0.5

    def ideal(x, t, labels):
        a = net.alpha_bar[t][:, None, None]
        return ((1 - a).sqrt() * (x - a.sqrt() * mu) / (a * s**2 + 1 - a)).float()

    net.epsilon = ideal
    out = ChainSampler().sample(net, torch.zeros(512, dtype=torch.long), torch.arange(512), 512)
    x = out.tokens.values.double()
    assert abs(x.mean() - mu) < 5 * s / 128
    assert abs(x.std() - s) < 0.03  # 250 steps leave 3 % at most


def test_a_bad_guess_at_the_noisiest_level_stays_bounded():
    net = model(sample_steps=10)
    net.epsilon = lambda x, t, labels: torch.zeros_like(x, dtype=torch.float32)
    out = ChainSampler().sample(net, torch.zeros(2, dtype=torch.long), torch.arange(2), 2)
    assert out.tokens.values.abs().max() <= net.config.clip


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_draws_in_bfloat16(scale):
    net = model(sample_steps=3).to(torch.bfloat16)
    assert net.alpha_bar.dtype == torch.float64
    sampler = ChainSampler(ChainSampler.Config(guidance=Guidance(scale=scale, schedule="constant")))
    out = sampler.sample(net, torch.tensor([0, 1]), torch.arange(2), 2)
    assert out.tokens.values.isfinite().all()

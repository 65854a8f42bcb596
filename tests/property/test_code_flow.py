"""The map from noise to codes: exact in the limit, monotone on a line, indifferent to where the codes lie."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2

from genlab.code_flow import CodeFlow
from genlab.distributions import Categorical
from genlab.noise import Noise

ALPHA = 1e-4
"""False-alarm rate of each chi-square test here; the noise is fixed, so a test that passes always passes."""
seeds = st.integers(0, 2**31 - 1)


def toy(seed, V, C, spread=1.0):
    g = torch.Generator().manual_seed(seed)
    codes = torch.randn(V, C, generator=g)
    codes = codes - codes.mean(0)
    return codes / codes.square().mean().sqrt(), spread * torch.randn(V, generator=g)


def p_value(flow, logits, n, seed):
    """Chi-square of n mapped draws against the distribution, cells of fewer than five merged."""
    V, channels = len(logits), flow.channels
    noise = Noise(torch.tensor([seed])).at(position=torch.arange(n)).normal(channels)
    ids = flow.ids(Categorical(logits.expand(1, n, 1, V)), noise).flatten()
    count, want = torch.bincount(ids, minlength=V).double(), n * logits.double().softmax(-1)
    few = want < 5
    count = torch.cat([count[~few], count[few].sum()[None]])
    want = torch.cat([want[~few], want[few].sum()[None]])
    keep = want > 0
    statistic = ((count - want).square() / want)[keep].sum()
    return float(chi2.sf(float(statistic), int(keep.sum()) - 1))


def test_noise_goes_to_the_distribution():
    """12,000 draws see a total variation of about 0.03: many steps pass, five of Euler's must not."""
    for seed, (V, C) in enumerate([(5, 1), (6, 8)]):
        codes, logits = toy(seed, V, C)
        assert p_value(CodeFlow(codes, "heun", 40), logits, 12_000, seed) > ALPHA
    assert p_value(CodeFlow(codes, "euler", 5), logits, 12_000, 1) < ALPHA
    assert p_value(Wrong(codes, "heun", 40), logits, 12_000, 1) < ALPHA


class Wrong(CodeFlow):
    """Its distribution is a little flatter than asked for."""

    def ids(self, dist, noise_BGM):
        return super().ids(dist.temperature(1.2), noise_BGM)


@settings(max_examples=10, deadline=None)
@given(seeds, st.integers(2, 9), st.sampled_from([("heun", 25), ("euler", 100)]))
def test_monotone_on_a_line(seed, V, how):
    """Paths of a flow don't cross: in one dimension more noise never leads to a smaller code."""
    codes, logits = toy(seed, V, 1)
    noise = torch.linspace(-4, 4, 301).view(1, -1, 1)
    ids = CodeFlow(codes, *how).ids(Categorical(logits.expand(1, 301, 1, V)), noise).flatten()
    assert bool((codes[ids, 0].diff() >= 0).all())


@settings(max_examples=8, deadline=None)
@given(seeds, st.integers(2, 9), st.integers(1, 4))
def test_many_steps_agree_and_the_codes_place_and_scale_do_not_matter(seed, V, C):
    codes, logits = toy(seed, V, C)
    g = torch.Generator().manual_seed(seed)
    noise, dist = torch.randn(1, 400, C, generator=g), Categorical(logits.expand(1, 400, 1, V))
    best = CodeFlow(codes, "heun", 80).ids(dist, noise)
    for other in (CodeFlow(codes, "euler", 300), CodeFlow(1.5 * codes + 0.5, "heun", 80)):
        assert float((other.ids(dist, noise) == best).float().mean()) > 0.96


@settings(max_examples=8, deadline=None)
@given(seeds, st.integers(2, 9), st.integers(1, 4))
def test_likelier_ids_take_more_noise(seed, V, C):
    """More noise leads to an id whose logit is raised."""
    codes, logits = toy(seed, V, C)
    g = torch.Generator().manual_seed(seed)
    noise = torch.randn(1, 300, C, generator=g)
    flow, j = CodeFlow(codes, "heun", 60), seed % V
    before = flow.ids(Categorical(logits.expand(1, 300, 1, V)), noise) == j
    logits[j] += 1.0
    after = flow.ids(Categorical(logits.expand(1, 300, 1, V)), noise) == j
    assert int(after.sum()) >= int(before.sum())

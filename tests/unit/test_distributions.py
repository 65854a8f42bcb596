"""What generators predict: categoricals, mixtures, chains and flows against closed forms."""

import itertools
import math

import pytest
import torch
from scipy import integrate, stats

from genlab.distributions import (
    Categorical,
    Chain,
    Deterministic,
    Flow,
    Gaussian,
    GaussianMixture,
    TokenDistribution,
    along,
)
from genlab.noise import Noise

FALSE_ALARM = 1e-6
"""How often each statistical test here would fail, were its seeds drawn anew; they are fixed."""


def categorical(*probs):
    """One row, one position, one head a list of probabilities."""
    return Categorical(torch.tensor([[list(p) for p in probs]], dtype=torch.float64).log()[None])


def one(*probs):
    return categorical(probs)


def picked(dist, *u):
    many = Categorical(dist.logits_BGKV.expand(len(u), -1, -1, -1))
    return many.pick(torch.tensor(u, dtype=torch.float64).view(-1, 1, 1)).flatten().tolist()


# -- Categorical --------------------------------------------------------------------------------------------


def test_temperature():
    dist = one(0.5, 0.25, 0.125, 0.125)
    want = torch.tensor([0.5, 0.25, 0.125, 0.125], dtype=torch.float64).sqrt()
    assert torch.allclose(dist.temperature(2.0).probs.flatten(), want / want.sum())
    assert torch.allclose(dist.temperature(1e-3).probs.flatten(), torch.tensor([1.0, 0, 0, 0]).double())
    assert dist.temperature(1) is dist
    with pytest.raises(ValueError, match=r"must not be negative, got -0\.1"):
        dist.temperature(-0.1)


def test_temperature_zero_takes_the_first_of_equals():
    dist = one(0.1, 0.4, 0.1, 0.4).temperature(0)
    assert dist.probs.flatten().tolist() == [0, 1, 0, 0]
    assert picked(dist, 1e-12, 0.3, 1 - 2**-33) == [1, 1, 1]


@pytest.mark.parametrize(
    ("k", "kept"),
    [(0, [0, 1, 2, 3, 4]), (1, [1]), (2, [1, 2, 3]), (3, [1, 2, 3]), (4, [1, 2, 3, 4]), (9, [0, 1, 2, 3, 4])],
)
def test_top_k_keeps_ties_of_the_last(k, kept):
    dist = one(0.05, 0.4, 0.2, 0.2, 0.15).top_k(k)
    assert dist.probs.flatten().nonzero().flatten().tolist() == kept
    assert float(dist.probs.sum()) == pytest.approx(1)
    ratio = dist.probs.flatten()[kept] / one(0.05, 0.4, 0.2, 0.2, 0.15).probs.flatten()[kept]
    assert torch.allclose(ratio, ratio[:1].expand_as(ratio))  # what is kept keeps its proportions


@pytest.mark.parametrize(
    ("p", "kept"),
    [
        (1.0, [0, 1, 2, 3]),
        (0.5, [2]),
        (0.501, [1, 2]),
        (0.75, [1, 2]),
        (0.76, [0, 1, 2]),
        (1e-9, [2]),
        (0.875, [0, 1, 2]),
    ],
)
def test_top_p_is_the_smallest_set_that_reaches_p(p, kept):
    dist = one(0.125, 0.25, 0.5, 0.125).top_p(p)
    assert dist.probs.flatten().nonzero().flatten().tolist() == kept


@pytest.mark.parametrize("scale", [0.0, 0.3, 4.0])
@pytest.mark.parametrize("p", [0.05, 0.6, 0.999])
def test_top_p_of_many_ids_is_what_sorting_them_gives(scale, p):
    """Many ids, many of them equal, of little and of great mass together; of equals, the first are kept."""
    logits = scale * torch.randn(2, 3, 2, 300, generator=torch.Generator().manual_seed(0)).round(decimals=1)
    probs, order = logits.double().softmax(-1).sort(dim=-1, descending=True, stable=True)
    kept = torch.zeros(logits.shape, dtype=torch.bool).scatter(-1, order, probs.cumsum(-1) - probs < p)
    assert torch.equal(Categorical(logits).top_p(p).logits_BGKV > -torch.inf, kept)


def test_top_p_refuses():
    for p in (0, -0.5, 1.5, float("nan")):
        with pytest.raises(ValueError, match=r"top_p must be in \(0, 1\]"):
            one(0.5, 0.5).top_p(p)


def test_each_head_and_row_is_cut_by_itself():
    logits = torch.randn(3, 2, 4, 7, generator=torch.Generator().manual_seed(0))
    cut = Categorical(logits).top_k(3).top_p(0.8)
    for b, g, k in itertools.product(range(3), range(2), range(4)):
        alone = Categorical(logits[b : b + 1, g : g + 1, k : k + 1]).top_k(3).top_p(0.8)
        assert torch.equal(cut.probs[b, g, k], alone.probs[0, 0, 0])


@pytest.mark.parametrize("cut", [lambda d: d, lambda d: d.temperature(0.7).top_k(4), lambda d: d.top_p(0.8)])
def test_samples_have_the_probabilities(cut):
    """Chi-square over the joint of two heads, and nothing of probability zero."""
    dist = cut(categorical([0.3, 0.3, 0.2, 0.15, 0.05], [0.01, 0.09, 0.2, 0.3, 0.4]))
    n = 20_000
    many = Categorical(dist.logits_BGKV.expand(n, -1, -1, -1))
    ids = many.sample(Noise.from_seeds(range(n)).at(torch.tensor([0])))
    assert ids.shape == (n, 1, 2)
    p, q = dist.probs[0, 0]
    joint = (p[:, None] * q).flatten()
    counts = torch.bincount(ids[:, 0, 0] * 5 + ids[:, 0, 1], minlength=25)
    assert not counts[joint == 0].any()
    held = joint > 0
    assert stats.chisquare(counts[held].numpy(), (joint[held] * n).numpy()).pvalue > FALSE_ALARM


def test_pick_inverts_the_cumulative_distribution():
    dist = one(0.0, 0.25, 0.0, 0.5, 0.25, 0.0)
    assert picked(dist, 0.0, 1e-12, 0.2499, 0.2501, 0.7499, 0.7501, 1 - 2**-33) == [1, 1, 1, 3, 3, 4, 4]
    many = Categorical(dist.logits_BGKV.expand(3, 2, -1, -1))
    for wrong in (Noise.from_seeds([1, 2, 3]), Noise.from_seeds([1, 2]).at(torch.tensor([0, 1]))):
        with pytest.raises(ValueError, match=r"over \(3, 2, 1\) heads can't be drawn with numbers of shape"):
            many.sample(wrong)  # no positions; another number of rows


def test_log_prob_sums_to_one_by_enumeration():
    logits = torch.randn(2, 3, 3, 4, generator=torch.Generator().manual_seed(1))
    dist = Categorical(logits).top_k(3)
    total = torch.zeros(2, 3, dtype=torch.float64)
    for ids in itertools.product(range(4), repeat=3):
        total += dist.log_prob(torch.tensor(ids).expand(2, 3, 3)).exp()
    assert torch.allclose(total, torch.ones_like(total))
    assert torch.equal(dist.mode(), logits.argmax(-1))
    assert dist.probs.dtype == dist.log_probs.dtype == torch.float64


def test_entropy_is_scipys_also_where_ids_are_cut():
    logits = torch.randn(2, 3, 2, 5, generator=torch.Generator().manual_seed(0))
    for dist in (Categorical(logits), Categorical(logits).top_k(2)):
        want = torch.from_numpy(stats.entropy(dist.probs.numpy(), axis=-1)).sum(-1)
        torch.testing.assert_close(dist.entropy, want)


def test_a_stale_categorical_is_refused_when_drawn():
    def stale():
        raise ValueError("older state")

    logits = torch.zeros(1, 1, 1, 3)
    for dist in (Categorical(logits, stale), Categorical(logits, stale).temperature(0.5).top_k(2).top_p(0.9)):
        with pytest.raises(ValueError, match="older state"):
            dist.sample(Noise.from_seeds([0]).at(torch.tensor([0])))
    with pytest.raises(ValueError, match=r"needs logits \(B, G, K, V\), got \(1, 1, 3\)"):
        Categorical(torch.zeros(1, 1, 3))


# -- Gaussian mixture ---------------------------------------------------------------------------------------


def mixture(C=1, seed=0, rows=1):
    stream = torch.Generator().manual_seed(seed)
    logits = torch.randn(1, 1, 3, generator=stream, dtype=torch.float64)
    mean = 2 * torch.randn(1, 1, 3, C, generator=stream, dtype=torch.float64)
    std = 0.3 + torch.rand(1, 1, 3, C, generator=stream, dtype=torch.float64)
    return GaussianMixture(*(x.expand(rows, *x.shape[1:]) for x in (logits, mean, std)))


def test_mixture_density_is_scipys_and_integrates_to_one():
    flat = mixture()
    total, _ = integrate.quad(
        lambda x: float(flat.log_prob(torch.full((1, 1, 1), x).double()).exp()), -30, 30, limit=200
    )
    assert total == pytest.approx(1, abs=1e-6)
    m = mixture(C=4)
    x = torch.randn(1, 1, 4, dtype=torch.float64)
    weights = m.logits_BGM[0, 0].softmax(-1)
    want = sum(
        float(w) * stats.multivariate_normal(mu.numpy(), torch.diag(s**2).numpy()).pdf(x[0, 0].numpy())
        for w, mu, s in zip(weights, m.mean_BGMC[0, 0], m.std_BGMC[0, 0], strict=True)
    )
    assert m.log_prob(x).shape == (1, 1)
    assert float(m.log_prob(x)) == pytest.approx(math.log(want))


@pytest.mark.parametrize("factor", [1.0, 0.1])
def test_mixture_samples(factor):
    n = 20_000
    many = mixture(rows=n).scale_variance(factor)
    x = many.sample(Noise.from_seeds(range(n)).at(torch.tensor([0])))
    assert x.shape == (n, 1, 1)
    w, mu, s = mixture().logits_BGM.softmax(-1).flatten(), mixture().mean_BGMC.flatten(), mixture().std_BGMC.flatten()
    law = stats.norm(mu.numpy(), s.numpy() * factor**0.5)
    cdf = lambda y: (law.cdf(y[:, None]) * w.numpy()).sum(1)  # noqa: E731
    assert stats.kstest(x.flatten().numpy(), cdf).pvalue > FALSE_ALARM


def test_mixture_refuses_a_variance_factor_of_zero():
    for factor in (0, -1.0):
        with pytest.raises(ValueError, match="variance factor must be positive"):
            mixture().scale_variance(factor)


def test_gaussian_log_prob_and_mix():
    mean, std, x = torch.randn(3, 5).double(), torch.rand(3, 5).double() + 0.1, torch.randn(3, 5).double()
    want = torch.distributions.Normal(mean, std).log_prob(x).sum(-1)
    assert torch.allclose(Gaussian(mean, std).log_prob(x), want)
    z = torch.randn(3, 5).double()
    assert torch.equal(Gaussian(mean, std).at(z), mean + std * z)
    assert torch.equal(Gaussian(mean, std, lambda z: z.flip(-1)).at(z), mean + z.flip(-1))


# -- Chain --------------------------------------------------------------------------------------------------


def autoregression(rows, steps=4, a=0.8, b=0.5, s=0.6):
    """x_{i+1} = a x_i + b + s z, from N(2, 3^2): every law in closed form."""
    start = Gaussian(torch.full((rows, 2, 1), 2.0).double(), torch.full((rows, 2, 1), 3.0).double())
    return Chain(start, lambda x, i: Gaussian(a * x + b, torch.full_like(x[..., :1], s)), steps)


def law(steps, a=0.8, b=0.5, s=0.6):
    mean, variance = 2.0, 9.0
    for _ in range(steps):
        mean, variance = a * mean + b, a * a * variance + s * s
    return mean, variance


def test_a_chains_path_is_its_noise_put_through_the_transitions():
    chain, noise = autoregression(3), Noise.from_seeds([4, 5, 6]).at(position=torch.tensor([7, 9]))
    path = chain.path(noise)
    assert path.shape == (5, 3, 2, 1)
    x = 2 + 3 * noise.at(purpose="start").normal(1)
    assert torch.equal(path[0], x)
    for i in range(4):
        x = 0.8 * x + 0.5 + 0.6 * noise.at(step=i, purpose="step").normal(1)
        assert torch.equal(path[i + 1], x)
    assert torch.equal(chain.sample(noise), path[-1])


def test_a_chains_end_has_its_closed_form():
    n = 10_000
    noise = Noise.from_seeds(range(n)).at(position=torch.tensor([0, 1]))
    path = autoregression(n).path(noise)
    for i in range(5):
        mean, variance = law(i)
        assert stats.kstest(path[i].flatten().numpy(), "norm", (mean, variance**0.5)).pvalue > FALSE_ALARM
    x, y = path[1].flatten(), path[4].flatten()
    r = 0.8**3 * (law(1)[1] / law(4)[1]) ** 0.5  # correlation along the path
    z = (math.atanh(float(torch.corrcoef(torch.stack([x, y]))[0, 1])) - math.atanh(r)) * (len(x) - 3) ** 0.5
    assert abs(z) < stats.norm.isf(FALSE_ALARM / 2)  # Fisher's transform


def test_chain_transforms():
    chain, noise = autoregression(2), Noise.from_seeds([0, 1]).at(position=torch.tensor([0, 1]))
    cold = chain.temperature(0).path(noise)
    x = chain.path(noise)[0]
    for i in range(5):
        assert torch.allclose(cold[i], x)  # noise in the start alone
        x = 0.8 * x + 0.5
    assert chain.temperature(1) is chain
    half = chain.temperature(0.5).transition(x, 2)
    assert torch.allclose(half.std, torch.tensor(0.3).double())
    last = chain.last_std(0.05)
    assert float(last.transition(x, 2).std.max()) == 0.6
    assert float(last.transition(x, 3).std.max()) == 0.05
    lead = torch.stack([x, x])  # steps of a lead axis, and of lead and rows
    assert last.transition(lead, torch.tensor([1, 3])).std.flatten(1)[:, 0].tolist() == [0.6, 0.05]
    rows = last.transition(lead, torch.tensor([[1, 3], [3, 0]])).std[..., 0, 0]
    assert rows.tolist() == [[0.6, 0.05], [0.05, 0.6]]
    for change in (chain.temperature, chain.last_std):
        with pytest.raises(ValueError, match="must not be negative"):
            change(-1)
    each = last.transition(x, torch.tensor([[1, 3], [3, 0]])).std[..., 0]
    assert each.tolist() == [[0.6, 0.05], [0.05, 0.6]]
    with pytest.raises(ValueError, match=r"steps \(1, 2, 1\) don't go with x \(2, 2, 1\)"):
        along(torch.tensor([[[1], [2]]]), torch.zeros(2, 2, 1))


def test_a_step_without_noise_draws_none():
    class Counting(Noise):
        drawn = []

        def normal(self, *shape):
            Counting.drawn.append((self.purpose, self.step))
            return super().normal(*shape)

    chain = autoregression(1).temperature(0.0)
    chain.sample(Counting(torch.tensor([0]), position=torch.tensor([0, 1])))
    assert [purpose for purpose, _ in Counting.drawn] == ["start"]


@pytest.mark.parametrize("channels", [1, 40_000])
def test_a_path_has_the_noise_of_its_steps(channels):
    """Drawn many steps at a time, or each by itself where they are long: the same numbers."""
    noise, C = Noise(torch.tensor([3, 4]), position=torch.tensor([[5], [6]])), channels
    start = Gaussian(torch.zeros(2, 1, C).double(), torch.ones(2, 1, 1).double())
    chain = Chain(start, lambda x, step: Gaussian(0 * x, torch.ones_like(x)), 7)
    for i, x in enumerate(chain.path(noise)[1:]):
        assert torch.equal(x, noise.at(step=i, purpose="step").normal(C))


# -- Flow ---------------------------------------------------------------------------------------------------

MEAN, STD = 1.5, 0.4


def at_time(t):
    """Mean and variance of x_t for data N(MEAN, STD^2)."""
    return (1 - t) * MEAN, (1 - t) ** 2 * STD**2 + t**2


def velocity(x, t):
    """E[eps - data | x_t = x], exactly."""
    mean, variance = at_time(t)
    return -MEAN + (t - (1 - t) * STD**2) / variance * (x - mean)


def flow(rows=4, **more):
    return Flow(velocity, (rows, 1, 1), torch.device("cpu"), **more)


def uniform_times(n):
    return [1 - i / n for i in range(n)] + [0.0]


NOISE = Noise.from_seeds(range(4)).at(position=torch.tensor([3]))


@pytest.mark.parametrize(("heun", "order"), [(False, 1), (True, 2)])
def test_integrators_converge_at_their_order(heun, order):
    """The exact flow of a Gaussian carries z to MEAN + STD z."""
    exact = MEAN + STD * NOISE.at(purpose="start").normal(1)
    errors = [
        float((flow().integrate(NOISE, uniform_times(n), heun=heun) - exact).abs().max()) for n in (32, 64, 128, 256)
    ]
    rates = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
    assert errors[-1] < 0.02
    assert rates[-1] == pytest.approx(order, abs=0.15), (errors, rates)


def moments(chain):
    """Mean and variance of a linear Gaussian chain's end, by its transitions at two points."""
    mean, variance = 0.0, 1.0
    zero = torch.zeros(1, 1, 1, dtype=torch.float64)
    for i in range(chain.steps):
        p, q = chain.transition(zero, i), chain.transition(zero + 1, i)
        slope = float(q.mean - p.mean)
        mean, variance = slope * mean + float(p.mean), slope**2 * variance + float(p.std) ** 2
    return mean, variance


@pytest.mark.parametrize("diffusion", [lambda t: 2 * t, lambda t: 0.5 * t, lambda t: 0.0, lambda t: t * t])
def test_euler_maruyama_converges_to_the_datas_moments(diffusion):
    """Weakly of order 1, whatever the diffusion: a closed form, no sampling."""
    errors = []
    for n in (128, 256, 512):
        mean, variance = moments(flow(1).chain(uniform_times(n), diffusion))
        errors.append((abs(mean - MEAN), abs(variance - STD**2)))
    for coarse, fine in itertools.pairwise(errors):
        for a, b in zip(coarse, fine, strict=True):
            assert b < 0.01
            assert b < 1e-9 or math.log2(a / b) == pytest.approx(1, abs=0.25), errors


def test_sampled_chain_has_the_moments_of_its_transitions():
    n = 10_000
    noise = Noise.from_seeds(range(n)).at(position=torch.tensor([0]))
    times = uniform_times(20)
    chain = flow(n).chain(times)
    mean, variance = moments(flow(1).chain(times))
    x = chain.sample(noise).flatten()
    assert stats.kstest(x.numpy(), "norm", (mean, variance**0.5)).pvalue > FALSE_ALARM
    assert float(chain.transition(torch.zeros(1, 1, 1).double(), 19).std) == 0  # the step to t = 0 has no noise


@pytest.mark.parametrize("stochastic", [False, True])
def test_a_stage_covers_its_own_interval(stochastic):
    """From the law at t = 0.8 to the law at t = 0.3."""
    mean, variance = at_time(0.8)
    source = Gaussian(torch.full((4, 1, 1), mean).double(), torch.full((4, 1, 1), variance**0.5).double())
    stage = flow(begin=0.8, end=0.3, source=source)
    mean, variance = at_time(0.3)
    z = NOISE.at(purpose="start").normal(1)
    if not stochastic:
        got = stage.integrate(NOISE, uniform_times(128), heun=True)
        assert torch.allclose(got, mean + variance**0.5 * z, atol=1e-4)
        return
    chain = stage.chain(uniform_times(400))
    start_mean, start_variance = at_time(0.8)
    last = chain.transition(torch.zeros(1, 1, 1).double(), 399)
    assert float(last.std) > 0  # t = 0.3 is not the data: the last step has noise too
    mean_got, variance_got = start_mean, start_variance
    for i in range(400):
        p, q = (chain.transition(torch.full((1, 1, 1), x).double(), i) for x in (0.0, 1.0))
        slope = float(q.mean - p.mean)
        mean_got, variance_got = slope * mean_got + float(p.mean), slope**2 * variance_got + float(p.std) ** 2
    assert mean_got == pytest.approx(mean, abs=5e-3)
    assert variance_got == pytest.approx(variance, abs=5e-3)


def test_sample_is_25_heun_steps():
    assert torch.equal(flow().sample(NOISE), flow().integrate(NOISE, uniform_times(25), heun=True))


def test_deterministic_maps_noise_of_its_positions():
    student = Deterministic(lambda z: 2 * z + 1, 3)
    where = torch.tensor([5, 2])
    noise = Noise.from_seeds([8, 9])
    got = student.sample(noise.at(position=where))
    assert torch.equal(got, 2 * noise.at(where, purpose="start").normal(3) + 1)
    assert torch.equal(got[:, 1:], student.sample(noise.at(position=where[1:])))


def test_all_speak_the_protocol():
    kinds = [one(1.0), mixture(), autoregression(1), flow(), Deterministic(lambda z: z, 1)]
    assert all(isinstance(x, TokenDistribution) for x in kinds)
    assert [x.has_density for x in kinds] == [True, True, False, False, False]

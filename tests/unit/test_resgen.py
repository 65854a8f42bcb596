"""ResGen: what is masked and predicted, the mixture and its bound, drawing; a one-dimensional signal end to end."""

import dataclasses
import math

import pytest
import torch
from torch import nn

from genlab.distributions import GaussianMixture
from genlab.generators.base import Guidance
from genlab.generators.resgen import MixtureHead, ResGen, ResGenConfig
from genlab.noise import Noise
from genlab.tokens import TokenSpec
from samplers.masked import MaskedConfig, MaskedSampler

D, V, C = 4, 16, 3


class Stacks:
    """A tokenizer of sequences (B, L, C): residual codes, each depth half as large as the one before."""

    kind = "stacks"

    def __init__(self, L=6, grid=None, seed=0):
        g = torch.Generator().manual_seed(seed)
        self.codebooks = torch.randn(D, V, C, generator=g) * 0.5 ** torch.arange(D)[:, None, None]
        self.spec = TokenSpec(kind="residual", grid=grid or (L,), vocab=V, depth=D)

    def encode(self, x):
        rest, ids = x, []
        for codes in self.codebooks:
            ids.append(torch.cdist(rest, codes[None].expand(len(x), -1, -1)).argmin(-1))
            rest = rest - codes[ids[-1]]
        return torch.stack(ids, -1)

    def decode(self, ids):
        return sum(codes[ids[..., d]] for d, codes in enumerate(self.codebooks))


def build(L=6, grid=None, **changes):
    torch.manual_seed(0)
    sizes = {"vocab": V, "codes_depth": D, "code_dim": C, "num_classes": 2, "dim": 32, "depth": 2, "heads": 2}
    sizes |= {"mixtures": 8, "rank": 2, "guidance": 1.0}
    model = ResGen(ResGenConfig(grid=grid or (L,), **{**sizes, **changes})).eval()
    model.adopt(Stacks(L, grid))
    return model


def ids(B, L=6, seed=0):
    return torch.randint(V, (B, L, D), generator=torch.Generator().manual_seed(seed))


# -- what is masked and predicted ---------------------------------------------------------------------------------


@pytest.mark.parametrize("power", [1.0, 0.25])
def test_the_number_masked_is_that_of_the_schedule_and_no_position_is_preferred(power):
    model, rows = build(mask_power=power), 4000
    noise = Noise(torch.arange(rows))
    masked = D - model.mask(rows, noise)
    assert masked.min() >= 0 and masked.max() <= D  # noqa: PT018
    r = noise.at(purpose="mask ratio").uniform(1)[:, 0]
    assert torch.equal(masked.sum(1), (torch.cos(math.pi / 2 * r) ** power * 6 * D).ceil().long().clamp(1, 6 * D))
    mean, var = masked.double().mean(0), masked.double().var(0) / rows
    assert bool(((mean - mean.mean()).abs() < 5 * var.sqrt()).all())


def test_counts_are_multivariate_hypergeometric():
    """Chi-square of one position's count given n = 12 of 24 codes masked: false alarms 1 in 1,000."""
    from scipy.stats import chisquare, hypergeom

    model, rows = build(), 60000
    masked = D - model.mask(rows, Noise(torch.arange(rows)))
    given = masked[masked.sum(1) == 12][:, 0]
    expected = hypergeom(6 * D, D, 12).pmf(range(D + 1)) * len(given)
    assert len(given) > 1000
    assert chisquare(torch.bincount(given, minlength=D + 1).numpy(), expected).pvalue > 1e-3


def test_sums_split_the_stack_deepest_first():
    model, tokens = build(), ids(2)
    filled = torch.tensor([[0, 1, 2, 3, 4, 2], [4, 4, 0, 0, 1, 3]])
    seen, masked = model.sums(tokens, filled)
    codes = Stacks().codebooks
    for b in range(2):
        for i, n in enumerate(filled[b].tolist()):
            parts = [codes[d, tokens[b, i, d]] for d in range(D)]
            torch.testing.assert_close(seen[b, i], sum(parts[:n], torch.zeros(C)))
            torch.testing.assert_close(masked[b, i], sum(parts[n:], torch.zeros(C)))


def test_sums_go_back_to_ids():
    """Ids that residual quantisation itself has made come back from the sum of those that are masked."""
    model, stacks = build(), Stacks()
    tokens = stacks.encode(torch.randn(5, 6, C, generator=torch.Generator().manual_seed(1)))
    for n in range(D + 1):
        filled = torch.full((5, 6), n)
        found = model.quantise(model.sums(tokens, filled)[1], filled)
        rest = model.sums(tokens, filled)[1] - model.sums(found, filled)[1]
        if n < D:
            greedy = stacks.codebooks[n:]
            want = model.sums(tokens, filled)[1]
            for codes, d in zip(greedy, range(n, D), strict=True):
                assert torch.equal(torch.cdist(want, codes[None].expand(5, -1, -1)).argmin(-1), found[..., d])
                want = want - codes[found[..., d]]
        assert float(rest.square().mean()) <= float(stacks.codebooks[-1].square().mean()) or n == 0
    full = torch.zeros(5, 6, dtype=torch.long)
    assert torch.equal(model.quantise(stacks.decode(tokens), full), stacks.encode(stacks.decode(tokens)))


# -- the mixture ------------------------------------------------------------------------------------------------------


def head(channels=2, mixtures=5, rank=3):
    torch.manual_seed(1)
    h = MixtureHead(8, channels, mixtures, rank)
    nn.init.normal_(h.linear.weight, std=0.4)
    nn.init.normal_(h.spread.weight, std=0.2)
    nn.init.normal_(h.log_std, mean=-0.5, std=0.3)
    return h.requires_grad_(False)


def mixture_of(h, x, size=1.0):
    return h.mixture(*h(x, torch.zeros(x.shape[:-1], dtype=torch.long)), torch.full((*x.shape[:-1], 1), size))


CODES = {"mixtures": 0, "rank": 0}
"""Sizes of a model with a component for each code."""


def some_bound(model, n=40):
    """Targets, the network's output, depths and next codes; the two parts of the bound of them."""
    g = torch.Generator().manual_seed(5)
    h, y = torch.randn(n, 32, generator=g), torch.randn(n, C, generator=g)
    filled, code = torch.randint(D, (n,), generator=g), torch.randint(V, (n,), generator=g)
    return y, h, filled, model.bound(y, h, filled, code)


def test_the_mixture_integrates_to_one_and_is_its_marginal():
    h, x = head(), torch.randn(1, 1, 8, generator=torch.Generator().manual_seed(2))
    p, axis = mixture_of(h, x), torch.linspace(-14, 14, 561)
    points = torch.cartesian_prod(axis, axis)[None]
    wide = dataclasses.replace(p, size_BG1=torch.ones(1, points.shape[1], 1))
    cell = float((axis[1] - axis[0]) ** 2)
    assert float(wide.log_prob(points).exp().sum()) * cell == pytest.approx(1, abs=1e-3)
    # against the components written out
    mean = p.shift_BGC[:, :, None] + p.mean_TMC + torch.einsum("mcr,bgr->bgmc", p.low_rank_MCR, p.a_BGR)
    std = p.log_std_BGM.exp()[..., None].expand_as(mean)
    few = points[:, :: points.shape[1] // 50]
    wide = dataclasses.replace(p, size_BG1=torch.ones(1, few.shape[1], 1))
    written = GaussianMixture(p.logits_BGM, mean, std).log_prob(few)
    torch.testing.assert_close(wide.log_prob(few), written, rtol=1e-4, atol=1e-4)


def test_the_mixture_of_z_is_that_of_y_scaled():
    h, x = head(), torch.randn(1, 1, 8, generator=torch.Generator().manual_seed(3))
    small, large = mixture_of(h, x, 0.25), mixture_of(h, x)
    y = torch.randn(1, 1, 2, generator=torch.Generator().manual_seed(4))
    torch.testing.assert_close(small.log_prob(0.25 * y) + 2 * math.log(0.25), large.log_prob(y), rtol=1e-5, atol=1e-5)
    noise = Noise(torch.tensor([3]), position=torch.zeros(1, dtype=torch.long))
    torch.testing.assert_close(small.sample(noise), 0.25 * large.sample(noise))


def test_draws_of_the_mixture_have_its_moments_and_its_entropy():
    """4 sigma each: false alarms below 1 in 3,000."""
    rows = 20000
    h, x = head(), torch.randn(1, 1, 8, generator=torch.Generator().manual_seed(2)).expand(rows, 1, 8)
    p = mixture_of(h, x, 0.5)
    z = p.sample(Noise(torch.arange(rows), position=torch.zeros(1, dtype=torch.long)))[:, 0]
    mean = p.shift_BGC[:, :, None] + p.mean_TMC + torch.einsum("mcr,bgr->bgmc", p.low_rank_MCR, p.a_BGR)
    weights = p.logits_BGM.softmax(-1)[..., None]
    want = 0.5 * (weights * mean).sum(2)[0, 0]
    assert bool(((z.mean(0) - want).abs() < 4 * z.std(0) / rows**0.5).all())
    surprise = -p.log_prob(z[:, None])[:, 0]
    assert float(surprise.mean()) < float(p.entropy_bound[0, 0]) + 4 * float(surprise.std()) / rows**0.5
    apart = dataclasses.replace(p, log_std_BGM=torch.full_like(p.log_std_BGM, -7))
    z = apart.sample(Noise(torch.arange(rows), position=torch.zeros(1, dtype=torch.long)))
    surprise = -apart.log_prob(z)[:, 0]
    assert abs(float(surprise.mean() - apart.entropy_bound[0, 0])) < 4 * float(surprise.std()) / rows**0.5 + 1e-2


def test_a_narrowed_normal_keeps_its_component():
    h, x = head(), torch.randn(1, 1, 8, generator=torch.Generator().manual_seed(2)).expand(50, 1, 8)
    p, noise = mixture_of(h, x, 0.5), Noise(torch.arange(50), position=torch.zeros(1, dtype=torch.long))
    whole, half, none = (p.scale_deviation(factor).sample(noise) for factor in (1, 0.5, 0))
    torch.testing.assert_close(whole - none, 2 * (half - none), rtol=1e-4, atol=1e-5)
    means = 0.5 * (p.shift_BGC[:, :, None] + p.mean_TMC + torch.einsum("mcr,bgr->bgmc", p.low_rank_MCR, p.a_BGR))
    assert float((means - none[:, :, None]).abs().amax(-1).amin(-1).max()) < 1e-5
    assert float((whole - none).abs().min()) > 0
    with pytest.raises(ValueError, match="must not be negative, got -1"):
        p.scale_deviation(-1)
    model, labels = build(), torch.zeros(2, dtype=torch.long)
    drawn = [
        MaskedSampler(MaskedConfig(steps=4, spread=spread)).sample(model, labels, torch.arange(2)).tokens.values
        for spread in (1.0, 0.0)
    ]
    assert not torch.equal(*drawn)


@pytest.mark.parametrize("sizes", [{}, CODES])
def test_the_bound_holds_and_is_tight_where_one_component_explains_all(sizes):
    model = build(**sizes)
    with torch.no_grad():
        for p in model.head.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
        y, h, filled, (regression, classification) = some_bound(model)
        p = model.mixture(*model.head(h, filled), torch.ones(len(y), 1), filled)
        assert bool((regression + classification >= -p.log_prob(y) - 1e-4).all())
        assert float((regression + classification + p.log_prob(y)).mean()) > 1e-3
        # where components don't overlap, and the target is one's mean
        if sizes:
            model.head.rest.weight[-1], model.head.rest.bias[-1] = 0, -6
        else:
            model.head.log_std.fill_(-6)
        p = model.mixture(*model.head(h, filled), torch.ones(len(y), 1), filled)
        code = torch.arange(len(y)) % p.logits_BGM.shape[-1]
        y = p.mean(code)
        gap = sum(model.bound(y, h, filled, code)) + p.log_prob(y)
    assert float(gap.median()) < 1e-2


def test_a_component_for_each_code_is_the_mixture_written_out():
    """Log-density over all depths against `GaussianMixture`'s, in units and out of them."""
    model = build(**CODES)
    with torch.no_grad():
        model.head.query.weight.normal_(std=0.5)
        model.head.rest.weight.normal_(std=0.2)
        h, filled = torch.randn(2, D, 32), torch.stack([torch.arange(D), torch.arange(D).flip(0)])
        size = model.size_of[D - filled][..., None]
        p = model.mixture(*model.head(h, filled), size, filled)
        z = size * torch.randn(2, D, C)
        mean = model.codebooks[filled] + size[..., None] * p.shift_BGC[:, :, None]
        std = (size * p.log_std_BGM.exp())[..., None].expand_as(mean)
        want = GaussianMixture(p.logits_BGM, mean, std).log_prob(z)
        torch.testing.assert_close(p.log_prob(z), want, rtol=1e-4, atol=1e-4)
        for d in range(D):  # each depth has its own keys
            query, key = model.head.query(h[0, d]), model.head.key[d]
            torch.testing.assert_close(p.logits_BGM[0, d], key @ query + model.head.bias[d], rtol=1e-4, atol=1e-4)


def test_a_draw_stays_in_the_cell_of_its_code():
    """Residual quantisation finds the code that was drawn; a draw that was in its cell is left where it is."""
    model, rows = build(**CODES), 3000
    with torch.no_grad():
        model.head.rest.weight.normal_(std=0.3)
        h, filled = torch.randn(1, D, 32).expand(rows, -1, -1), torch.arange(D).expand(rows, -1)
        linear, spread = model.head(h, filled)
        p = model.mixture(linear, spread, model.size_of[D - filled][..., None], filled)
    noise = Noise(torch.arange(rows), position=torch.arange(D))
    free = dataclasses.replace(p, in_cell=False)
    z, away = p.sample(noise), free.sample(noise)
    code = free.scale_deviation(0).sample(noise) - p.size_BG1 * p.shift_BGC  # a component's mean, without the shift
    drawn = (code[:, :, None] - model.codebooks[filled]).square().sum(-1).argmin(-1)

    def found(x):
        return torch.stack([model.quantise(x, filled)[:, d, d] for d in range(D)], 1)

    assert torch.equal(found(z), drawn)
    left = found(away) == drawn
    assert 0.1 < float(left.float().mean()) < 0.9
    torch.testing.assert_close(z[left], away[left])
    assert float((z - away)[~left].abs().amax(-1).min()) > 0


def test_the_mixture_starts_on_codes_and_keeps_what_it_has_learned():
    model, stacks = build(), Stacks()
    want = stacks.codebooks[0, torch.arange(model.head.K) * V // model.head.K] / model.size_of[-1]
    assert torch.equal(model.head.mean, want)
    with torch.no_grad():
        model.head.mean.add_(1)
    model.adopt(stacks)
    assert torch.equal(model.head.mean, want + 1)


def test_classification_trains_weights_and_regression_components():
    model = build()
    some_bound(model)[-1][1].sum().backward()
    assert model.head.mean.grad is None or not bool(model.head.mean.grad.any())
    assert bool(model.head.linear.weight.grad[: model.head.K].any())
    model.zero_grad()
    some_bound(model)[-1][0].sum().backward()
    assert bool(model.head.mean.grad.any())
    assert not bool(model.head.linear.weight.grad[: model.head.K].any())
    model = build(**CODES)
    some_bound(model)[-1][1].sum().backward()
    assert not bool(model.head.rest.weight.grad.any())
    assert bool(model.head.query.weight.grad.any())
    model.zero_grad()
    some_bound(model)[-1][0].sum().backward()
    assert bool(model.head.rest.weight.grad.any())
    assert not bool(model.head.query.weight.grad.any())


# -- drawing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 3, 40])
@pytest.mark.parametrize(("scale", "confidence"), [(1.0, ""), (2.0, "drawn"), (1.0, "entropy")])
@pytest.mark.parametrize("sizes", [{}, CODES])
def test_drawing_takes_its_steps_whatever_the_depth(steps, scale, confidence, sizes):
    model, guidance = build(**sizes), Guidance(scale=scale, schedule="constant")
    sampler = MaskedSampler(MaskedConfig(steps=steps, guidance=guidance, confidence=confidence))
    out = sampler.sample(model, torch.tensor([0, 1]), torch.arange(2))
    assert out.tokens.values.shape == (2, 6, D)
    assert out.stats.model_calls <= min(steps, 6 * D)
    assert out.stats.rows == out.stats.model_calls * (2 if scale == 1 else 4)
    one = sampler.sample(model, torch.tensor([1]), torch.tensor([1]))
    assert torch.equal(one.tokens.values[0], out.tokens.values[1])  # a row depends on its own seed alone


@pytest.mark.parametrize("confidence", ["drawn", "entropy", "random"])
def test_confidence_by_entropy_or_none_keeps_what_is_likely_no_more_often_than_it_is_drawn(confidence):
    """Where context says nothing, every position's coarsest code follows the weights.

    Chi-square, false alarms 1 in 10,000; sureness by what was drawn prefers the likely, and must be seen to.
    """
    from scipy.stats import chisquare

    model, rows = build(), 3000
    with torch.no_grad():
        for p in (model.head.linear.weight, model.head.spread.weight, model.head.low_rank):
            p.zero_()
        model.head.linear.bias[: model.head.K] = torch.linspace(1.5, 0, model.head.K)
        model.head.log_std.fill_(-6)
    sampler = MaskedSampler(MaskedConfig(steps=6, confidence=confidence, confidence_temperature=0.1))
    ids = sampler.sample(model, torch.zeros(rows, dtype=torch.long), torch.arange(rows), batch_size=rows).tokens.values
    codes = torch.arange(model.head.K) * V // model.head.K
    seen = (ids[..., 0, None] == codes).sum((0, 1)).numpy()
    assert seen.sum() == rows * 6
    expected = torch.linspace(1.5, 0, model.head.K).double().softmax(0).numpy() * rows * 6
    assert (chisquare(seen, expected).pvalue > 1e-4) == (confidence != "drawn")


@pytest.mark.parametrize("confidence", ["random", "drawn"])
def test_a_step_draws_and_quantises_no_more_than_it_keeps(confidence):
    """What is kept is the same codes as from drawing everything, at all positions and depths; without preference
    nothing is drawn where nothing is kept.
    """
    model, drawn = build(), []
    predict = model.predict

    def watched(state, where=None):
        drawn.append(6 if where is None else where.shape[1])
        return predict(state, where)

    model.predict = watched
    labels, seeds = torch.zeros(5, dtype=torch.long), torch.arange(5)
    sampler = MaskedSampler(MaskedConfig(steps=8, confidence=confidence))
    few = sampler.sample(model, labels, seeds).tokens.values
    assert len(drawn) == 8
    assert (max(drawn[:3]) < 6) == (confidence == "random")
    quantise, commit = model.quantise, model.commit
    model.quantise = lambda z, filled, count=None: quantise(z, filled)
    if confidence == "random":  # and with everything drawn

        def whole(state, z, where, count):
            every = torch.arange(6).expand(5, -1)
            z = torch.randn(5, 6, C).scatter(1, where[..., None].expand(-1, -1, C), z)
            commit(state, z, every, torch.zeros(5, 6, dtype=torch.long).scatter(1, where, count))

        model.commit = whole
    assert torch.equal(sampler.sample(model, labels, seeds).tokens.values, few)


def test_without_preference_a_step_keeps_what_training_masks():
    """Codes there a position behind one step: means and variances of draws without replacement, as `ResGen.mask`'s.

    Means of 4,000 rows within 5 standard errors, 1 false alarm in 20,000 for 6 positions; sureness by what was drawn
    must miss the variance.
    """
    model, rows, seen = build(), 4000, {}
    with torch.no_grad():  # some positions are always surer than others
        model.head.spread.weight.zero_()
        model.head.spread.bias.copy_(torch.linspace(-3, 1, model.head.K))
    for confidence in ("random", "drawn"):
        sampler, filled = MaskedSampler(MaskedConfig(steps=2, confidence=confidence, confidence_temperature=0.1)), []
        commit = model.commit
        model.commit = lambda state, z, where, count, commit=commit, filled=filled: (
            commit(state, z, where, count), filled.append(state.filled_BL)
        )  # fmt: skip
        sampler.sample(model, torch.zeros(rows, dtype=torch.long), torch.arange(rows), batch_size=rows)
        model.commit = commit
        seen[confidence] = filled[0].double()
    n, N = int(seen["random"][0].sum()), 6 * D
    mean, var = n / 6, n / 6 * (1 - n / N) * (N - D) / (N - 1)
    assert (seen["random"].mean(0) - mean).abs().max() < 5 * (var / rows) ** 0.5
    assert abs(seen["random"].var(0).mean() / var - 1) < 0.1
    assert seen["drawn"].var(0).mean() > 1.5 * var


def test_the_share_masked_follows_the_power_trained_with_or_asked_for():
    labels = torch.zeros(1, dtype=torch.long)
    for trained, asked, power in ((0.25, None, 0.25), (0.25, 2.0, 2.0), (1.0, None, 1.0)):
        model, left = build(mask_power=trained, **CODES), []
        commit = model.commit
        model.commit = lambda state, *rest, commit=commit, left=left: (
            commit(state, *rest), left.append(6 * D - int(state.filled_BL.sum()))
        )  # fmt: skip
        MaskedSampler(MaskedConfig(steps=4, power=asked)).sample(model, labels, torch.arange(1))
        assert left == [int(6 * D * math.cos(math.pi / 2 * i / 4) ** power) for i in (1, 2, 3)] + [0]
    with pytest.raises(ValueError, match="power must be positive"):
        MaskedSampler(MaskedConfig(power=0.0)).sample(model, labels, torch.arange(1))


def test_sureness_is_a_number_where_components_are_cut():
    p = mixture_of(head(), torch.randn(1, 1, 8))
    whole = p.entropy_bound
    cut = dataclasses.replace(p, logits_BGM=p.logits_BGM.index_fill(-1, torch.tensor([0]), -math.inf))
    assert bool(cut.entropy_bound.isfinite().all())
    few = dataclasses.replace(
        cut, logits_BGM=p.logits_BGM[..., 1:], log_std_BGM=p.log_std_BGM[..., 1:],
        mean_TMC=p.mean_TMC[:, 1:], low_rank_MCR=p.low_rank_MCR[1:],
    )  # fmt: skip
    torch.testing.assert_close(cut.entropy_bound, few.entropy_bound)
    assert not torch.allclose(cut.entropy_bound, whole)


def test_what_is_fixed_stays_and_coarse_comes_before_fine():
    model, state = build(), None
    state = model.start(torch.tensor([0, 1]))
    z = torch.randn(2, 6, C, generator=torch.Generator().manual_seed(0))
    count = torch.tensor([[1, 2, 0, 4, 1, 0], [0, 0, 3, 1, 2, 4]])
    model.commit(state, z, None, count)
    assert torch.equal(state.filled_BL, count)
    before = state.ids_BLD.clone()
    there = torch.arange(D) < count[..., None]
    assert torch.equal(before[there], model.quantise(z, torch.zeros_like(count))[there])
    model.commit(state, -z, None, D - count)
    assert torch.equal(state.ids_BLD[there], before[there])
    assert model.tokens(state).values.shape == (2, 6, D)
    with pytest.raises(ValueError, match="more codes"):
        model.commit(state, z, None, count)


def test_errors_name_what_is_missing():
    model = ResGen(ResGenConfig(grid=(6,), vocab=V, codes_depth=D, code_dim=C, num_classes=2, dim=32, depth=1, heads=2))
    with pytest.raises(ValueError, match="adopt"):
        model.predict(model.start(torch.tensor([0])))
    narrow = Stacks()
    narrow.codebooks = narrow.codebooks[..., :2]
    with pytest.raises(ValueError, match=r"--model\.code-dim 2"):
        model.adopt(narrow)
    with pytest.raises(ValueError, match="the rank is 0"):
        build(mixtures=0)
    with pytest.raises(ValueError, match="missing"):
        build().tokens(build().start(torch.tensor([0])))


# -- a sequence, end to end -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [{"mixtures": 16}, CODES])
def test_a_one_dimensional_signal_end_to_end(sizes):
    """Two kinds of waves as (L, D) codes: after seconds of training it draws them far above chance (1 in 12 turns)."""
    L, g = 12, torch.Generator().manual_seed(0)
    t = torch.arange(L) / L * 2 * math.pi

    def waves(kind):  # class 0 turns once, class 1 three times; a random phase each
        phase = torch.rand(len(kind), 1, generator=g) * 2 * math.pi
        angle = (1 + 2 * kind[:, None]) * t + phase
        return torch.stack([angle.cos(), angle.sin(), 0.5 * angle.cos()], -1)

    def turns(x):
        z = torch.view_as_complex(x[..., :2].contiguous())
        spectrum = torch.fft.fft(z, dim=1).abs()
        return spectrum.argmax(1)

    stacks = Stacks(L)
    model = build(L=L, dim=48, **sizes).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(500):
        kind = torch.randint(2, (64,), generator=g)
        loss = model.loss(stacks.encode(waves(kind)), kind, Noise(torch.arange(64) + 64 * step))["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step == 0:
            first = float(loss.detach())
    assert float(loss.detach()) < first - 0.3
    kind = torch.arange(200) % 2
    sampler = MaskedSampler(MaskedConfig(steps=12, confidence_temperature=0.5))
    out = sampler.sample(model.eval(), kind, torch.arange(200), batch_size=200)
    drawn = turns(stacks.decode(out.tokens.values))
    assert float((drawn == 1 + 2 * kind).float().mean()) > 0.22  # by chance never; 0.3 is usual

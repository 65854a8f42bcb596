"""Continuous speculative decoding: the target's law, caches, windows, who drafts; and the published rule."""

import pytest
import torch
from scipy.stats import ks_2samp

from eval.exactness import check_normal
from eval.toys import GaussianAR, GaussianARConfig
from genlab.distributions import Gaussian
from genlab.generators.base import Guidance
from genlab.generators.xar import XAR, XARConfig
from genlab.noise import Noise
from samplers.base import Stats
from samplers.chain import ChainConfig, ChainSampler, prepare
from samplers.continuous_paper import _residual
from samplers.continuous_speculative import ContinuousSpeculativeConfig, ContinuousSpeculativeSampler
from tests.unit.test_generators_discrete import randomise
from tests.unit.test_speculative import mar
from train.draft import distil

GUIDED = Guidance(scale=2.0)
LABELS, SEEDS = torch.tensor([0, 4, 2, 2, 1]), torch.arange(5)


def near(model, off):
    """A draft: the same network, its weights a little off."""
    other = type(model)(model.config)
    other.load_state_dict(model.state_dict())
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in other.parameters():
            p += off * p.std().nan_to_num() * torch.randn(p.shape, generator=generator)
    return other.eval()


def sampler(draft=None, **options):
    return ContinuousSpeculativeSampler(ContinuousSpeculativeConfig(guidance=GUIDED, **options), draft=draft)


@pytest.mark.parametrize(
    ("order", "options"),
    [
        ("raster", {"window": 5}),
        ("raster", {"window": 13, "every": 3, "last": "spread", "last_std": 0.1}),
        ("raster", {"window": 4, "last_std": 0.1, "temperature": 0.9}),
        ("masked", {"window": 5, "calls": 2}),
        ("masked", {"window": 20, "calls": 3, "last": "spread", "last_std": 0.1, "restart": "draft"}),
    ],
)
@pytest.mark.parametrize("drafted", [False, True])
def test_mar_draws_from_its_own_law(order, options, drafted):
    """Against the plain sampler of the same target; and rows are the same in a batch and alone."""
    model, n = mar(order), 400
    fast = sampler(near(model, 0.05) if drafted else None, **options)
    labels = torch.full((n,), 1)
    a = fast.sample(model, labels, torch.arange(n), batch_size=n)
    b = fast.plain(model).sample(model, labels, torch.arange(n, 2 * n), batch_size=n)
    assert 0.02 < a.stats.accepted / a.stats.proposed < 1
    assert a.stats.trials > 0
    x, y = (out.tokens.values.flatten(1).double() for out in (a, b))
    z = (x.mean(0) - y.mean(0)) / ((x.var(0) + y.var(0)) / n).sqrt()
    assert float(z.abs().max()) < 4.5
    assert min(ks_2samp(x[:, i], y[:, i], method="asymp").pvalue for i in range(x.shape[1])) > 1e-5
    alone = fast.sample(model, labels[:3], torch.arange(3), batch_size=1).tokens.values
    torch.testing.assert_close(alone, a.tokens.values[:3], rtol=1e-3, atol=1e-3)


def test_masked_order_crosses_tokens_one_at_a_time():
    model, n = mar("masked", head_steps=4), 30
    options = {"window": 7, "calls": 4, "last": "spread", "last_std": 0.3}
    fast = sampler(near(model, 0.02), **options)
    labels = torch.full((n,), 1)
    a = fast.sample(model, labels, torch.arange(n), batch_size=n)
    b = fast.plain(model).sample(model, labels, torch.arange(n, 2 * n), batch_size=n)
    x, y = (out.tokens.values.flatten(1).double() for out in (a, b))
    z = (x.mean(0) - y.mean(0)) / ((x.var(0) + y.var(0)) / n).sqrt()
    assert float(z.abs().max()) < 4.5
    assert a.stats.proposed > a.stats.accepted > 0


@pytest.mark.parametrize("options", [{}, {"last": "spread", "last_std": 0.2}])
def test_window_of_one_and_beyond_the_end(options):
    toy, n = GaussianAR(GaussianARConfig(tokens=3, channels=2, steps=4)), 1000
    for window in (1, 100):
        fast = sampler(GaussianAR(GaussianARConfig(tokens=3, channels=2, steps=4, blur=0.3)), window=window, **options)
        out = fast.sample(toy, torch.zeros(n).long(), torch.arange(n), batch_size=n)
        mean, cov = toy.law(0, GUIDED, lambda chain: prepare(chain, fast.config))
        assert min(c.p for c in check_normal("", out.tokens.values.flatten(1), mean, cov)) > 1e-4
        assert len(out.stats.by_step) == 4
        assert len(out.stats.by_position) == 3
        assert sum(a for _, a in out.stats.by_step) == out.stats.accepted
        assert sum(a for _, a in out.stats.by_position) == out.stats.accepted


def test_a_draft_that_is_the_target_is_always_accepted():
    """Float64 toys: to rounding. With every step evaluated, one round takes a whole window."""
    toy, n = GaussianAR(GaussianARConfig(tokens=3, channels=2, steps=4)), 64
    fast = sampler(toy, window=12, every=1, last="spread", last_std=0.2, restart="draft")
    out = fast.sample(toy, torch.zeros(n).long(), torch.arange(n), batch_size=n)
    assert out.stats.accepted == out.stats.proposed == n * 12
    assert out.stats.head_calls == 12 + 1
    own = sampler(window=12, every=1, last="spread", last_std=0.2, restart="draft")
    same = own.sample(toy, torch.zeros(n).long(), torch.arange(n), batch_size=n)
    assert bool((same.tokens.values == out.tokens.values).all())
    assert same.stats.model_calls == 3  # it is its own draft: no forward is done twice
    assert out.stats.model_calls > 3


def test_nothing_accepted_is_the_plain_law():
    class Never(ContinuousSpeculativeSampler):
        @staticmethod
        def verify(p, q, draft, noise, **options):
            from samplers.verify import verify

            far = type(q)(q.mean + 1e6, q.std)
            return verify(p, far, draft + 1e6, noise, **options)

    toy, n = GaussianAR(GaussianARConfig(tokens=2, channels=2, steps=4)), 2000
    c = ContinuousSpeculativeConfig(guidance=GUIDED, last="spread", last_std=0.2, window=3, widen=1.5)
    out = Never(c).sample(toy, torch.zeros(n).long(), torch.arange(n), batch_size=n)
    assert out.stats.accepted == 0
    mean, cov = toy.law(0, GUIDED, lambda chain: prepare(chain, c))
    assert min(k.p for k in check_normal("", out.tokens.values.flatten(1), mean, cov)) > 1e-4


def test_fewer_head_calls_and_no_forward_twice():
    """Self-speculation in raster order: the transformer is called as often as by the plain sampler."""
    model = mar("raster")
    plain = ChainSampler(ChainConfig(guidance=GUIDED)).sample(model, LABELS[:1], SEEDS[:1])
    fast = sampler(window=6).sample(model, LABELS[:1], SEEDS[:1])
    assert plain.stats.head_calls == 4 * 8
    assert fast.stats.head_calls < plain.stats.head_calls
    assert fast.stats.model_calls == plain.stats.model_calls == 4


def test_select_is_each_chain_alone():
    model = mar("raster")
    state = model.start(LABELS, Guidance(scale=2.0, schedule="constant", until=0.6))  # the last tokens are unguided
    x = Noise(SEEDS, position=torch.arange(3)).normal(3)
    parts = model.predict_many(state, [x[:, i : i + 1].float() for i in range(2)])
    assert {len(p.embedded_HBGW) for p in parts} == {1, 2}
    index, step = torch.tensor([[0, 2, 1]] * 5), torch.tensor([[1, 7, 3]] * 5)
    one = parts[0].select(parts[1:], index).transition(x, step)
    general = super(type(parts[0]), parts[0]).select(parts[1:], index).transition(x, step)
    for i, k in enumerate((0, 2, 1)):
        alone = parts[k].transition(x[:, i : i + 1], step[:, i : i + 1])
        for some in (one, general):
            torch.testing.assert_close(some.mean[:, i : i + 1], alone.mean, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(some.std[:, i : i + 1], alone.std.expand_as(alone.mean), rtol=1e-4, atol=1e-4)


# -- xAR --------------------------------------------------------------------------------------------------------


def xar(**options):
    torch.manual_seed(0)
    sizes = {"dim": 32, "encoder_depth": 1, "decoder_depth": 1, "heads": 2, "num_classes": 5, "channels": 2}
    return randomise(XAR(XARConfig(**{"grid": (2, 4), "entity": "cell", "size": 2, **sizes, **options})))


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_points_are_the_flows_velocities(guidance):
    """Each point at its own row and time, in the context of clean groups or of noisy ones."""
    for time in (0.0, 0.04):
        model = xar()
        state = model.start(LABELS, Guidance(scale=guidance, schedule="constant"))
        state.context_time = time
        x = Noise(SEEDS).normal(4, 2)
        model.commit(state, x)
        row = torch.tensor([3, 0, 3])
        got = model.points(state, 1, x[[0, 1, 2]], row, [0.7, 0.3, 0.04])
        flow = model.predict(state)
        for i, t in enumerate((0.7, 0.3, 0.04)):
            want = flow.velocity(x[i].expand(5, -1, -1), t)[row[i]]
            torch.testing.assert_close(got[i], want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("last", ["target", "aside"])
def test_xar_draws_from_its_own_law(last):
    model, n = xar(), 250 if last == "target" else 60
    fast = sampler(window=5, last=last, denoising_steps=6)
    labels = torch.full((n,), 1)
    a = fast.sample(model, labels, torch.arange(n), batch_size=n)
    b = fast.plain(model).sample(model, labels, torch.arange(n, 2 * n), batch_size=n)
    assert 0 < a.stats.accepted < a.stats.proposed
    assert a.stats.trials <= a.stats.proposed  # reflections
    x, y = (out.tokens.values.flatten(1).double() for out in (a, b))
    z = (x.mean(0) - y.mean(0)) / ((x.var(0) + y.var(0)) / n).sqrt()
    assert float(z.abs().max()) < 4.5
    assert 0.4 < float((x.var(0) / y.var(0)).median()) < 2.5
    if last == "target":  # a row's calls: not far beyond the plain sampler's
        one = fast.sample(model, labels[:1], torch.arange(1))
        assert (
            one.stats.model_calls < fast.plain(model).sample(model, labels[:1], torch.arange(1)).stats.model_calls + 4
        )
        torch.testing.assert_close(one.tokens.values, a.tokens.values[:1], rtol=1e-3, atol=1e-3)


def test_xar_with_a_draft_model_crosses_groups():
    model = xar()
    same = sampler(model, window=10, every=1, restart="draft", last="aside", denoising_steps=6)
    out = same.sample(model, LABELS[:2], SEEDS[:2])
    assert out.stats.accepted >= out.stats.proposed - 1  # its own draft: the same but for rounding
    assert out.stats.by_position[1][0] >= 5
    with pytest.raises(ValueError, match="temperature 1"):
        sampler(last="spread", last_std=0.1).sample(model, LABELS, SEEDS)


# -- distilling a draft -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["raster", "masked"])
def test_a_distilled_draft_is_refused_less(order):
    teacher = mar(order).eval()
    draft = near(teacher, 0.3)
    optimizer = torch.optim.Adam(draft.parameters(), 3e-3)
    tokens, refused = Noise(torch.arange(16)).normal(4, 3).float(), []
    for i in range(12):
        terms = distil(draft, teacher, tokens, torch.arange(16) % 5, Noise(torch.arange(16) + 100 * i))
        optimizer.zero_grad()
        terms["loss"].backward()
        optimizer.step()
        refused.append(float(terms["refused"]))
    assert sum(refused[-3:]) < 0.95 * sum(refused[:3])
    assert all(p.grad is None for p in teacher.parameters())
    exact = distil(teacher, teacher, tokens, torch.arange(16) % 5, Noise(torch.arange(16)))
    assert float(exact["refused"]) < 1e-3
    assert float(exact["loss"].detach()) < 1e-4


# -- the published rule -----------------------------------------------------------------------------------------


def paper(draft, **options):
    return sampler(draft, mode="paper", **({"last_std": 0.3, "window": 2, "prefill": 0.0} | options))


def test_prefilled_to_the_end_it_is_the_plain_sampler():
    model = mar("raster")
    fast = paper(near(model, 0.1), prefill=1.0)
    a, b = (s.sample(model, LABELS, SEEDS).tokens.values for s in (fast, fast.plain(model)))
    assert bool((a == b).all())


@pytest.mark.parametrize("order", ["raster", "masked"])
def test_with_the_target_as_draft_it_is_the_plain_sampler(order):
    model = mar(order)
    fast = paper(near(model, 0.0), calls=4, window=3)
    assert not fast.exact
    out = fast.sample(model, LABELS, SEEDS)
    assert out.stats.accepted == out.stats.proposed
    torch.testing.assert_close(
        out.tokens.values, fast.plain(model).sample(model, LABELS, SEEDS).tokens.values, rtol=1e-3, atol=1e-3
    )


@pytest.mark.filterwarnings("ignore:.*residuals of the published rule")
def test_the_published_rule_is_off_where_spreads_differ_and_tempering_gives_the_drafts_law():
    n, sizes = 3000, {"tokens": 2, "channels": 1, "steps": 3}
    toy, found = GaussianAR(GaussianARConfig(**sizes)), {}
    for tempering, off in ((1.0, 0.0), (1.0, 0.4), (42.0, 0.0)):
        fast = paper(GaussianAR(GaussianARConfig(**sizes, blur=0.3, blur_std=off)), tempering=tempering)
        out = fast.sample(toy, torch.zeros(n).long(), torch.arange(n), batch_size=n)
        mean, cov = toy.law(0, GUIDED, lambda chain: prepare(chain, fast.config))
        checks = check_normal("", out.tokens.values.flatten(1), mean, cov)
        found[tempering, off] = min(c.p for c in checks), max(c.statistic for c in checks if c.kind == "ks")
        assert 0.1 < out.stats.accepted / out.stats.proposed < 1
    assert found[1.0, 0.0][0] > 1e-4  # given the shared noise it is one transition, verified: docs/exactness.md
    assert found[1.0, 0.4][0] < 1e-6
    assert found[42.0, 0.0][1] > found[1.0, 0.4][1]


@pytest.mark.filterwarnings("ignore:.*residuals of the published rule")
def test_a_residual_is_its_rows_own_in_any_batch():
    """Also where a batch is so large that its proposals come in parts."""
    N, C = 3000, 16
    noise = Noise(torch.arange(N)).at(position=torch.zeros(N, 1, dtype=torch.long))
    mean, D = noise.at(purpose="mean").normal(2 * C)[:, 0].float(), torch.full((N,), -0.3)
    p, q = (Gaussian(part, torch.full((N, C), 0.3)) for part in (mean[:, :C], mean[:, :C] + 0.02 * mean[:, C:]))
    all_of_them = _residual(p, q, D, 1.0, noise, Stats())
    some = torch.arange(0, N, 20)
    ps, qs = (Gaussian(d.mean[some], d.std[some]) for d in (p, q))
    torch.testing.assert_close(_residual(ps, qs, D[some], 1.0, noise.rows(some), Stats()), all_of_them[some])


def test_refusals():
    model = mar("raster")
    for options, match in (
        ({"window": 0}, "window must be at least 1"),
        ({"last": "spread"}, "set last_std"),
        ({"mode": "paper"}, "set last_std"),
        ({"mode": "paper", "last_std": 0.1}, "needs a drafting model"),
        ({"last": "aside"}, "xAR"),
        ({"prefill": 2.0}, "share of the tokens"),
    ):
        with pytest.raises(ValueError, match=match):
            sampler(**options).sample(model, LABELS, SEEDS)
    with pytest.raises(ValueError, match="in any order"):
        sampler(mar("masked")).sample(model, LABELS, SEEDS)
    with pytest.raises(ValueError, match="set calls=4"):
        paper(mar("masked"), calls=2).sample(mar("masked"), LABELS, SEEDS)


@pytest.mark.parametrize("restart", ["target", "draft"])
def test_every_draft_is_as_wide_as_asked(restart):
    """Also those that go on from the target's Gaussian where a draft was rejected."""
    model, ratios = mar("raster"), []
    for name, p in model.named_parameters():
        if name.startswith("head.final."):
            torch.nn.init.zeros_(p)  # of one spread everywhere

    class Watched(ContinuousSpeculativeSampler):
        @staticmethod
        def verify(p, q, draft, noise, **options):
            from samplers.verify import verify

            ratios.append((q.std / p.std)[options["where"]])
            return verify(p, q, draft, noise, **options)

    c = ContinuousSpeculativeConfig(guidance=GUIDED, window=4, widen=1.5, restart=restart)
    out = Watched(c).sample(model, LABELS, SEEDS)
    assert out.stats.accepted < out.stats.proposed
    ratio = torch.cat(ratios)
    torch.testing.assert_close(ratio, torch.full_like(ratio, 1.5))


def test_a_draft_of_other_groups_or_another_kind_is_refused():
    def xar(**options):
        sizes = {"channels": 3, "num_classes": 5, "dim": 32, "encoder_depth": 1, "decoder_depth": 1, "heads": 2}
        return XAR(XARConfig(grid=(4, 4), **sizes, **options))

    flows = [xar(entity="cell", size=2), xar(entity="cell", size=4), xar(entity="patch")]
    for target in flows:
        for draft in flows:
            if draft is not target:
                with pytest.raises(ValueError, match="must draw the same groups of tokens"):
                    sampler(draft, denoising_steps=2).sample(target, LABELS[:1], SEEDS[:1])
    chain = mar("raster")
    grid = chain.config.grid
    flow = XAR(XARConfig(grid=grid, channels=3, num_classes=5, dim=32, encoder_depth=1, decoder_depth=1, heads=2,
                         entity="patch"))  # fmt: skip
    for target, draft in ((chain, flow), (flow, chain)):
        with pytest.raises(ValueError, match="both in chains or both by flows"):
            sampler(draft).sample(target, LABELS[:1], SEEDS[:1])


@pytest.mark.parametrize(("last", "steps"), [("target", 0), ("aside", 1), ("aside", 0)])
def test_too_few_steps_of_a_flow_are_refused(last, steps):
    model = XAR(XARConfig(grid=(4, 4), channels=3, num_classes=5, dim=32, encoder_depth=1, decoder_depth=1, heads=2,
                          entity="cell", size=2))  # fmt: skip
    fast = sampler(last=last, denoising_steps=steps)
    with pytest.raises(ValueError, match="denoising_steps must be at least"):
        fast.sample(model, LABELS[:1], SEEDS[:1])

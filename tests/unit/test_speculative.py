"""Speculative samplers on small random networks: caches, windows, greedy, batches; chains that hold their output."""

import pytest
import torch
from scipy.stats import ks_2samp

from eval.toys import TabularAR, TabularConfig
from genlab.distributions import Chain, Gaussian
from genlab.generators.base import Guidance
from genlab.generators.elm import ELM, ELMConfig
from genlab.generators.llamagen import LlamaGen, LlamaGenConfig
from genlab.generators.mar import MAR, MARConfig
from genlab.nn.diffusion_head import PRIOR, DiffusionChain, DiffusionHead, process
from genlab.noise import Noise
from samplers.ancestral import AncestralConfig, AncestralSampler
from samplers.base import Stats
from samplers.chain import ChainConfig, ChainSampler
from samplers.continuous_speculative import ContinuousSpeculativeConfig, ContinuousSpeculativeSampler
from samplers.continuous_walk import Walk
from samplers.ngram import NGram, NGramConfig
from samplers.speculative_draft import SpeculativeDraftConfig, SpeculativeDraftSampler
from samplers.speculative_jacobi import SpeculativeJacobiConfig, SpeculativeJacobiSampler
from samplers.token_tree import MultiDraftSampler
from samplers.verify import verify
from samplers.window import Count, JacobiWindow, Window, cost_of
from tests.unit.test_generators_discrete import randomise

SIZES = {"grid": (3, 4), "num_classes": 5, "dim": 32, "depth": 2, "heads": 2}
GUIDED = Guidance(scale=2.0, schedule="linear")
LABELS, SEEDS = torch.tensor([0, 4, 2, 2, 1]), torch.arange(5)


@pytest.fixture(scope="module")
def models():
    return {
        "llamagen": randomise(LlamaGen(LlamaGenConfig(vocab=11, **SIZES))),
        "elm": randomise(ELM(ELMConfig(sub_tokens=2, bits=3, **SIZES))),
    }


def jacobi(**options):
    return SpeculativeJacobiSampler(SpeculativeJacobiConfig(guidance=GUIDED, **options))


def ids(sampler, model, batch_size=5):
    return sampler.sample(model, LABELS, SEEDS, batch_size=batch_size)


@pytest.mark.parametrize("kind", ["llamagen", "elm"])
@pytest.mark.parametrize("window", [1, 4, 50])
@pytest.mark.parametrize("init", ["random", "model", "horizontal", "vertical"])
def test_greedy_is_greedy(models, kind, window, init):
    plain = ids(AncestralSampler(AncestralConfig(guidance=GUIDED, temperature=0)), models[kind])
    for coupling in ("none", "maximal", "gumbel"):
        fast = ids(jacobi(temperature=0, window=window, init=init, coupling=coupling), models[kind])
        assert bool((fast.tokens.values == plain.tokens.values).all())
        assert fast.stats.model_calls <= plain.stats.model_calls
        assert fast.stats.accepted <= fast.stats.proposed


@pytest.mark.parametrize("kind", ["llamagen", "elm"])
@pytest.mark.parametrize("window", [1, 4, 50])
def test_greedy_with_a_drafting_model(models, kind, window):
    plain = ids(AncestralSampler(AncestralConfig(guidance=GUIDED, temperature=0)), models[kind])
    config = SpeculativeDraftConfig(guidance=GUIDED, temperature=0, window=window)
    fast = ids(SpeculativeDraftSampler(config, draft=models[kind]), models[kind])
    assert bool((fast.tokens.values == plain.tokens.values).all())


@pytest.mark.parametrize("kind", ["llamagen", "elm"])
def test_fixed_gumbel_noise_gives_the_same_tokens_whatever_the_window(models, kind):
    drawn = [
        ids(jacobi(window=w, init=init, coupling="gumbel"), models[kind], batch).tokens.values
        for w, init, batch in ((1, "random", 5), (3, "vertical", 5), (50, "model", 5), (4, "horizontal", 1))
    ]
    assert all(bool((x == drawn[0]).all()) for x in drawn)
    assert len(drawn[0].unique()) > 3


@pytest.mark.parametrize("coupling", ["none", "maximal"])
@pytest.mark.parametrize("kind", ["llamagen", "elm"])
def test_rows_advance_on_their_own(models, kind, coupling):
    """A row is the same in a batch and alone, though the batch waits for others at the end."""
    sampler = jacobi(window=3, coupling=coupling, top_k=6)
    whole = ids(sampler, models[kind]).tokens.values
    for size in (1, 2):
        assert bool((ids(sampler, models[kind], size).tokens.values == whole).all())


def test_a_draft_of_the_target_itself_is_always_accepted(models):
    for kind, model in models.items():
        out = ids(SpeculativeDraftSampler(SpeculativeDraftConfig(guidance=GUIDED, window=3), draft=model), model)
        # cached one by one, or in one forward: the same but for float32's rounding
        assert out.stats.accepted >= out.stats.proposed - 1, kind
        assert out.stats.proposed >= 5 * 8


def test_nothing_accepted_is_the_plain_law(models):
    """A draft that the target finds impossible: nothing passes, and every token is a draw from p."""

    class Never(SpeculativeJacobiSampler):
        @staticmethod
        def verify(p, q, draft, noise, **options):
            from samplers.verify import verify

            apart = torch.arange(p.logits_BGKV.shape[-1]) < 5  # the two share no id
            p, q = (type(p)(d.logits_BGKV.masked_fill(m, -torch.inf)) for d, m in ((p, apart), (q, ~apart)))
            return verify(p, q, draft.clamp(max=4), noise, **options)

    model = models["llamagen"]
    out = ids(Never(SpeculativeJacobiConfig(guidance=GUIDED, window=2, coupling="none")), model)
    assert out.stats.accepted == 0
    assert out.stats.model_calls == model.n_groups
    assert bool((out.tokens.values[:, :-1] >= 5).all())


def test_refusals(models):
    model = models["llamagen"]
    with pytest.raises(ValueError, match="at least one draft"):
        ids(jacobi(window=0), model)
    with pytest.raises(ValueError, match="needs a drafting model"):
        ids(SpeculativeDraftSampler(SpeculativeDraftConfig(draft="")), model)
    with pytest.raises(ValueError, match="pairs of tokens"):
        ids(jacobi(costs=((0, 1.0),)), model)
    with pytest.raises(ValueError, match="both must be models over the same ids"):
        ids(SpeculativeDraftSampler(draft=models["elm"]), model)
    other = LlamaGen(LlamaGenConfig(vocab=11, **{**SIZES, "num_classes": 3}))
    with pytest.raises(ValueError, match="3 classes, not 5"):
        ids(SpeculativeDraftSampler(draft=other), model)


@pytest.mark.parametrize("init", ["horizontal", "vertical"])
def test_spatial_drafts_need_neighbours(init):
    """One dimension has none: ids in coarse-to-fine order are no raster."""
    toy = TabularAR(TabularConfig(grid=(4,)))
    with pytest.raises(ValueError, match=f"init '{init}' needs tokens in raster order"):
        jacobi(init=init).sample(toy, LABELS % 2, SEEDS)
    assert len(jacobi(init="random").sample(toy, LABELS % 2, SEEDS).tokens) == 5


@pytest.mark.parametrize("coupling", ["none", "maximal", "gumbel"])
def test_windows_adapt_row_by_row(coupling):
    """Windows that come and go leave a row what it is alone, and the greedy tokens what they are."""
    model = randomise(LlamaGen(LlamaGenConfig(vocab=11, **{**SIZES, "grid": (5, 8), "depth": 1})))
    steep = ((1, 1.0), (2, 2.0))  # each further token costs as much as a call of its own
    sampler = jacobi(window=6, coupling=coupling, costs=steep)
    whole = ids(sampler, model)
    alone = sampler.sample(model, LABELS[:2], SEEDS[:2], batch_size=1)
    assert bool((whole.tokens.values[:2] == alone.tokens.values).all())
    fixed = ids(jacobi(window=6, coupling=coupling), model)
    assert whole.stats.proposed < 0.8 * fixed.stats.proposed
    greedy = ids(jacobi(window=6, coupling=coupling, costs=steep, temperature=0), model).tokens.values
    plain = ids(AncestralSampler(AncestralConfig(guidance=GUIDED, temperature=0)), model).tokens.values
    assert bool((greedy == plain).all())


def test_drafts_grow_better_as_they_wait():
    """Drafts that stand only when they are old need a long window, if it is cheap; such that never do, none."""
    pays, dear = (JacobiWindow(1, 12, ((1, 1.0), (13, last))) for last in (1.2, 13.0))
    for w in (pays, dear):
        for _ in range(30):
            n = w.choose()[0]
            w.learn([n], [int((w.age[0, :n] >= 2).cumprod().sum())])
    assert pays.choose()[0] > 6
    assert dear.choose()[0] <= 2
    assert JacobiWindow(2, 5).choose() == [5, 5]


def test_window_is_what_pays():
    cheap, dear = (Window(2, 8, ((1, 1.0), (9, last))) for last in (1.01, 9.0))
    for w in (cheap, dear):
        assert w.choose() == [8, 8]  # nothing is known yet
        for _ in range(6):
            w.learn([8, 8], [8, 0])  # one row's drafts stand, the other's fall
    assert cheap.choose()[0] == 8
    assert dear.choose()[1] == 1
    before = cheap.choose()
    cheap.learn([0, 0], [0, 0])  # rows that are complete
    assert cheap.choose() == before
    assert Window(1, 5).choose() == [5]
    assert cost_of(((1, 1.0), (3, 2.0)), 2) == 1.5
    assert cost_of(((1, 1.0), (3, 2.0)), 5) == 3.0


def test_verdicts_are_counted():
    count = Count(6)
    count.add([0, 4], [3, 1], [1, 1])
    stats = count.stats()
    assert (stats["proposed"], stats["accepted"]) == (4, 2)
    assert stats["by_step"] == [(2, 2), (1, 0)]
    assert stats["by_position"] == [(1, 1), (1, 0), (0, 0), (0, 0), (1, 1), (0, 0)]


# -- n-grams ----------------------------------------------------------------------------------------------------


def test_ngrams_count_neighbours(models):
    model = models["llamagen"]
    draft = NGram(NGramConfig(order=2, strength=0.5), model)
    ids = torch.tensor([[1, 2, 3, 1, 1, 2, 3, 1, 1, 2, 9, 9]])[..., None]  # 3 x 4, rows alike
    p = draft.law(ids, torch.tensor([10]))[0, 0]
    # left 2 and above 3 were seen once, and 3 came; so it did behind every 2
    unigram = (torch.tensor([0, 5, 3, 2] + [0] * 7).double() + 0.5 / 11) / 10.5
    left = (torch.tensor([0, 0, 0, 2] + [0] * 7).double() + 0.5 * unigram) / 2.5
    both = (torch.tensor([0, 0, 0, 1] + [0] * 7).double() + 0.5 * left) / 1.5
    torch.testing.assert_close(p, both)
    torch.testing.assert_close(draft.law(ids, torch.tensor([0]))[0, 0], torch.full((11,), 1 / 11).double())


def test_ngrams_learn_and_remember(models):
    model = models["elm"]
    steady = SpeculativeDraftSampler(SpeculativeDraftConfig(guidance=GUIDED))
    first = ids(steady, model)
    assert first.stats.model_calls < 12  # fewer than one a token, though nothing was trained
    assert bool((ids(steady, model, 2).tokens.values == first.tokens.values).all())
    sampler = SpeculativeDraftSampler(SpeculativeDraftConfig(guidance=GUIDED, temperature=0.01, memory=3, window=6))
    before, after = (ids(sampler, model) for _ in range(2))
    assert after.stats.accepted / after.stats.proposed > before.stats.accepted / before.stats.proposed
    assert len(sampler.draft.memory_MLK) == 3
    assert ids(sampler, models["llamagen"]).tokens.spec == models["llamagen"].spec  # another target, another count
    with pytest.raises(ValueError, match="order and memory"):
        NGram(NGramConfig(order=-1), model)


# -- chains -----------------------------------------------------------------------------------------------------


def mar(order, **options):
    sizes = {"dim": 32, "encoder_depth": 1, "decoder_depth": 1, "heads": 2, "buffer": 4, "head_width": 32}
    sizes |= {"head_depth": 1, "head_steps": 8, "head_clip": 3.0, **options}
    return randomise(MAR(MARConfig(grid=(2, 2), channels=3, num_classes=5, order=order, **sizes)))


@pytest.mark.parametrize("order", ["masked", "raster"])
def test_held_output_is_the_target_where_it_was_evaluated(order):
    model = mar(order)
    state = model.start(LABELS, GUIDED)
    where = torch.tensor([[0, 2]] * 5) if order == "masked" else None
    chain = model.predict(state, where)
    x = Noise(SEEDS).normal(*chain.start.mean.shape[1:])
    for changed in (chain, chain.temperature(0.9), chain.last_std(0.1).temperature(0.9)):
        for s in (0, 3, 6):
            step = torch.full(x.shape[:2], s)
            p = changed.transition(x, step)
            again = changed.hold(x, step, p)(x, step)
            torch.testing.assert_close(again.mean, p.mean, rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(again.std, p.std, rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(changed.transition(x, s).mean, p.mean, rtol=1e-5, atol=1e-5)


def test_held_output_is_right_where_tokens_are_normal():
    """A head that knows tokens of mean m and variance PRIOR: what it said once tells what it says later, anywhere."""
    steps, m = 12, torch.tensor([0.5, -1.0, 0.2])
    p = process(steps, torch.device("cpu"))

    class Knows(DiffusionHead):
        def forward(self, x, t, embedded):
            at = (p.t == t[..., None]).int().argmax(-1)[..., None]
            signal, sigma = p.signal[at], p.sigma[at]
            x0 = (m / PRIOR + signal * x / sigma**2) / (1 / PRIOR + (signal / sigma) ** 2)
            return (x - signal * x0) / sigma, torch.full_like(x, 0.3)

    chain = DiffusionChain(Knows(3, 4, 8, 1), torch.zeros(1, 5, 2, 8), torch.ones(5, 2), steps)
    x, y = (Noise(SEEDS, purpose=name).normal(2, 3) for name in "xy")
    at = torch.full((5, 2), 1)
    later = chain.hold(x, at, chain.transition(x, at))
    for s in range(1, steps - 1):
        held, told = later(y, torch.full((5, 2), s)), chain.transition(y, torch.full((5, 2), s))
        torch.testing.assert_close(held.mean, told.mean)
        torch.testing.assert_close(held.std, told.std)


@pytest.mark.parametrize(("order", "calls"), [("masked", 4), ("masked", 2), ("raster", 4)])
def test_mar_draws_from_its_own_law(order, calls):
    """Against the plain sampler: the same means and cumulative distributions."""
    model, n = mar(order), 2000
    labels = torch.full((n,), 1)
    options = {"guidance": GUIDED, "calls": calls, "temperature": 0.95}
    fast = ContinuousSpeculativeSampler(ContinuousSpeculativeConfig(window=3, **options))
    a = fast.sample(model, labels, torch.arange(n), batch_size=n)
    b = ChainSampler(ChainConfig(**options)).sample(model, labels, torch.arange(n, 2 * n), batch_size=n)
    assert 0.02 < a.stats.accepted / a.stats.proposed < 1
    x, y = (out.tokens.values.flatten(1).double() for out in (a, b))
    z = (x.mean(0) - y.mean(0)) / ((x.var(0) + y.var(0)) / n).sqrt()
    assert float(z.abs().max()) < 4.5
    assert min(ks_2samp(x[:, i], y[:, i], method="asymp").pvalue for i in range(x.shape[1])) > 1e-5
    alone = fast.sample(model, labels[:3], torch.arange(3), batch_size=1).tokens.values
    torch.testing.assert_close(alone, a.tokens.values[:3], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("hold", [True, False])
def test_a_constant_drift_is_always_accepted(hold):
    """The held drift is right then: after a first step, a call gives the window and the step that comes free."""
    S, W = 13, 3

    def move(x, step):
        last = (torch.as_tensor(step) == S - 1)[..., None]
        return Gaussian(x + 0.1, torch.where(last, 0.0, 0.2).expand_as(x))

    def held(x, step, p):
        return lambda x, step: Gaussian(x + 0.1, torch.full_like(x, 0.2))

    zero = torch.zeros(6, 2, 3, dtype=torch.float64)
    chain = Chain(Gaussian(zero, zero + 1), move, S, held if hold else None)
    stats, position = Stats(), torch.arange(2).expand(6, 2)
    c = ContinuousSpeculativeConfig(window=W)
    x = Walk(c, verify, Noise(torch.arange(6)), position, stats, chains=(chain, None)).run()
    assert stats.proposed == stats.accepted == 6 * 2 * 9
    assert stats.head_calls == 1 + 3 + 1  # what the first draft holds; the windows; the noiseless step
    assert abs(float(x.mean()) - 1.3) < 1


def test_ngrams_are_begun_anew_for_a_model_of_other_classes(models):
    sampler = SpeculativeDraftSampler(SpeculativeDraftConfig(guidance=GUIDED))
    ids(sampler, models["llamagen"])
    fewer = randomise(LlamaGen(LlamaGenConfig(vocab=11, **{**SIZES, "num_classes": 2})))
    out = sampler.sample(fewer, LABELS.clamp(max=1), SEEDS)
    assert out.stats.images == 5


def broken(model):
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(float("nan"))
    return model


@pytest.mark.parametrize(
    "sampler",
    [
        AncestralSampler(),
        AncestralSampler(AncestralConfig(temperature=0)),
        jacobi(coupling="gumbel"),
        jacobi(coupling="none"),
        SpeculativeDraftSampler(),
        MultiDraftSampler(),
    ],
)
def test_broken_weights_draw_nothing(sampler):
    model = broken(LlamaGen(LlamaGenConfig(vocab=11, **SIZES)))
    with pytest.raises(ValueError, match="the model's logits aren't numbers"):
        ids(sampler, model)


def test_broken_weights_are_not_the_drafts_fault():
    fast = ContinuousSpeculativeSampler(ContinuousSpeculativeConfig(window=3))
    with pytest.raises(ValueError, match="isn't a number"):
        ids(fast, broken(mar("raster")))


def test_a_model_is_left_as_it_was(models):
    model = models["llamagen"].train()
    with pytest.raises(ValueError, match="temperature must not be negative"):
        ids(AncestralSampler(AncestralConfig(temperature=-1)), model)
    assert model.training
    with pytest.raises(ValueError, match="top_k must not be negative"):
        ids(AncestralSampler(AncestralConfig(top_k=-3)), model.eval())
    assert not model.training

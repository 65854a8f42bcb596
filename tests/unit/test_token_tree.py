"""Trees of drafts: one masked forward reads what one path at a time would, and a kept path is not read again."""

import pytest
import torch

from eval.audit_drafts import tabular
from eval.exactness import check_cells
from genlab.generators.base import Text
from genlab.generators.llamagen import LlamaGen, LlamaGenConfig
from genlab.generators.tree import paths, predict_each
from genlab.noise import Noise
from samplers.ancestral import AncestralConfig, AncestralSampler
from samplers.ngram import NGram, NGramConfig
from samplers.token_tree import MultiDraftConfig, MultiDraftSampler, _Tree
from tests.unit.test_generators_discrete import randomise
from tests.unit.test_speculative import GUIDED, LABELS, SEEDS, SIZES, models  # noqa: F401

PARENTS = torch.tensor(
    [[-1, 0, 0, -1, 1], [-1, -1, -1, -1, -1], [-1, 0, 1, 2, 3], [-1, 0, -1, 2, 2], [-1, -1, 0, 1, 2]]
)


def some_ids(shape, vocab, seed=0):
    return torch.randint(vocab, shape, generator=torch.Generator().manual_seed(seed))


def ragged(model, n=(0, 3, 2, 5, 3)):
    """A state whose rows stand at different positions."""
    state = model.start(LABELS, GUIDED)
    for i in range(max(n)):
        model.predict(state)
        model.commit(state, some_ids((5, 1, model.K), model.V, i))
    model.crop(state, list(n))
    return state


def test_paths():
    path = paths(PARENTS)
    assert path[0].tolist() == [[0, -1, -1, -1, -1], [0, 1, -1, -1, -1], [0, 2, -1, -1, -1], [3, -1, -1, -1, -1],
                                [0, 1, 4, -1, -1]]  # fmt: skip
    assert path[2, 4].tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="behind their parents"):
        paths(torch.tensor([[1, -1]]))


@pytest.mark.parametrize("kind", ["llamagen", "elm"])
@pytest.mark.parametrize("n", [(0, 0, 0, 0, 0), (0, 3, 2, 5, 3), (11, 12, 9, 4, 8)])
def test_one_forward_is_one_path_at_a_time(models, kind, n):  # noqa: F811
    model = models[kind]
    ids = some_ids((5, 5, model.K), model.V, 99)
    with torch.inference_mode():
        state, again = ragged(model, n), ragged(model, n)
        tree = model.predict_tree(state, ids, PARENTS).logits_BGKV
        each = predict_each(model, again, ids, PARENTS).logits_BGKV
        depth = torch.cat([torch.zeros(5, 1).long(), (paths(PARENTS) >= 0).sum(-1)], 1)
        there = torch.tensor(n)[:, None] + depth < model.n_groups  # beyond the last place, nothing is promised
        torch.testing.assert_close(tree[there], each[there], rtol=1e-4, atol=1e-4)
        assert state.calls + 5 == again.calls
        # keep a path a row, commit it: what follows is what a fresh state says
        path = torch.tensor([[0, 1, 4], [2, -1, -1], [0, 1, 2], [-1, -1, -1], [1, 3, -1]])
        path = torch.where(torch.tensor(n)[:, None] + torch.arange(3) < model.n_groups, path, -1)
        model.keep_path(state, path)
        held = list(state.cache.lengths)
        take = (path >= 0).sum(1)
        for t in range(3):
            event = ids[torch.arange(5), path[:, t].clamp(min=0)][:, None]
            for s in (state, again):
                model.commit(s, event)
        for s in (state, again):
            model.crop(s, [m + int(t) for m, t in zip(n, take, strict=True)])
        assert state.cache.lengths == held  # nothing of the path is lost
        a, b = (model.predict(s).logits_BGKV for s in (state, again))
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_captions_of_different_lengths():
    """A caption's padding is seen by no node."""
    c = LlamaGenConfig(vocab=11, condition="text", text_dim=6, text_length=4, **SIZES)
    model = randomise(LlamaGen(c))
    text = Text(torch.randn(5, 3, 6), torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0], [1, 1, 1], [1, 1, 0]]).bool())
    ids = some_ids((5, 5, 1), 11)
    with torch.inference_mode():
        tree, each = (f(model.start(text, GUIDED), ids, PARENTS).logits_BGKV
                      for f in (model.predict_tree, lambda *a: predict_each(model, *a)))  # fmt: skip
    torch.testing.assert_close(tree, each, rtol=1e-4, atol=1e-4)


def test_without_a_cache():
    model = LlamaGen(LlamaGenConfig(vocab=11, **SIZES)).eval()
    state = model.start(LABELS, GUIDED, cached=False)
    dist = model.predict_tree(state, some_ids((5, 5, 1), 11), PARENTS)
    model.keep_path(state, torch.full((5, 1), -1))
    assert dist.logits_BGKV.shape == (5, 6, 1, 11)


# -- the sampler ------------------------------------------------------------------------------------------------


def multi(draft=None, **options):
    return MultiDraftSampler(MultiDraftConfig(guidance=GUIDED, **options), draft=draft)


def draw(sampler, model, batch_size=5):
    return sampler.sample(model, LABELS, SEEDS, batch_size=batch_size)


@pytest.mark.parametrize("kind", ["llamagen", "elm"])
@pytest.mark.parametrize("rule", ["spectr", "distinct", "tree"])
@pytest.mark.parametrize(("candidates", "window"), [(3, 2), (1, 1), (2, 50)])
def test_greedy_is_greedy(models, kind, rule, candidates, window):  # noqa: F811
    model = models[kind]
    plain = draw(AncestralSampler(AncestralConfig(guidance=GUIDED, temperature=0)), model)
    for draft in (model, None) if window < 50 else (model,):
        fast = draw(multi(draft, rule=rule, candidates=candidates, window=window, temperature=0), model)
        assert bool((fast.tokens.values == plain.tokens.values).all())
        if draft is None:
            assert fast.stats.model_calls <= model.n_groups


@pytest.mark.parametrize("rule", ["spectr", "distinct", "tree"])
def test_a_row_is_the_same_in_a_batch_and_alone(models, rule):  # noqa: F811
    for model in models.values():
        sampler = multi(rule=rule, candidates=3, window=2, top_k=6)
        whole = draw(sampler, model).tokens.values
        alone = sampler.sample(model, LABELS[:2], SEEDS[:2], batch_size=1).tokens.values
        assert bool((alone == whole[:2]).all())


@pytest.mark.parametrize("rule", ["spectr", "distinct", "tree"])
def test_a_draft_of_the_target_itself_is_taken(models, rule):  # noqa: F811
    model = models["llamagen"]
    stats = draw(multi(model, rule=rule, candidates=2, window=3), model).stats
    tested, stood = stats.by_step[0]
    assert stood >= tested - 1  # but for float32's rounding
    assert stats.proposed > stats.accepted


def test_one_candidate_is_the_plain_test(models):  # noqa: F811
    """Then no rule accepts more than sum min(p, q), and all of them do."""
    model = models["llamagen"]
    for rule in ("spectr", "distinct", "tree"):
        sampler = multi(rule=rule, candidates=1, window=1, bound=True)
        tested, stood = draw(sampler, model).stats.by_step[0]
        spread = (tested * 0.25) ** 0.5
        assert abs(stood - tested * sampler.upper_bound) < 4.5 * spread


def test_more_candidates_are_bounded_by_transport(models):  # noqa: F811
    model = models["llamagen"]
    bounds = []
    for candidates in (1, 4):
        sampler = multi(rule="spectr", candidates=candidates, window=1, bound=True)
        tested, stood = draw(sampler, model).stats.by_step[0]
        assert stood <= tested * sampler.upper_bound + 4.5 * (tested * 0.25) ** 0.5
        bounds.append(sampler.upper_bound)
    assert bounds[0] < bounds[1] <= 1


def test_a_drafting_model_shares_no_cache(models):  # noqa: F811
    """A smaller model drafts the tree; both models' calls are counted."""
    small = randomise(LlamaGen(LlamaGenConfig(vocab=11, **{**SIZES, "depth": 1})))
    out = draw(multi(small, candidates=2, window=2), models["llamagen"])
    assert out.stats.model_calls > 12 / 3
    with pytest.raises(ValueError, match="both must be models over the same ids"):
        draw(multi(models["elm"]), models["llamagen"])
    with pytest.raises(ValueError, match="at least 1"):
        draw(multi(candidates=0), models["llamagen"])


@pytest.mark.parametrize("rule", ["spectr", "distinct", "tree"])
def test_top_k_cuts_both_models(rule):
    """Where ids are impossible, sequences still follow the law of the plain sampler (the audit draws the others)."""
    toy, draft, n = tabular(1), tabular(1, blur=1.0), 2000
    sampler = MultiDraftSampler(
        MultiDraftConfig(guidance=GUIDED, rule=rule, candidates=2, window=2, top_k=2, temperature=1.2), draft=draft
    )
    out = sampler.sample(toy, torch.zeros(n).long(), torch.arange(n), batch_size=n)
    law = toy.law(0, GUIDED, sampler.config.shape)
    counts = torch.bincount(toy.cells(out.tokens), minlength=len(law))
    assert check_cells("", counts.numpy(), law.numpy()).p > 1e-4


def test_a_tree_grows_where_it_is_likely(models):  # noqa: F811
    """A sure draft makes a chain; an even one makes a fan."""
    model = models["llamagen"]
    shapes = {}
    for name, temperature in (("sure", 0.0), ("even", 1e3)):
        c = MultiDraftConfig(candidates=3, window=2, temperature=temperature)
        drafter = NGram(NGramConfig(), model)
        split = lambda ids: ids[..., None]  # noqa: E731
        tree = _Tree(c, drafter, drafter.start(LABELS), split, [11] * 5, Noise(SEEDS, purpose="draft"))
        tree.grow()
        assert tree.count.tolist() == [6] * 5
        shapes[name] = int(tree.depth.max())
        assert bool((paths(tree.parents()) >= 0).any())
    assert shapes == {"sure": 6, "even": 1}

"""Trees of drafts: one masked forward reads what one path at a time would, and a kept path is not read again."""

import pytest
import torch

from genlab.generators.llamagen import LlamaGen, LlamaGenConfig
from genlab.generators.tree import paths, predict_each
from tests.unit.test_speculative import GUIDED, LABELS, SIZES, models  # noqa: F401

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


def test_without_a_cache():
    model = LlamaGen(LlamaGenConfig(vocab=11, **SIZES)).eval()
    state = model.start(LABELS, GUIDED, cached=False)
    dist = model.predict_tree(state, some_ids((5, 5, 1), 11), PARENTS)
    model.keep_path(state, torch.full((5, 1), -1))
    assert dist.logits_BGKV.shape == (5, 6, 1, 11)

"""Several candidates a place: the outcome follows p, and no rule beats the bound of the transport problem."""

import itertools

import numpy as np
import pytest
import torch
from scipy.optimize import linprog

from eval.exactness import check_cells
from genlab.distributions import Categorical
from genlab.noise import Noise
from samplers.multi_draft import best_acceptance, candidates, choose, joint

N = 40_000
NOISE = Noise(torch.arange(N), position=torch.tensor([0]))


def pair(V, seed=0, zeros=0):
    x, y = Noise(torch.tensor([seed]), purpose="pair").normal(2, V)[0]
    x[:zeros], y[V - zeros :] = -torch.inf, -torch.inf
    return Categorical(1.5 * x[None, None, None]), Categorical(1.5 * y[None, None, None])


def transport(p, q, n, replace):
    """The largest mass that a coupling of n candidates and an id puts on "the id is one of them", by linear program."""
    p, q, V = p.probs[0, 0, 0].numpy(), q.probs[0, 0, 0].numpy(), p.logits_BGKV.shape[-1]
    tuples = list(itertools.product(range(V), repeat=n) if replace else itertools.permutations(range(V), n))
    mass = []
    for t in tuples:
        left, m = 1.0, 1.0
        for x in t:
            m *= q[x] / left if left > 1e-12 else 0.0
            left -= 0 if replace else q[x]
        mass.append(m)
    gain = np.array([[float(y in t) for y in range(V)] for t in tuples])
    rows = np.kron(np.eye(len(tuples)), np.ones(V))
    columns = np.kron(np.ones(len(tuples)), np.eye(V))
    found = linprog(-gain.ravel(), A_eq=np.vstack([rows, columns]), b_eq=np.concatenate([mass, p]), method="highs")
    return -found.fun


@pytest.mark.parametrize("replace", [True, False])
@pytest.mark.parametrize(("V", "n", "zeros"), [(5, 1, 0), (5, 2, 0), (6, 4, 0), (5, 3, 2), (3, 4, 1)])
def test_outcome_follows_p(V, n, zeros, replace):
    p, q = pair(V, V + n, zeros)
    wide = Categorical(q.logits_BGKV.expand(N, 1, 1, V))
    drafts = candidates(wide, n, NOISE.at(purpose="draft"), replace=replace)
    got = choose(Categorical(p.logits_BGKV.expand(N, 1, 1, V)), wide, drafts, NOISE, replace=replace)
    law = p.probs[0, 0, 0].numpy()
    assert check_cells("", torch.bincount(got.ids[:, 0], minlength=V).numpy(), law).p > 1e-4
    rate, best = (got.index < n).double().mean().item(), best_acceptance(p, q, n, replace=replace).item()
    assert rate <= best + 4 * (best * (1 - best) / N) ** 0.5 + 1e-9
    single = torch.minimum(p.probs, q.probs).sum().item()
    assert best >= single - 1e-9
    if n == 1:
        assert best == pytest.approx(single)


@pytest.mark.parametrize("replace", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_bound_is_the_transport_optimum(seed, replace):
    for V, n in ((4, 2), (4, 3)):
        p, q = pair(V, seed)
        assert best_acceptance(p, q, n, replace=replace).item() == pytest.approx(transport(p, q, n, replace), abs=1e-6)


def test_candidates_without_replacement_differ_and_run_out():
    _, q = pair(4, zeros=2)
    drafts = candidates(Categorical(q.logits_BGKV.expand(N, 1, 1, 4)), 3, NOISE, replace=False)[:, 0]
    assert bool((drafts[:, 0] != drafts[:, 1]).all())
    assert bool((drafts[:, 2] == -1).all())  # q has two ids
    first = torch.bincount(drafts[:, 0], minlength=4).numpy()
    assert check_cells("", first, q.probs[0, 0, 0].numpy()).p > 1e-4


def test_heads_must_be_joined():
    two = Categorical(torch.randn(1, 1, 2, 3, generator=torch.Generator().manual_seed(0)))
    with pytest.raises(ValueError, match="joint"):
        best_acceptance(two, two, 2)
    probs = joint(two).probs[0, 0, 0]
    torch.testing.assert_close(probs, (two.probs[0, 0, 0][:, None] * two.probs[0, 0, 1]).flatten())
    with pytest.raises(ValueError, match="too many"):
        joint(Categorical(torch.zeros(1, 1, 4, 256)))

"""The verifier on arbitrary pairs: its law, computed from its own probabilities, is p; and nothing else leaks."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eval.exactness import check_event
from genlab.distributions import Categorical, Gaussian
from genlab.noise import Noise
from samplers.verify import draw, verify

N = 4000
NOISE = Noise(torch.arange(N), position=torch.tensor([0]))
logits = st.lists(
    st.sampled_from([float("-inf"), -30.0, -3.0, -1.0, 0.0, 0.5, 1.0, 4.0]), min_size=3, max_size=3
).filter(lambda x: max(x) > float("-inf"))


def cat(rows):
    return Categorical(torch.tensor(rows, dtype=torch.float64)[None, None])


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.lists(logits, min_size=2, max_size=2),
    st.lists(logits, min_size=2, max_size=2),
    st.sampled_from(["joint", "each"]),
)
def test_products(p, q, heads):
    p, q = cat(p), cat(q)
    x = draw(q, NOISE.at(purpose="draft"))
    v = verify(p, q, x, NOISE, heads=heads)
    assert check_event("", p, v.replacement[:, 0])[0].p > 1e-7
    assert bool((v.replacement[v.accepted] == x[v.accepted]).all())
    # the rate of acceptance is what it says
    rate = v.log_accept.exp()
    spread = (rate * (1 - rate)).sum().sqrt()
    assert abs(v.accepted.sum() - rate.sum()) <= 6 * spread + 1e-9
    assert bool(((v.trials > 0) == ~v.accepted).all())


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.integers(1, 5),
    st.floats(-3, 3),
    st.floats(0.2, 5),
    st.sampled_from([0.5, 0.9, 1.0, 1.3]),
    st.integers(0, 1000),
)
def test_gaussians(C, shift, scale, ratio, seed):
    mean, std = Noise(torch.tensor([seed])).normal(2, C)[0]
    std = scale * (0.3 * std).exp()
    p, q = (
        Gaussian(mean[None, None], std[None, None]),
        Gaussian((mean + shift * std)[None, None], ratio * std[None, None]),
    )
    x = draw(q, NOISE.at(purpose="draft"))
    v = verify(p, q, x, NOISE)
    assert min(c.p for c in check_event("", p, v.replacement[:, 0])) > 1e-7
    assert bool((v.replacement[v.accepted] == x[v.accepted]).all())
    assert bool(v.replacement.isfinite().all())
    if ratio == 1:
        assert int(v.trials.max()) <= 1


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.lists(logits, min_size=1, max_size=1), st.integers(0, 2**31))
def test_greedy(p, seed):
    """With all mass on one id, whatever the draft, the outcome is that id."""
    p = cat(p).temperature(0)
    q = Categorical(torch.zeros_like(p.logits_BGKV))
    noise = NOISE.at(step=seed)
    v = verify(p, q, draw(q, noise.at(purpose="draft")), noise)
    assert bool((v.replacement == p.mode()).all())

"""The verifier: exact laws on made-up pairs, the corners, and what it refuses."""

import math

import pytest
import torch

from eval.audit import made_up_pairs
from eval.exactness import check_event, replay_pairs
from genlab.distributions import Categorical, Gaussian, GaussianMixture
from genlab.noise import Noise
from samplers.verify import couple, draw, gumbel_draw, verify

N = 20_000
NOISE = Noise(torch.arange(N), position=torch.tensor([0]))
ALPHA = 1e-5


def cat(*probs):
    return Categorical(torch.tensor(probs, dtype=torch.float64).log()[None, None, None])


def gauss(mean, std):
    mean, std = (torch.tensor(v, dtype=torch.float64)[None, None] for v in (mean, std))
    return Gaussian(mean, std)


@pytest.mark.parametrize("name", list(made_up_pairs()))
def test_outcome_follows_p(name):
    options = {"heads": "each"} if name.endswith("each") else {}
    checks = replay_pairs(made_up_pairs(3)[name], n=N, **options)
    assert min(c.p for c in checks) > ALPHA, [c for c in checks if c.p <= ALPHA]


def test_joint_test_with_residuals_of_the_heads_is_wrong_and_seen():
    """The tempting mistake: one test of the token, then every head from its own residual."""
    (p, q) = made_up_pairs(3)["two heads, joint"][0]
    x = draw(q, NOISE.at(purpose="draft"))
    v = verify(p, q, x, NOISE)
    heads = (p.probs - q.probs).clamp(min=0)
    wrong = Categorical(heads.log().expand(N, -1, -1, -1)).sample(NOISE.at(purpose="wrong"))
    mixed = torch.where(v.accepted[..., None], x, wrong)
    assert check_event("", p, mixed[:, 0])[0].p < 1e-20


def test_reflection_at_unequal_covariance_would_be_wrong():
    p, q = gauss([0.0], [1.0]), gauss([0.8], [1.2])
    x = draw(q, NOISE.at(purpose="draft"))
    v = verify(p, q, x, NOISE)
    mirror = p.mean - p.std * (x - q.mean) / q.std
    mixed = torch.where(v.accepted[..., None], x, mirror)
    assert min(c.p for c in check_event("", p, mixed[:, 0])) < 1e-6
    assert min(c.p for c in check_event("", p, v.replacement[:, 0])) > ALPHA


def test_equal_distributions_always_accept():
    for p, _ in (pair for pairs in made_up_pairs().values() for pair in pairs):
        x = draw(p, NOISE.at(purpose="draft"))
        v = verify(p, p, x, NOISE)
        assert bool(v.accepted.all())
        assert bool((v.replacement == x).all())
        assert int(v.trials.sum()) == 0
        assert bool((v.log_accept == 0).all())


def test_disjoint_supports_never_accept():
    p, q = cat(0.3, 0.7, 0, 0), cat(0, 0, 0.5, 0.5)
    v = verify(p, q, draw(q, NOISE.at(purpose="draft")), NOISE)
    assert not bool(v.accepted.any())
    assert bool((v.replacement < 2).all())
    assert check_event("", p, v.replacement[:, 0])[0].p > ALPHA


def test_acceptance_is_as_frequent_as_can_be():
    p, q = gauss([0.0, 0.0], [1.0, 2.0]), gauss([0.6, 0.0], [1.0, 2.0])
    v = verify(p, q, draw(q, NOISE.at(purpose="draft")), NOISE)
    best = math.erfc(0.6 / 2 / 2**0.5)  # 1 - TV of two normals 0.6 apart
    assert v.accepted.double().mean().item() == pytest.approx(best, abs=4 * (best * (1 - best) / N) ** 0.5)
    assert int(v.trials.max()) == 1  # reflection, nothing tried


def test_rejection_costs_one_proposal_a_place_on_average():
    for seed in range(3):
        p, q = made_up_pairs(seed)["two heads, joint"][0]
        v = verify(p, q, draw(q, NOISE.at(purpose="draft")), NOISE)
        assert v.trials.double().mean().item() == pytest.approx(1, abs=0.15)
        assert bool((v.trials > 0).eq(~v.accepted).all())


def test_points():
    same, other = gauss([1.0, 0.5], [1.0, 0.0]), gauss([1.0, 0.7], [1.0, 0.0])
    x = draw(same, NOISE.at(purpose="draft"))
    assert bool(verify(same, same, x, NOISE).accepted.all())
    v = verify(other, same, x, NOISE)
    assert not bool(v.accepted.any())
    assert bool((v.replacement[..., 1] == 0.7).all())
    assert min(c.p for c in check_event("", other, v.replacement[:, 0])) > ALPHA
    with pytest.raises(ValueError, match="noiseless"):
        verify(gauss([0.0], [1.0]), gauss([0.0], [0.0]), torch.zeros(N, 1, 1), NOISE)
    p = gauss([2.0], [0.0])
    assert bool(verify(p, p, p.mean.expand(N, 1, 1), NOISE).accepted.all())


def test_refusals():
    p, q = cat(0.5, 0.5), cat(1.0, 0.0)
    x = torch.ones(N, 1, 1, dtype=torch.long)
    with pytest.raises(ValueError, match="probability 0 under q"):
        verify(p, q, x, NOISE)
    with pytest.raises(ValueError, match="draft of Gaussian against Categorical"):
        verify(p, gauss([0.0], [1.0]), x, NOISE)
    with pytest.raises(ValueError, match="as many positions"):
        verify(p, p, torch.zeros(N, 3, 1, dtype=torch.long), NOISE)
    with pytest.raises(ValueError, match="diagonal"):
        verify(Gaussian(torch.zeros(1, 1, 1), torch.ones(1, 1, 1), lambda z: z), gauss([0.0], [1.0]), x.double(), NOISE)
    flat = GaussianMixture(torch.zeros(1, 1, 2), torch.zeros(1, 1, 2, 1), torch.zeros(1, 1, 2, 1))
    with pytest.raises(ValueError, match="no density"):
        verify(flat, flat, x.double(), NOISE)


def test_in_order_replaces_the_first_rejection_alone():
    W, n = 6, 500
    noise = Noise(torch.arange(n), position=torch.arange(W))
    p = Categorical(Noise(torch.tensor([1])).normal(W, 1, 4))
    q = Categorical(Noise(torch.tensor([2])).normal(W, 1, 4))
    x = draw(q, noise.at(purpose="draft"))
    every, first = verify(p, q, x, noise), verify(p, q, x, noise, in_order=True)
    assert bool((every.accepted == first.accepted).all())
    place = torch.arange(W)
    till = place <= first.leading[:, None]
    torch.testing.assert_close(first.replacement[till], every.replacement[till])  # the same noise, whoever asks
    torch.testing.assert_close(first.replacement[~till], x[~till])
    assert bool((first.trials.sum(1) == (first.leading < W)).all())
    where = place < torch.arange(n)[:, None] % (W + 1)
    part = verify(p, q, x, noise, where=where)
    assert not bool(part.accepted[~where].any())
    torch.testing.assert_close(part.replacement[where], every.replacement[where])
    torch.testing.assert_close(part.replacement[~where], x[~where])


def test_rows_do_not_know_each_other():
    for name, pairs in made_up_pairs().items():
        p, q = pairs[0]
        x = draw(q, NOISE.at(purpose="draft"))
        whole = verify(p, q, x, NOISE)
        few = torch.tensor([3, 77, 1234])
        part = verify(p, q, x[few], NOISE.rows(few))
        assert bool((part.accepted == whole.accepted[few]).all()), name
        torch.testing.assert_close(part.replacement, whole.replacement[few], rtol=0, atol=1e-12)
        assert bool((part.trials == whole.trials[few]).all()), name


def test_close_pairs_take_many_trials_and_stay_exact():
    """A residual of mass 1e-4: ten thousand proposals on average, none of them capped."""
    p, q = gauss([0.0], [1.0]), gauss([0.0], [1.0002])
    x = torch.full((4, 1, 1), 9.0, dtype=torch.float64)  # far out, where q is twice as likely as p would have it
    noise = Noise(torch.arange(4), position=torch.tensor([0]))
    tries = [verify(p, q, x, noise.at(step=s)) for s in range(60)]
    assert max(int(v.trials.max()) for v in tries) > 1000
    for v in tries:
        y = v.replacement[~v.accepted]
        assert bool((y.abs() < 1.001).all())  # where p is above q


@pytest.mark.parametrize("coupling", ["maximal", "gumbel"])
def test_couplings_follow_the_new_law_and_keep_most(coupling):
    a, b = made_up_pairs()["two heads, each"][0]
    new = Categorical(a.logits_BGKV + 0.2 * (b.logits_BGKV - a.logits_BGKV))
    if coupling == "maximal":
        old_ids = draw(a, NOISE.at(purpose="draft"))
        ids = couple(a, old_ids, new, NOISE)
    else:
        wide = [Categorical(d.logits_BGKV.expand(N, -1, -1, -1)) for d in (a, new)]
        old_ids, ids = (gumbel_draw(d, NOISE) for d in wide)
    assert check_event("", new, ids[:, 0])[0].p > ALPHA
    kept = (ids == old_ids).all(-1).double().mean().item()
    alone = float((a.probs * new.probs).sum(-1).prod())
    assert kept > 0.7 > alone

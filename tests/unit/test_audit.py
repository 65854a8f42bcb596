"""The audit: its toys' laws, its tests' levels, what it catches, and its exit codes."""

import itertools

import numpy as np
import pytest
import torch
from scipy import stats

from eval.audit import AuditConfig, Trial, audit_toy, break_rule, run
from eval.exactness import (
    POWER,
    check_cells,
    check_energy,
    check_ks,
    check_normal,
    check_same_cells,
    check_share,
)
from eval.toys import GaussianAR, GaussianARConfig, TabularAR, TabularConfig
from genlab.generators.base import Guidance
from genlab.noise import Noise
from genlab.registry import SAMPLERS
from samplers.base import Sampler, SamplerConfig, Stats
from samplers.chain import ChainConfig, ChainSampler, prepare

GUIDED = Guidance(scale=2.0)
ALPHA = 1e-6


@pytest.mark.parametrize("heads", [1, 2])
def test_tabular_law_is_the_product_of_what_it_predicts(heads):
    toy = TabularAR(TabularConfig(heads=heads, vocab=2, grid=(1, 3)))
    law = toy.law(1, GUIDED, lambda d: d.temperature(0.7))
    assert law.sum().item() == pytest.approx(1)
    tokens = torch.tensor(list(itertools.product(range(2), repeat=heads)))
    for cell, sequence in enumerate(itertools.product(tokens, repeat=3)):
        state, p = toy.start(torch.tensor([1]), GUIDED), 1.0
        for ids in sequence:
            d = toy.predict(state).temperature(0.7)
            p *= d.log_prob(ids[None, None]).exp().item()
            toy.commit(state, ids[None, None])
        assert int(toy.cells(toy.tokens(state))) == cell
        assert law[cell].item() == pytest.approx(p, rel=1e-9)


TOYS = [TabularAR(), TabularAR(TabularConfig(heads=2)), GaussianAR(GaussianARConfig(tokens=4, channels=2))]


@pytest.mark.parametrize("toy", TOYS)
def test_toys_are_ragged(toy):
    """Rows at different positions predict what they would predict alone, drafts or not."""
    labels, last = torch.tensor([0, 1, 1]), toy.n_groups - 1

    def probe(dist):
        if hasattr(dist, "logits_BGKV"):
            return dist.logits_BGKV
        return dist.transition(torch.ones_like(dist.start.mean), 2).mean

    state = toy.start(labels, GUIDED)
    events = [toy.predict(state).sample(Noise(torch.arange(3), position=torch.tensor([0])))]
    for g in range(last):
        toy.commit(state, events[-1])
        events.append(toy.predict(state).sample(Noise(torch.arange(3), position=torch.tensor([g + 1]))))
    toy.commit(state, events[-1])
    with pytest.raises(ValueError, match="open"):
        toy.commit(state, events[-1])
    toy.crop(state, [1, 2, toy.n_groups])
    drafts = [torch.stack([events[min(n + j, last)][b] for b, n in enumerate(state.n)]) for j in range(2)]
    many = toy.predict_many(state, drafts)
    for b, n in enumerate(state.n):
        for j in range(3):
            if n + j <= last:
                alone = toy.start(labels, GUIDED)
                for g in range(n + j):
                    toy.commit(alone, events[g])
                torch.testing.assert_close(probe(many[j])[b], probe(toy.predict(alone))[b])
    toy.commit(state, drafts[0])
    assert state.n == [2, 3, toy.n_groups]
    with pytest.raises(ValueError, match="more than they hold"):
        toy.crop(state, [3, 3, 3])
    with pytest.raises(ValueError, match="of 4 groups are committed"):
        toy.tokens(state)


def test_gaussian_law_is_the_chains():
    """Against a plain linear recursion by hand, for one token, with its class, guidance and temperature."""
    toy = GaussianAR(GaussianARConfig(tokens=1, channels=2, steps=3))
    c = ChainConfig(temperature=0.5, last_std=0.3)
    mean, cov = toy.law(1, GUIDED, lambda chain: prepare(chain, c))
    step = torch.eye(2, dtype=torch.float64) + (toy.turn_CC - torch.eye(2, dtype=torch.float64)) / 3
    z = toy.bias_NLC[2, 0] + GUIDED.at(0.0) * (toy.bias_NLC[1, 0] - toy.bias_NLC[2, 0])
    m, s = torch.zeros(2, dtype=torch.float64), torch.eye(2, dtype=torch.float64)
    for std in (0.5 * toy.std_SC[0], 0.5 * toy.std_SC[1], torch.tensor([0.3, 0.3], dtype=torch.float64)):
        m, s = step @ m + z / 3, step @ s @ step.T + torch.diag(std**2)
    torch.testing.assert_close(mean, m)
    torch.testing.assert_close(cov, s)


def test_levels():
    """Right draws pass, at the stated rate; differences of the stated size are found at the stated power."""
    rng, n = np.random.default_rng(0), 4000
    law = rng.dirichlet(np.ones(12))
    p = [check_cells("", rng.multinomial(n, law), law).p for _ in range(200)]
    assert stats.kstest(p, "uniform").pvalue > 1e-4
    p = [check_ks("", rng.standard_normal(500), stats.norm.cdf).p for _ in range(150)]
    assert stats.kstest(p, "uniform").pvalue > 1e-4
    x = torch.from_numpy(rng.standard_normal((100, 2000, 3)))
    checks = [check_normal("", y, torch.zeros(3).double(), torch.eye(3).double())[:2] for y in x]
    for i in range(2):
        assert stats.kstest([c[i].p for c in checks], "uniform").pvalue > 1e-4

    size = check_cells("", rng.multinomial(n, law), law).smallest(ALPHA)  # total variation, spread as it is hardest
    off = law * (1 + np.where(np.arange(12) % 2, 1, -1) * 2 * size)
    off = np.clip(off, 0, None) / np.clip(off, 0, None).sum()
    share = 0.5 * np.abs(off - law).sum() / size
    found = [check_cells("", rng.multinomial(n, off), law) for _ in range(200)]
    assert share > 0.9
    assert np.mean([c.p < ALPHA for c in found]) > 0.95
    assert np.median([c.power(ALPHA) for c in found]) < 1  # a lower bound: modest about one run
    shift = check_ks("", rng.standard_normal(n), stats.norm.cdf).smallest(ALPHA)
    off_by = 2 * stats.norm.ppf(0.5 + shift / 2)  # the shift whose KS distance that is
    found_ks = [check_ks("", rng.standard_normal(n) + off_by, stats.norm.cdf).p < ALPHA for _ in range(200)]
    assert np.mean(found_ks) >= POWER


def test_impossible_and_rare_cells():
    law = np.array([0.5, 0.4999, 0.0001, 0.0])
    assert check_cells("", np.array([500, 500, 0, 0]), law).p > 0.5
    assert check_cells("", np.array([500, 499, 0, 1]), law).p == 0
    assert check_cells("", np.array([10, 0]), np.array([1.0, 0.0])).p == 1


@pytest.mark.parametrize("name", ["speculative-draft", "continuous-speculative", "chain"])
def test_samplers_pass_and_their_controls_are_caught_each_time(name):
    report = audit_toy([name], draws=2000)
    text = report.text()
    assert report.passed, text
    controls = [x for x in report.lines if x.control]
    assert len(controls) == (
        0 if name == "chain" else 2 * len([x for x in report.lines if not x.control and x.exact]) + 2
    )
    assert all(report.power(x) >= POWER for x in controls)
    assert "would see" in text
    assert "false-alarm rate 0.0001" in text


@pytest.mark.parametrize("how", ["acceptance", "residual"])
@pytest.mark.parametrize("name", ["speculative-draft", "speculative-jacobi"])
def test_broken_samplers_fail(name, how, capsys):
    assert run(AuditConfig(sampler=name, broken=how, draws=12_000)) == 1
    assert "DIFFERS" in capsys.readouterr().out


def test_a_biased_sampler_of_the_users_own_is_caught():
    class Biased(Sampler):
        """Draws the first token twice as often right as it should."""

        name, Config = "biased", SamplerConfig

        @classmethod
        def supports(cls, generator):
            return isinstance(generator, TabularAR)

        def draw(self, generator, labels, noise):
            state = generator.start(labels, self.config.guidance)
            for g in range(generator.n_groups):
                d = generator.predict(state)
                generator.commit(
                    state, d.temperature(0.9 if g == 1 else 1).sample(noise.at(position=generator.where(g)))
                )
            return generator.tokens(state), Stats(model_calls=state.calls)

    SAMPLERS.register("biased")(Biased)
    try:
        report = audit_toy(["biased"])
    finally:
        del SAMPLERS._entries["biased"]
    assert len(report.differences) == len(report.lines) == 2
    assert not report.passed
    assert "DIFFERS" in report.text()


def test_exit_codes_and_refusals(capsys):
    assert run(AuditConfig(sampler="ancestral", draws=4000)) == 0
    assert "passed" in capsys.readouterr().out
    with pytest.raises(ValueError, match="no verifier to break"):
        run(AuditConfig(sampler="ancestral", broken="residual"))
    with pytest.raises(ValueError, match="no toy of its kind"):
        run(AuditConfig(sampler="flow"))
    with pytest.raises(ValueError, match="unknown sampler"):
        run(AuditConfig(sampler="nonesuch"))
    with pytest.raises(ValueError, match="name the sampler"):
        run(AuditConfig(target="somewhere"))
    with pytest.raises(ValueError, match="show nothing"):
        run(AuditConfig(draws=10))


def test_an_unbroken_rule_is_itself():
    assert break_rule(len, "") is len


def test_masked_law_is_the_orders():
    """Drawn one by one in an order, the law is that of the raster toy with its tokens renumbered."""
    toy = GaussianAR(GaussianARConfig(tokens=3, channels=1, steps=3, order="masked"))
    n, c = 20_000, ChainConfig(guidance=GUIDED, calls=2)
    trial = Trial("", ChainSampler(c), toy)
    checks, _ = trial.checks(n, 0)
    assert min(k.p for k in checks) > 1e-6
    wrong = toy.law(0, GUIDED, lambda chain: prepare(chain, c), [[0], [1, 2]])
    right = toy.law(0, GUIDED, lambda chain: prepare(chain, c), [[0], [1], [2]])
    assert not torch.allclose(wrong[1], right[1])


def test_levels_of_the_two_sample_tests():
    """Right at the stated rate, and differences are found."""
    rng = np.random.default_rng(1)
    law = rng.dirichlet(np.ones(40))
    p = [check_same_cells("", *(rng.choice(40, 1500, p=law) for _ in range(2))).p for _ in range(150)]
    assert stats.kstest(p, "uniform").pvalue > 1e-4
    off = np.roll(law, 1)
    assert check_same_cells("", rng.choice(40, 1500, p=law), rng.choice(40, 1500, p=off)).p < 1e-9
    x = torch.from_numpy(rng.standard_normal((40, 120, 5)))
    p = [check_energy("", torch.cdist(y, y), 60, permutations=99).p for y in x]
    assert stats.kstest(p, "uniform").pvalue > 1e-4
    apart = x[0] + (torch.arange(120) < 60)[:, None]
    check = check_energy("", torch.cdist(apart, apart), 60)
    assert check.p < 1e-6
    assert check.critical(1e-3) < check.smallest(1e-3) < check.statistic


def test_a_rate_of_acceptance_is_held_against_its_chances():
    rng = np.random.default_rng(2)
    chance = torch.from_numpy(rng.uniform(0.3, 1.0, (200, 3000)))
    hits = torch.from_numpy(rng.uniform(size=(200, 3000))) < chance
    p = [check_share("", h, c).p for h, c in zip(hits, chance, strict=True)]
    assert stats.kstest(p, "uniform").pvalue > 1e-4
    often = torch.from_numpy(rng.uniform(size=3000)) < (1.1 * chance[0]).clamp(max=1)
    assert check_share("", often, chance[0]).p < 1e-6
    assert check_share("", torch.ones(50, dtype=torch.bool), torch.ones(50)).p == 1
    assert check_share("", torch.arange(50) > 0, torch.ones(50)).p == 0

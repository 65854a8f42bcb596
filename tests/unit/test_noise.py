"""Noise: Philox's published answers, and numbers that depend on their address alone."""

import math
import zlib

import pytest
import torch
from scipy import stats

from genlab.noise import Noise, permutation, philox

FALSE_ALARM = 1e-6
"""How often each statistical test here would fail, were its seeds drawn anew; they are fixed."""


def words(hexadecimal):
    return [torch.tensor(int(w, 16)) for w in hexadecimal.split()]


@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [
        ("0 0 0 0", "0 0", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        (" ".join(["ffffffff"] * 4), "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_known_answers_of_random123(counter, key, answer):
    k0, k1 = words(key)
    assert [f"{int(w):08x}" for w in philox(words(counter), (k0, k1))] == answer.split()


def plain_philox(counter, key):
    """The same function on Python's integers, from the paper."""
    c, k = list(counter), list(key)
    for _ in range(10):
        a, b = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [(b >> 32) ^ c[1] ^ k[0], b % 2**32, (a >> 32) ^ c[3] ^ k[1], a % 2**32]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return c


@pytest.mark.parametrize("seed", [0, 17, 2**31, 2**32 + 17, 2**63 - 1, -1])
def test_the_address_of_a_number_never_changes(seed):
    """Images are promised by seed: (block, position, step, purpose) is the counter, the 64-bit seed the key."""
    got = Noise(torch.tensor([seed]), position=5, step=7, purpose="sample").uniform(9)[0]
    key = (seed % 2**32, (seed >> 32) % 2**32)
    want = [w for block in range(3) for w in plain_philox((block, 5, 7, zlib.crc32(b"sample")), key)][:9]
    assert got.tolist() == [(w + 0.5) / 2**32 for w in want]


def test_seeds_of_64_bits_are_all_different():
    seeds = [17, 17 + 2**32, 17 + 2**40, 17 + 2**62, -17, 2**63 - 1]
    numbers = Noise.from_seeds(seeds).uniform(4)
    assert len({tuple(row) for row in numbers.tolist()}) == len(seeds)


def test_seeds_come_as_lists_ranges_and_tensors():
    want = Noise(torch.tensor([3, 4, 5])).uniform(2)
    for seeds in ([3, 4, 5], range(3, 6), torch.tensor([3, 4, 5], dtype=torch.int32)):
        assert torch.equal(Noise.from_seeds(seeds).uniform(2), want)


@pytest.mark.parametrize("other", [{"position": 1}, {"step": 1}, {"purpose": "start"}])
def test_another_address_gives_other_and_independent_numbers(other):
    base = Noise.from_seeds(range(64))
    a, b = base.normal(256), base.at(**other).normal(256)
    assert not (a == b).any()
    assert stats.pearsonr(a.flatten(), b.flatten()).pvalue > FALSE_ALARM


def test_seeds_in_a_row_are_independent():
    x = Noise.from_seeds(range(513)).normal(256)
    assert stats.pearsonr(x[:-1].flatten(), x[1:].flatten()).pvalue > FALSE_ALARM
    assert stats.pearsonr(x[:, :-1].flatten(), x[:, 1:].flatten()).pvalue > FALSE_ALARM


@pytest.mark.parametrize(
    ("draw", "law", "mean", "variance"),
    [
        ("uniform", "uniform", 0.5, 1 / 12),
        ("normal", "norm", 0.0, 1.0),
        ("gumbel", "gumbel_r", 0.5772156649015329, math.pi**2 / 6),
    ],
)
def test_laws(draw, law, mean, variance):
    x = getattr(Noise.from_seeds(range(400)), draw)(500).flatten()
    assert x.dtype == torch.float64
    assert stats.kstest(x.numpy(), law).pvalue > FALSE_ALARM
    bound = stats.norm.isf(FALSE_ALARM / 2)
    assert abs(float(x.mean()) - mean) < bound * (variance / len(x)) ** 0.5
    square = (x - mean) ** 2
    assert abs(float(square.mean()) - variance) < bound * float(square.std()) / len(x) ** 0.5


def test_uniforms_are_inside_the_open_interval(monkeypatch):
    """At the ends of 32 bits: nothing that a logarithm can't take."""
    for word in (0, 2**32 - 1):
        ends = torch.full((1, 4), word)
        monkeypatch.setattr(Noise, "_words", lambda self, n, ends=ends: ends)
        noise = Noise(torch.tensor([0]))
        assert 0 < float(noise.uniform(1)) < 1
        assert noise.gumbel(4).isfinite().all()
        assert noise.normal(4).isfinite().all()


def test_shapes():
    noise = Noise.from_seeds([1, 2, 3])
    assert noise.normal().shape == (3,)
    assert noise.uniform(2, 5).shape == (3, 2, 5)
    assert noise.at(torch.arange(4)).normal(5).shape == (3, 4, 5)
    assert noise.at(torch.arange(12).view(3, 4)).gumbel(5, 2).shape == (3, 4, 5, 2)
    assert noise.at(step=torch.tensor([[1], [2], [3]])).normal(5).shape == (3, 1, 5)
    assert noise.at(torch.arange(4), torch.tensor([[1], [2], [3]])).normal(5).shape == (3, 4, 5)


def test_positions_together_equal_positions_alone():
    noise = Noise.from_seeds([8, 9]).at(step=3, purpose="p")
    where = torch.tensor([[4, 0, 7], [1, 2, 7]])
    together = noise.at(where).normal(5)
    for b in range(2):
        for g in range(3):
            alone = noise.rows(torch.tensor([b])).at(int(where[b, g])).normal(5)
            assert torch.equal(together[b, g], alone[0])
    steps = torch.tensor([[5], [6]])
    assert torch.equal(noise.at(2, steps).normal(3)[1, 0], noise.at(2, 6).normal(3)[1])


def test_rows_take_their_positions_along():
    noise = Noise.from_seeds([5, 6, 7]).at(torch.arange(6).view(3, 2), torch.tensor([[0], [1], [2]]))
    pick = torch.tensor([2, 0])
    assert torch.equal(noise.rows(pick).normal(4), noise.normal(4)[pick])
    assert torch.equal(noise.rows(slice(1, 2)).normal(4), noise.normal(4)[1:2])


@pytest.mark.parametrize("n", [1, 2, 7, 1000])
def test_permutation(n):
    order = permutation(n, seed=3)
    assert sorted(order.tolist()) == list(range(n))
    assert torch.equal(order, permutation(n, seed=3))
    if n == 1000:
        assert not torch.equal(order, permutation(n, seed=4))
        assert not torch.equal(order, permutation(n, seed=3, purpose="split"))
        fixed = int((order == torch.arange(n)).sum())  # Poisson(1) for a uniform order
        assert stats.poisson.sf(fixed - 1, 1) > FALSE_ALARM

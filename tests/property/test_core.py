"""The core under hypothesis: noise by address, tokens, cuts of distributions, configs, checkpoints."""

import dataclasses
import itertools
import string
from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from genlab.commands.shared import numbers
from genlab.config import config, from_dict, to_dict, to_json
from genlab.distributions import Categorical, Gaussian, GaussianMixture
from genlab.hub import SCALE, dequantise
from genlab.noise import Noise, permutation
from genlab.pictures import to_float, to_uint8
from genlab.tokens import Tokens, TokenSpec, concatenate, require_fit

FEW = settings(max_examples=40, deadline=None)
SEEDS = st.integers(-(2**63), 2**63 - 1)
DRAWS = st.sampled_from(["uniform", "normal", "gumbel"])


# -- noise --------------------------------------------------------------------------------------------------


@FEW
@given(
    seeds=st.lists(SEEDS, min_size=1, max_size=6),
    order=st.randoms(use_true_random=False),
    position=st.integers(0, 2**31),
    step=st.integers(0, 1000),
    draw=DRAWS,
)
def test_an_images_noise_ignores_its_batch(seeds, order, position, step, draw):
    """Any order, any company, any batch size: bit for bit the same numbers."""
    take = lambda s: getattr(Noise.from_seeds(s).at(position, step, "p"), draw)(5)  # noqa: E731
    together = dict(zip(seeds, take(seeds), strict=True))
    shuffled = [*order.sample(seeds, len(seeds)), 17]
    for seed, row in zip(shuffled, take(shuffled), strict=True):
        if seed in together:
            assert torch.equal(row, together[seed])
            assert torch.equal(row, take([seed])[0])


@FEW
@given(seed=SEEDS, where=st.lists(st.integers(0, 2**20), min_size=1, max_size=6), draw=DRAWS, n=st.integers(1, 9))
def test_a_positions_noise_ignores_its_group(seed, where, draw, n):
    noise = Noise.from_seeds([seed, 0])
    together = getattr(noise.at(torch.tensor(where)), draw)(n)
    grid = getattr(noise.at(torch.tensor([where, where])), draw)(n)
    assert torch.equal(together, grid)
    for g, position in enumerate(where):
        assert torch.equal(together[:, g], getattr(noise.at(position), draw)(n))
    longer = noise.at(torch.tensor(where)).uniform(n + 4)
    assert torch.equal(longer[..., :n], noise.at(torch.tensor(where)).uniform(n))  # asking for more changes nothing


@FEW
@given(
    a=st.tuples(SEEDS, st.integers(0, 2**31), st.integers(0, 2**31), st.sampled_from("xyz")),
    b=st.tuples(SEEDS, st.integers(0, 2**31), st.integers(0, 2**31), st.sampled_from("xyz")),
)
def test_other_addresses_give_other_numbers(a, b):
    """Four uniforms are one block of Philox, which is a permutation for each key: blocks of one seed never agree."""
    x, y = (Noise.from_seeds([seed], "cpu").at(*rest).uniform(4) for seed, *rest in (a, b))
    assert torch.equal(x, y) == (a == b)


@FEW
@given(n=st.integers(1, 300), seed=SEEDS)
def test_permutations(n, seed):
    assert sorted(permutation(n, seed).tolist()) == list(range(n))


# -- tokens -------------------------------------------------------------------------------------------------


@st.composite
def specs(draw):
    kind = draw(st.sampled_from(["discrete", "residual", "binary", "continuous"]))
    grid = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)))
    return TokenSpec(
        kind=kind,
        grid=grid,
        order=draw(st.sampled_from(["raster", "coarse_to_fine"])),
        vocab=None if kind == "continuous" else draw(st.integers(2, 20)),
        depth=draw(st.integers(1, 4)) if kind in ("residual", "binary") else 1,
        dim=draw(st.integers(1, 5)) if kind == "continuous" else None,
        image_size=draw(st.sampled_from([None, (8, 8), (4, 8, 8)])),
    )


def fill(spec, n):
    if spec.kind == "continuous":
        return Tokens(torch.randn(n, *spec.shape), spec)
    return Tokens(torch.randint(spec.vocab, (n, *spec.shape)), spec)


@FEW
@given(spec=specs(), data=st.data())
def test_cutting_and_joining_tokens(spec, data):
    n = data.draw(st.integers(1, 6))
    tokens = fill(spec, n)
    if spec.order == "coarse_to_fine":
        tokens = tokens.first(torch.tensor(data.draw(st.lists(st.integers(1, spec.length), min_size=n, max_size=n))))
    if spec.kind == "residual":
        depths = data.draw(st.lists(st.integers(1, spec.depth), min_size=n, max_size=n))
        tokens = tokens.first_depths(torch.tensor(depths))
    cuts = [0, *sorted(data.draw(st.sets(st.integers(1, n - 1)) if n > 1 else st.just(set()))), n]
    again = concatenate([tokens[a:b] for a, b in itertools.pairwise(cuts)])
    for name in ("values", "kept", "depths"):
        a, b = getattr(again, name), getattr(tokens, name)
        assert (a is None and b is None) or torch.equal(a, b)


@FEW
@given(a=specs(), b=specs())
def test_fitting_is_equality_but_for_the_image(a, b):
    same = dataclasses.replace(a, image_size=None) == dataclasses.replace(b, image_size=None)
    assert a.fits(b) == b.fits(a) == same
    assert a.fits(dataclasses.replace(a, image_size=(2, 2)))
    if same:
        require_fit("t", a, "g", b)
    else:
        with pytest.raises(ValueError, match="they differ in") as error:
            require_fit("t", a, "g", b)
        assert a.describe() in str(error.value)
        assert b.describe() in str(error.value)


@FEW
@given(spec=specs())
def test_specs_survive_json(spec):
    assert from_dict(TokenSpec, to_dict(spec)) == spec


# -- distributions ------------------------------------------------------------------------------------------

LOGITS = st.lists(st.integers(-4, 4).map(float), min_size=2, max_size=7)  # with ties


@FEW
@given(logits=LOGITS, k=st.integers(0, 8), p=st.floats(0.01, 1.0), tau=st.sampled_from([0.0, 0.3, 1.0, 2.0]))
def test_cuts_keep_the_likeliest(logits, k, p, tau):
    before = Categorical(torch.tensor(logits)[None, None, None])
    for after in (before.top_k(k), before.top_p(p), before.temperature(tau), before.temperature(tau).top_k(k).top_p(p)):
        q = after.probs.flatten()
        assert float(q.sum()) == pytest.approx(1)
        assert float(q[before.logits_BGKV.flatten().argmax()]) > 0
        for i, j in itertools.combinations(range(len(logits)), 2):  # never is a likelier id dropped for a less likely
            if logits[i] > logits[j]:
                assert q[i] >= q[j]
    kept = before.probs.flatten()[before.top_p(p).probs.flatten() > 0].sort().values
    assert float(kept.sum()) >= p - 1e-12
    assert float(kept[1:].sum()) < p  # the smallest such set
    n = int((before.top_k(k).probs > 0).sum())
    assert n == len(logits) if k == 0 else n >= min(k, len(logits))


@FEW
@given(logits=LOGITS, seeds=st.lists(SEEDS, min_size=1, max_size=5), heads=st.integers(1, 3), k=st.integers(0, 3))
def test_drawn_ids_are_possible_ones(logits, seeds, heads, k):
    dist = Categorical(torch.tensor(logits).expand(len(seeds), 2, heads, -1)).top_k(k)
    ids = dist.sample(Noise.from_seeds(seeds).at(torch.tensor([3, 9])))
    assert ids.shape == (len(seeds), 2, heads)
    assert dist.log_prob(ids).isfinite().all()
    assert (dist.log_prob(dist.mode()) >= dist.log_prob(ids)).all()


@FEW
@given(C=st.integers(1, 4), M=st.integers(1, 4), shift=st.floats(-3, 3), seed=st.integers(0, 1000))
def test_mixture_density_moves_with_its_means(C, M, shift, seed):
    stream = torch.Generator().manual_seed(seed)
    logits, mean, x = (torch.randn(s, generator=stream).double() for s in ((1, 2, M), (1, 2, M, C), (1, 2, C)))
    std = torch.rand(1, 2, M, C, generator=stream).double() + 0.2
    base = GaussianMixture(logits, mean, std).log_prob(x)
    assert torch.allclose(GaussianMixture(logits + 5, mean + shift, std).log_prob(x + shift), base)
    one = Gaussian(mean[:, :, 0], std[:, :, 0]).log_prob(x)
    alone = GaussianMixture(logits[..., :1], mean[:, :, :1], std[:, :, :1]).log_prob(x)
    assert torch.allclose(alone, one)


# -- configs, numbers, pictures, weights --------------------------------------------------------------------


@config
class Inner:
    """Nested."""

    kind: Literal["inner"] = "inner"
    size: int = 3


@config
class Outer:
    """All that configs hold."""

    name: str = ""
    rate: float = 0.0
    many: tuple[int, ...] = ()
    inner: Inner | None = None
    on: bool = False


OUTER = st.builds(
    Outer,
    name=st.text(),
    rate=st.floats(allow_nan=False, allow_infinity=False),
    many=st.lists(st.integers()).map(tuple),
    inner=st.none() | st.builds(Inner, size=st.integers()),
    on=st.booleans(),
)


@FEW
@given(value=OUTER, key=st.text(string.ascii_letters, min_size=1))
def test_configs_survive_json_and_refuse_the_unknown(value, key):
    import json

    assert from_dict(Outer, json.loads(to_json(value))) == value
    if key not in to_dict(value):
        with pytest.raises(ValueError, match=rf"  {key}: "):
            from_dict(Outer, {**to_dict(value), key: 1})


@FEW
@given(parts=st.lists(st.integers(0, 50) | st.tuples(st.integers(0, 50), st.integers(0, 9)), min_size=1, max_size=5))
def test_ranges_read_back(parts):
    text = ",".join(f"{p[0]}-{p[0] + p[1]}" if isinstance(p, tuple) else str(p) for p in parts)
    want = [i for p in parts for i in (range(p[0], p[0] + p[1] + 1) if isinstance(p, tuple) else [p])]
    assert numbers(text) == want


@FEW
@given(text=st.text(string.digits + "-, x", max_size=8))
def test_odd_ranges_raise_only_what_the_command_line_reports(text):
    try:
        found = numbers(text)
    except ValueError as error:
        assert "expected e.g. 0-15" in str(error)  # noqa: PT017
    else:
        assert found
        assert min(found) >= 0


@FEW
@given(values=st.lists(st.integers(0, 255), min_size=1, max_size=20))
def test_pixels_come_back(values):
    x = torch.tensor(values, dtype=torch.uint8)
    assert torch.equal(to_uint8(to_float(x)), x)


@FEW
@given(rows=st.integers(1, 5), columns=st.integers(1, 5), scale=st.floats(1e-6, 1e6), seed=st.integers(0, 100))
def test_int8_storage_is_within_half_a_step(tmp_path_factory, rows, columns, scale, seed):
    from safetensors.torch import load_file

    from genlab.hub import WEIGHTS, Model

    class One(Model):
        kind = "one"

        def __init__(self):
            super().__init__(Inner())
            self.weight = nn.Parameter(torch.randn(rows, columns) * scale)

    torch.manual_seed(seed)
    model = One()
    folder = model.save_pretrained(tmp_path_factory.mktemp("int8") / "one", dtype=torch.int8)
    stored = load_file(folder / WEIGHTS)
    assert set(stored) == {"weight", "weight" + SCALE}
    got, want = dequantise(stored)["weight"], model.weight.detach()
    step = want.abs().amax(1, keepdim=True) / 127
    assert ((got - want).abs() <= 0.501 * step + 1e-12).all()

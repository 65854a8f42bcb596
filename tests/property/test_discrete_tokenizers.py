"""Codes and their usage, for any sizes."""

from types import SimpleNamespace

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from genlab.tokens import Tokens, TokenSpec
from tokenizers_img.bae import BAE
from tokenizers_img.msvq import MultiScaleQuantiser
from tokenizers_img.usage import codebook_usage, whole_codes

FEW = settings(max_examples=30, deadline=None)


@FEW
@given(k=st.integers(1, 4), d=st.integers(1, 12), side=st.integers(1, 3), seed=st.integers(0, 2**31))
def test_ids_and_bits_are_the_same_thing(k, d, side, seed):
    weight = torch.zeros(1)
    model = SimpleNamespace(
        config=SimpleNamespace(sub_tokens=k, bits=d, side=side),
        encoder=SimpleNamespace(conv_in=SimpleNamespace(weight=weight)),
    )
    ids = torch.randint(2**d, (2, side * side, k), generator=torch.Generator().manual_seed(seed))
    bits = BAE.to_bits(model, ids)
    assert bits.shape == (2, k * d, side, side)
    assert torch.equal(BAE.to_ids(model, bits), ids)
    # the bits of a place, read in a row, are the number that the whole code is
    place = bits[0, :, 0, 0].long().tolist()
    assert int("".join(map(str, place)), 2) == int(whole_codes(ids, 2**d)[0, 0])


@FEW
@given(
    ids=st.lists(st.integers(0, 15), min_size=2, max_size=40),
    cut=st.integers(1, 39),
    shift=st.integers(0, 15),
)
def test_usage_depends_on_counts_alone(ids, cut, shift):
    def measure(*parts):
        tokens = [Tokens(torch.tensor([p]), TokenSpec(kind="discrete", grid=(len(p),), vocab=16)) for p in parts if p]
        return codebook_usage(tokens)

    whole = measure(ids)
    assert whole["used"] == len(set(ids))
    assert 1 - 1e-9 <= whole["perplexity"] <= whole["used"] + 1e-9
    for other in (measure(ids[:cut], ids[cut:]), measure([(i + shift) % 16 for i in reversed(ids)])):
        assert abs(other["perplexity"] - whole["perplexity"]) < 1e-9
        assert other["used"] == whole["used"]


@FEW
@given(
    sides=st.lists(st.integers(1, 6), min_size=2, max_size=4, unique=True),
    phis=st.integers(0, 4),
    seed=st.integers(0, 99),
)
@torch.no_grad()
def test_what_a_scale_reads_depends_on_the_scales_before_it(sides, phis, seed):
    torch.manual_seed(seed)
    sides = sorted(sides)
    q = MultiScaleQuantiser(codes=7, dim=3, scales=tuple((s, s) for s in sides), phis=phis)
    ids = torch.randint(7, (1, sum(q.lengths)))
    base = q.next_scale_input(ids)
    assert base.shape == (1, sum(q.lengths[1:]), 3)
    scale = seed % len(sides)
    other = ids.clone()
    begin = sum(q.lengths[:scale])
    other[:, begin : begin + q.lengths[scale]] = (other[:, begin : begin + q.lengths[scale]] + 1) % 7
    unchanged = sum(q.lengths[1 : scale + 1])
    assert torch.equal(q.next_scale_input(other)[:, :unchanged], base[:, :unchanged])
    # the maps that quantising tells of are those that its ids stand for
    found, maps = q(q.maps(ids)[-1])
    for told, stood in zip(maps, q.maps(found), strict=True):
        torch.testing.assert_close(told, stood)

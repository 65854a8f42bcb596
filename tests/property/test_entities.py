"""Entity maps partition the grid in the order they promise; ECAR's jumps keep noise white; pixels come back."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from genlab.generators.ecar import ECAR, ECARConfig, Jump
from genlab.generators.xar import XAR, XARConfig, entity_groups
from genlab.hub import from_pretrained
from genlab.noise import Noise
from tokenizers_img.pixels import Pixels, PixelsConfig

ODD = settings(max_examples=40, deadline=None)


def tiny(**sizes):
    return XARConfig(channels=2, num_classes=2, dim=8, encoder_depth=1, decoder_depth=1, heads=2, **sizes)


@ODD
@given(
    entity=st.sampled_from(["patch", "cell", "subsample", "image"]),
    k=st.integers(1, 4),
    rows=st.integers(1, 4),
    columns=st.integers(1, 4),
)
def test_groups_partition_the_grid(entity, k, rows, columns):
    h, w = k * rows, k * columns
    groups = entity_groups(tiny(grid=(h, w), entity=entity, size=k))
    assert torch.cat(groups).sort().values.tolist() == list(range(h * w))
    corners = [int(g[0]) for g in groups]
    assert corners == sorted(corners)  # raster order of the groups' first tokens
    for g in groups:
        assert g.tolist() == sorted(g.tolist())  # and of tokens inside a group
        y, x = g // w, g % w
        if entity == "cell":
            assert (int(y.max() - y.min()), int(x.max() - x.min())) == (k - 1, k - 1)
        if entity == "subsample":
            assert {(int(a) % k, int(b) % k) for a, b in zip(y, x, strict=True)} == {(int(y[0]), int(x[0]))}
    count = {"patch": h * w, "image": 1, "cell": rows * columns, "subsample": k * k}[entity]
    assert len(groups) == count
    assert len({len(g) for g in groups}) == 1


@ODD
@given(
    entity=st.sampled_from(["patch", "cell", "subsample", "image", "scale"]), k=st.integers(1, 3), seed=st.integers(0)
)
def test_pack_and_unpack_are_inverse(entity, k, seed):
    side = 2 * k
    scales = tuple(sorted({1, k, side})) if entity == "scale" else ()
    model = XAR(tiny(grid=(side, side), entity=entity, size=k, scales=scales))
    x = Noise(torch.tensor([seed % 2**62])).normal(side * side, 2).float()
    packed = model.pack(x)
    assert torch.equal(model.unpack(packed), x)
    spans = [model.where(g) for g in range(model.n_groups)]
    assert sorted(torch.cat(spans).tolist()) == list(range(model.N))
    if entity == "scale":  # a coarser map is the area average
        assert torch.allclose(packed[:, 0], x.mean(1), atol=1e-5) or scales[0] != 1
    else:
        assert torch.equal(packed, x[:, torch.cat(spans)])


@pytest.mark.parametrize(
    "sizes", [{"entity": "cell", "size": 3}, {"entity": "scale", "scales": (2, 2, 4)}, {"entity": "scale"}]
)
def test_grids_that_cant_be_cut_are_refused(sizes):
    with pytest.raises(ValueError, match=r"cut into|rising"):
        entity_groups(tiny(grid=(4, 4), **sizes))


@ODD
@given(f=st.integers(2, 4), level=st.floats(0.05, 0.95), share=st.floats(0.05, 1.0))
def test_a_jump_leads_to_white_noise_and_one_signal(f, level, share):
    """Covariance of the noise behind a jump, and the signal's factor, in closed form over one block."""
    jump = Jump(f, level, share / (f * f - 1))
    assert level < jump.begin < 1
    assert jump.scale * (1 - level) == pytest.approx(1 - jump.begin)
    n = f * f
    coarse = level * jump.scale * jump.repeat(torch.ones(1, 1, 1, dtype=torch.float64))[0]  # (n, 1)
    added = jump.noise(torch.eye(n, dtype=torch.float64)[:, :, None])[:, :, 0].T  # columns: response to each z
    covariance = coarse @ coarse.T + added @ added.T
    assert torch.allclose(covariance, jump.begin**2 * torch.eye(n, dtype=torch.float64), atol=1e-12)


@pytest.mark.parametrize(("f", "level", "begin"), [(2, 2 / 3, 0.8), (2, 1 / 3, 0.5)])
def test_jumps_of_pyramid_flow(f, level, begin):
    assert Jump(f, level, 1 / 3).begin == pytest.approx(begin)


@ODD
@given(
    sides=st.sampled_from([(2, 4), (1, 4), (1, 2, 4), (2, 4, 8), (1, 3, 6)]),
    share=st.sampled_from([0.9, 0.5]),
    drop=st.floats(0.4, 0.8),
)
def test_ecar_lines_join(sides, share, drop):
    """A stage's line starts where the jump leads and ends at its partly clean map; `eps` finds the new noise."""
    ends = (*(drop ** (i + 1) for i in range(len(sides) - 1)), 0.0)
    most = min(1 / ((b // a) ** 2 - 1) for a, b in zip(sides, sides[1:], strict=False))
    c = ECARConfig(grid=(sides[-1],) * 2, channels=2, num_classes=2, sides=sides, ends=ends, gamma=share * most, dim=8,
                   context_depth=1, flow_depth=1, heads=2, steps=(1,) * len(sides))  # fmt: skip
    model = ECAR(c)
    tokens = torch.randn(2, sides[-1] ** 2, 2, dtype=torch.float64)
    lines = model.ends_of(tokens, Noise(torch.tensor([0, 1])))
    assert torch.allclose(lines[-1][1], tokens)  # the last stage ends at the data
    state = model.start(torch.tensor([0, 1]))
    for s, (start, end) in enumerate(lines):
        flow = model.predict(state)
        if s:
            z = Noise(torch.tensor([0, 1])).at(step=s, purpose="noise").normal(sides[s] ** 2, 2)
            assert torch.allclose(flow.start.at(z), start)
            width = model.begins[s] - ends[s]
            jump = model.jumps[s - 1]
            new = z - jump.block_mean(z) + jump.block_mean(z) / jump.fresh
            grid = tokens.unflatten(1, (sides[-1],) * 2).permute(0, 3, 1, 2)
            clean = F.adaptive_avg_pool2d(grid, sides[s]).flatten(2).transpose(1, 2)
            noise = (start - (1 - jump.begin) * jump.block_mean(clean)) / jump.begin
            assert torch.allclose(end, (1 - ends[s]) * clean + ends[s] * noise)
            for u in (0.2, 0.7):  # from a point of the line and the line's velocity, `eps` finds what the jump added
                x, v = end + u * (start - end), (start - end) / width
                assert torch.allclose(flow.eps(x, v, ends[s] + u * width), new)
        model.commit(state, end)
    assert torch.allclose(model.tokens(state).values.double(), tokens, atol=1e-6)


@ODD
@given(side=st.integers(1, 4), patch=st.integers(1, 4), batch=st.integers(1, 3))
def test_pixels_come_back(side, patch, batch):
    tokenizer = Pixels(PixelsConfig(image_size=side * patch, patch=patch))
    images = torch.rand(batch, 3, side * patch, side * patch) * 2 - 1
    tokens = tokenizer.encode(images)
    assert tokens.values.shape == (batch, side * side, 3 * patch * patch)
    assert torch.equal(tokenizer.decode(tokens), images)
    first = tokens.values[0, 0].view(3, patch, patch)
    assert torch.equal(first, images[0, :, :patch, :patch])


def test_pixels_are_saved_and_refuse(tmp_path):
    tokenizer = Pixels(PixelsConfig(image_size=8, patch=4))
    tokenizer.save_pretrained(tmp_path / "pixels")
    again = from_pretrained(tmp_path / "pixels")
    images = torch.rand(2, 3, 8, 8)
    assert torch.equal(again.encode(images).values, tokenizer.encode(images).values)
    with pytest.raises(ValueError, match="multiple of the patch"):
        Pixels(PixelsConfig(image_size=8, patch=3))
    with pytest.raises(ValueError, match="takes images"):
        tokenizer.encode(torch.rand(2, 3, 9, 9))
    assert math.prod(tokenizer.spec.shape) == 3 * 64

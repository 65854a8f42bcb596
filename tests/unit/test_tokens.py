"""Tokens and their spec: what fits, what is refused, and what the message says."""

import pytest
import torch

from genlab.tokens import Tokens, TokenSpec, concatenate, require_fit

SPECS = {
    "discrete": TokenSpec(kind="discrete", grid=(4, 4), vocab=16),
    "residual": TokenSpec(kind="residual", grid=(2, 3), vocab=8, depth=5),
    "binary": TokenSpec(kind="binary", grid=(4,), vocab=2, depth=6),
    "continuous": TokenSpec(kind="continuous", grid=(2, 2), dim=3, image_size=(16, 16)),
    "scale": TokenSpec(kind="discrete", grid=(4, 4), order="scale", vocab=16, scales=((1, 1), (2, 2), (4, 4))),
    "ordered": TokenSpec(kind="discrete", grid=(8,), order="coarse_to_fine", vocab=16),
    "clip": TokenSpec(kind="continuous", grid=(5, 2, 2), dim=4, image_size=(17, 16, 16)),
}
SHAPES = {
    "discrete": (16,),
    "residual": (6, 5),
    "binary": (4, 6),
    "continuous": (4, 3),
    "scale": (21,),
    "ordered": (8,),
    "clip": (20, 4),
}


def some(name, batch=3):
    spec = SPECS[name]
    if spec.kind == "continuous":
        return Tokens(torch.randn(batch, *spec.shape), spec)
    return Tokens(torch.randint(spec.vocab, (batch, *spec.shape)), spec)


@pytest.mark.parametrize("name", list(SPECS))
def test_shapes_and_descriptions(name):
    spec = SPECS[name]
    assert spec.shape == SHAPES[name]
    assert spec.length == SHAPES[name][0]
    text = spec.describe()
    assert spec.kind in text
    assert "x".join(map(str, spec.grid)) in text
    assert len({s.describe() for s in SPECS.values()}) == len(SPECS)


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"kind": "discrete", "grid": (), "vocab": 2}, r"positive axes, got \(\)"),
        ({"kind": "discrete", "grid": (4, 0), "vocab": 2}, r"positive axes, got \(4, 0\)"),
        ({"kind": "discrete", "grid": (4,)}, "discrete TokenSpec needs vocab, not dim"),
        ({"kind": "discrete", "grid": (4,), "vocab": 2, "dim": 3}, "needs vocab, not dim.*dim=3"),
        ({"kind": "continuous", "grid": (4,)}, "continuous TokenSpec needs dim, not vocab"),
        ({"kind": "continuous", "grid": (4,), "dim": 3, "vocab": 2}, "needs dim, not vocab.*vocab=2"),
        ({"kind": "discrete", "grid": (4,), "vocab": 2, "order": "scale"}, "go together"),
        ({"kind": "discrete", "grid": (4, 4), "vocab": 2, "scales": ((1, 1), (4, 4))}, "go together"),
        ({"kind": "discrete", "grid": (4,), "vocab": 2, "depth": 3}, "discrete TokenSpec has depth 1, got 3"),
        ({"kind": "continuous", "grid": (4,), "dim": 2, "depth": 3}, "continuous TokenSpec has depth 1, got 3"),
    ],
)
def test_odd_specs_are_refused(fields, match):
    with pytest.raises(ValueError, match=match):
        TokenSpec(**fields)


@pytest.mark.parametrize("name", list(SPECS))
def test_tokens_of_another_shape_or_dtype_are_refused(name):
    spec, values = SPECS[name], some(name).values
    with pytest.raises(ValueError, match=r"tokens of shape \(3, .* needs \(B, ") as error:
        Tokens(values[:, :-1], spec)
    assert spec.describe() in str(error.value)
    with pytest.raises(ValueError, match="tokens of shape"):
        Tokens(values[0], spec)
    wrong = values.long() if spec.kind == "continuous" else values.float()
    with pytest.raises(ValueError, match=f"{spec.kind} tokens can't have dtype torch.{str(wrong.dtype)[6:]}"):
        Tokens(wrong, spec)


def test_ids_become_long():
    tokens = Tokens(some("discrete").values.to(torch.uint8), SPECS["discrete"])
    assert tokens.values.dtype == torch.long


def test_fit_ignores_the_image_size_alone():
    a = TokenSpec(kind="continuous", grid=(2, 2), dim=3)
    assert a.fits(SPECS["continuous"])
    assert SPECS["continuous"].fits(a)
    require_fit("t", SPECS["continuous"], "g", a)
    names = list(SPECS)
    assert not any(SPECS[x].fits(SPECS[y]) for x in names for y in names if x != y)


@pytest.mark.parametrize(
    ("change", "differs"),
    [
        ({"grid": (3, 3)}, "grid"),
        ({"dim": 4}, "dim"),
        ({"kind": "discrete", "dim": None, "vocab": 4}, "kind, vocab, dim"),
    ],
)
def test_a_pair_that_doesnt_fit_is_named(change, differs):
    given = SPECS["continuous"]
    wanted = TokenSpec(**{**vars(given), "image_size": None, **change})
    with pytest.raises(ValueError, match=rf"they differ in {differs}\)") as error:
        require_fit("my-vae", given, "my-xar", wanted)
    message = str(error.value)
    assert "'my-vae'" in message
    assert "'my-xar'" in message
    assert given.describe() in message
    assert wanted.describe() in message
    assert "genlab list" in message


def test_first_keeps_a_number_a_row():
    tokens = some("ordered")
    assert tokens.kept is None
    assert tokens.first(3).kept.tolist() == [3, 3, 3]
    cut = tokens.first(torch.tensor([1, 8, 4]))
    assert cut.kept.tolist() == [1, 8, 4]
    assert torch.equal(cut.values, tokens.values)
    assert cut[1:].kept.tolist() == [8, 4]
    assert cut[[2, 0]].kept.tolist() == [4, 1]
    assert len(cut[torch.tensor([1])]) == 1


@pytest.mark.parametrize("k", [0, 9, torch.tensor([1, 2, 9]), torch.tensor([0, 2, 3])])
def test_first_outside_is_refused(k):
    with pytest.raises(ValueError, match="can keep 1 to 8 positions, asked for"):
        some("ordered").first(k)


def test_only_coarse_to_fine_tokens_have_a_beginning():
    with pytest.raises(ValueError, match=r"only coarse-to-fine tokens.*discrete 4x4 raster"):
        some("discrete").first(2)


def test_first_depths():
    tokens = some("residual")
    assert tokens.first_depths(2).depths.tolist() == [2, 2, 2]
    rows = tokens.first_depths(torch.tensor([5, 1, 3]))
    assert rows.depths.tolist() == [5, 1, 3]
    assert rows[[1]].depths.tolist() == [1]
    assert rows.first_depths(4).depths.tolist() == [4, 1, 3]  # what was left out stays out
    for d in (0, 6):
        with pytest.raises(ValueError, match="can keep 1 to 5 depths"):
            tokens.first_depths(d)
    with pytest.raises(ValueError, match="only residual tokens have depths"):
        some("binary").first_depths(1)


def test_concatenate_undoes_slicing():
    tokens = some("residual", 5)
    parts = [tokens[:2], tokens[2:3], tokens[3:]]
    joined = concatenate(parts)
    assert torch.equal(joined.values, tokens.values)
    assert joined.kept is None
    assert joined.depths is None
    mixed = concatenate([parts[0].first_depths(2), parts[1], parts[2].first_depths(torch.tensor([1, 4]))])
    assert mixed.depths.tolist() == [2, 2, 5, 1, 4]
    ordered = some("ordered")
    assert concatenate([ordered, ordered.first(2)]).kept.tolist() == [8, 8, 8, 2, 2, 2]


def test_concatenate_refuses():
    with pytest.raises(ValueError, match="no tokens"):
        concatenate([])
    with pytest.raises(ValueError, match=r"can't join discrete 8 coarse_to_fine.* to residual 2x3"):
        concatenate([some("residual"), some("ordered")])


def test_moving_keeps_everything():
    tokens = some("ordered").first(3).to("cpu")
    assert tokens.kept.tolist() == [3, 3, 3]
    meta = some("residual").first_depths(2).to("meta")
    assert meta.values.device.type == meta.depths.device.type == "meta"


@pytest.mark.parametrize("bad", [-1, 16, 99])
def test_ids_outside_the_vocabulary_are_refused(bad):
    values = torch.zeros(2, 4, dtype=torch.long)
    values[1, 2] = bad
    with pytest.raises(ValueError, match=r"ids must be in 0\.\.15, got"):
        Tokens(values, TokenSpec(kind="discrete", grid=(2, 2), vocab=16))
    assert len(Tokens(values[:0], TokenSpec(kind="discrete", grid=(2, 2), vocab=16))) == 0

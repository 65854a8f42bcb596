"""Drawing the rest of an image: what is given stays, whatever the generator and sampler."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from genlab.cli import main
from genlab.commands.inpaint import some
from genlab.generators.elm import ELM, ELMConfig, ELMMasked, ELMMaskedConfig
from genlab.generators.flexar import FlexAR, FlexARConfig
from genlab.generators.llamagen import LlamaGen, LlamaGenConfig
from genlab.generators.mar import MAR, MARConfig
from genlab.generators.resgen import ResGen, ResGenConfig
from genlab.generators.rq_transformer import RQTransformer, RQTransformerConfig
from genlab.generators.var import VAR, VARConfig
from genlab.generators.xar import XAR, XARConfig
from samplers import default_sampler
from samplers.speculative_jacobi import SpeculativeJacobiSampler
from tokenizers_img.rvq import RVQ, RVQConfig

SMALL = {"num_classes": 3, "dim": 32, "depth": 1, "heads": 2}
LABELS, SEEDS = torch.tensor([0, 2, 3]), torch.tensor([5, 6, 7])


def make(kind: str):
    torch.manual_seed(0)
    if kind.startswith("mar"):
        order = kind.partition("-")[2] or "masked"
        sizes = {"encoder_depth": 1, "decoder_depth": 1, "head_width": 16, "head_depth": 1, "head_steps": 4}
        return MAR(
            MARConfig(grid=(4, 4), channels=3, num_classes=3, dim=32, heads=2, buffer=2, order=order, **sizes)
        ).eval()
    if kind.startswith("xar"):
        size = {"cell": {"size": 2}, "image": {}}[kind[4:]]
        return XAR(
            XARConfig(grid=(4, 4), channels=3, num_classes=3, dim=32, encoder_depth=1, decoder_depth=1, heads=2,
                      entity=kind[4:], **size)
        ).eval()  # fmt: skip
    if kind == "resgen":
        c = RVQConfig(
            image_size=16, patch=4, channels=(32,), layers=1, features=32, attention_levels=(), codes=8, dim=4, depth=3
        )
        model = ResGen(ResGenConfig(grid=(4, 4), vocab=8, codes_depth=3, code_dim=4, mixtures=3, rank=2, **SMALL))
        model.adopt(RVQ(c))
        return model.eval()
    model = {
        "llamagen": lambda: LlamaGen(LlamaGenConfig(grid=(4, 4), vocab=11, **SMALL)),
        "elm": lambda: ELM(ELMConfig(grid=(4, 4), sub_tokens=2, bits=3, **SMALL)),
        "elm_masked": lambda: ELMMasked(ELMMaskedConfig(grid=(4, 4), sub_tokens=2, bits=3, **SMALL)),
    }[kind]()
    return model.eval()


ANY = ("mar", "elm_masked", "resgen")
ORDERED = ("llamagen", "elm", "mar-raster", "xar-cell")


def some_values(model) -> torch.Tensor:
    spec = model.spec
    shape = (3, *spec.shape)
    torch.manual_seed(1)
    return torch.randn(shape) if spec.kind == "continuous" else torch.randint(0, spec.vocab, shape)


@pytest.mark.parametrize("kind", ANY + ORDERED)
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_what_is_given_stays_and_nothing_else_is(kind, share):
    model, sampler = make(kind), default_sampler(make(kind))
    values = some_values(model)
    known = torch.zeros(3, 16, dtype=torch.bool)
    if kind in ANY:
        known = torch.rand(3, 16).argsort(-1).argsort(-1) < round(16 * share)
    else:
        for g in range(round(model.n_groups * share)):
            known[:, model.where(g)] = True
    drawn = sampler.sample(model, LABELS, SEEDS, known=(values, known)).tokens.values
    stays = (drawn == values).reshape(3, 16, -1).all(-1)
    assert bool(stays[known].all())
    if share == 0.5:
        assert not bool(stays[~known].all())
    plain = sampler.sample(model, LABELS, SEEDS).tokens.values
    assert torch.equal(drawn, plain if share == 0 else values) or share == 0.5


def test_the_rest_depends_on_what_is_given():
    model = make("elm_masked")
    sampler, known = default_sampler(model), torch.arange(16).expand(3, 16) < 8
    a, b = (
        sampler.sample(model, LABELS, SEEDS, known=(torch.full((3, 16, 2), v), known)).tokens.values for v in (1, 6)
    )
    assert not torch.equal(a[:, 8:], b[:, 8:])


@pytest.mark.parametrize("kind", ORDERED)
def test_a_hole_needs_a_generator_of_any_order(kind):
    model, known = make(kind), torch.ones(3, 16, dtype=torch.bool)
    known[:, 0] = False
    with pytest.raises(ValueError, match="group 0 is not given"):
        default_sampler(model).sample(model, LABELS, SEEDS, known=(some_values(model), known))


def test_refusals():
    model, known = make("elm_masked"), torch.rand(3, 16) < 0.5
    known[0], known[1] = True, False
    with pytest.raises(ValueError, match="as many tokens must be given in each row"):
        default_sampler(model).sample(model, LABELS, SEEDS, known=(some_values(model), known))
    values = some_values(model)
    for rows in ((values[:2], known[:2]), (values.repeat(2, 1, 1), known), (values[:2], known.repeat(2, 1))):
        with pytest.raises(ValueError, match="given for 3 images: expected"):
            default_sampler(model).sample(model, LABELS, SEEDS, known=rows)
    whole = torch.ones(3, 16, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"ids must be in 0\.\.7, got 99 to 99"):
        default_sampler(model).sample(model, LABELS, SEEDS, known=(torch.full((3, 16, 2), 99), whole))
    model = make("llamagen")
    with pytest.raises(ValueError, match="draws whole images only; these complete one: ancestral"):
        SpeculativeJacobiSampler().sample(model, LABELS, SEEDS, known=(some_values(model), known))
    whole = VAR(VARConfig(scales=(1, 2), vocab=8, code_dim=4, **SMALL))
    with pytest.raises(ValueError, match="draws whole maps"):
        whole.hold(None, torch.zeros(3, 5, dtype=torch.long), torch.zeros(3, 5, dtype=torch.bool))


def test_the_command_completes_a_picture(tmp_path, capsys):
    picture = tmp_path / "p.png"
    Image.new("RGB", (90, 64), (200, 30, 30)).save(picture)
    command = ["inpaint", "xar-cell-emoji64", str(picture), "--seeds", "0-1", "--set", "steps=2"]
    assert main([*command, "--box", "0,32,64,64", "--label", "flags", "--grid", str(tmp_path / "g.png")]) == 0
    assert "kept 32 of 64 tokens" in capsys.readouterr().out
    with Image.open(tmp_path / "g.png") as out:
        assert out.size == (4 * 132 + 4, 136)
        assert out.getpixel((2 * 132 + 20, 20)) == (200, 30, 30)  # the picture's own pixels
    for wrong, words in (
        (["--box", "0,0,32,32"], "group 0 is not given"),
        (["--box", "0,0,99,32"], "within 0 and 64"),
        (["--share", "1.5"], "above 0 and below 1"),
        ([], "say what to draw anew"),
        (["--share", "0.1"], "--share 0.1 is none of the 4 parts that this xar draws: give 0.25 to 0.75"),
        (["--share", "0.95"], "--share 0.95 is all of the 4 parts"),
        (["--box", "0,32,64,64", "--label", "0-3"], "--label takes one class, got '0-3': 4 of them"),
        (["--box", "0,32,64,64", "--zoom", "0"], "--zoom must be at least 1"),
        (["--box", "0,32,64,64", "--prompt", "a cat"], "draws by class"),
    ):
        assert main([*command, *wrong]) == 2
        assert words in capsys.readouterr().err
    assert main(["inpaint", "var-emoji64", str(picture), "--box", "0,32,64,64"]) == 2
    assert "draws whole maps" in capsys.readouterr().err
    assert main(["inpaint", "divot_lm-emoji64", str(picture), "--share", "0.5"]) == 2
    assert "is a model of clips" in capsys.readouterr().err


def test_a_share_of_stacked_codes_is_whole_positions():
    sizes = {"num_classes": 3, "dim": 32, "depth": 1, "heads": 2}
    for style in ("stack", "flat"):
        model = RQTransformer(RQTransformerConfig(grid=(2, 2), vocab=8, codes_depth=3, style=style, **sizes))
        assert some(model, 0.5, torch.arange(2)).tolist() == [[True, True, False, False]] * 2


@pytest.mark.parametrize("kind", ANY + ORDERED)
def test_an_image_is_seen_as_it_forms(kind):
    model, values = make(kind), some_values(make(kind))
    state = model.start(LABELS)
    nothing = model.peek(state)
    half = torch.zeros(3, 16, dtype=torch.bool)
    for g in range(model.n_groups // 2):
        half[:, model.where(g)] = True
    model.hold(state, values, half)
    so_far = model.peek(state).values.reshape(3, 16, -1)
    assert torch.equal(so_far[half], values.reshape(3, 16, -1)[half])
    assert bool((so_far[~half] == 0).all())
    assert not bool(nothing.values.any())  # a copy
    with pytest.raises(ValueError, match=r"missing|are committed"):
        model.tokens(state)


def test_of_ordered_tokens_the_first_are_seen_and_whole_maps_are_not():
    model = FlexAR(FlexARConfig(grid=(1, 8), vocab=11, **SMALL))
    state = model.start(LABELS)
    model.commit(state, torch.ones(3, 1, 1, dtype=torch.long))
    model.commit(state, torch.ones(3, 1, 1, dtype=torch.long))
    assert model.peek(state).kept.tolist() == [2, 2, 2]
    whole = VAR(VARConfig(scales=(1, 2), vocab=8, code_dim=4, **SMALL))
    with pytest.raises(ValueError, match="whole maps"):
        whole.peek(None)
    first = FlexAR(FlexARConfig(grid=(1, 8), vocab=11, **SMALL)).first(3)
    state = first.start(LABELS)
    first.hold(state, torch.ones(3, 8, dtype=torch.long), torch.arange(8).expand(3, 8) < 2)
    assert first.peek(state).kept.tolist() == [2, 2, 2]

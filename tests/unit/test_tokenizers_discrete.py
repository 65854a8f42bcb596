"""VQ, BAE and multi-scale VQ: codes, gradients, starts, usage, conversion."""

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open

from genlab.convert.bae import convert_bae
from genlab.convert.msvq import convert_msvq
from genlab.convert.vq import convert_vq
from genlab.hub import from_pretrained
from genlab.noise import Noise
from genlab.tokens import Tokens, TokenSpec
from tests.parity.fill import fill
from tokenizers_img import bae
from tokenizers_img.bae import BAE, BAEConfig
from tokenizers_img.codebook import lloyd, nearest
from tokenizers_img.losses import AutoencoderLoss, AutoencoderLossConfig
from tokenizers_img.msvq import MSVQ, MSVQConfig
from tokenizers_img.usage import codebook_usage, perplexity, whole_codes
from tokenizers_img.vq import VQ, VQConfig, entropy_loss
from train.presets import PRESETS
from train.tasks import freeze, load_initial

CASES = Path(__file__).parents[1] / "parity" / "cases"
SIZES = {
    "image_size": 16,
    "patch": 2,
    "channels": (8, 16),
    "layers": 1,
    "decoder_layers": 1,
    "features": 8,
    "norm_groups": 4,
    "attention_levels": (1,),
}
CONFIGS = {
    "vq": VQConfig(**SIZES, codes=32, dim=4),
    "bae": BAEConfig(**SIZES, sub_tokens=2, bits=3),
    "msvq": MSVQConfig(**SIZES, codes=32, dim=4, scales=(1, 2, 4), phis=2),
}
CLASSES = {"vq": VQ, "bae": BAE, "msvq": MSVQ}
SHAPES = {"vq": (16,), "bae": (16, 2), "msvq": (21,)}
EVERY = pytest.mark.parametrize("kind", list(CONFIGS))


def build(kind, seed=0, **changes):
    torch.manual_seed(seed)
    config = CONFIGS[kind]
    return CLASSES[kind](type(config)(**{**vars(config), **changes})).eval()


def pictures(n, size=16, seed=0):
    """Smooth random pictures with a white border."""
    g = torch.Generator().manual_seed(seed)
    x = F.interpolate(torch.rand(n, 3, 5, 5, generator=g) * 2 - 1, size=(size, size), mode="bicubic").clamp(-1, 1)
    return F.pad(x[..., 2:-2, 2:-2], (2, 2, 2, 2), value=1.0)


# -- what every tokenizer does ---------------------------------------------------------------------------------------


@EVERY
@torch.no_grad()
def test_encode_and_decode(kind):
    model, x = build(kind), pictures(3)
    tokens = model.encode(x)
    assert tokens.spec == model.spec
    assert tokens.values.shape == (3, *SHAPES[kind])
    assert int(tokens.values.min()) >= 0
    assert int(tokens.values.max()) < model.spec.vocab
    y = model.decode(tokens)
    assert y.shape == x.shape
    assert float(y.abs().max()) <= 1
    assert torch.equal(model.encode(x[1:2]).values, tokens.values[1:2])
    torch.testing.assert_close(model.decode(tokens[[2, 0]]), y[[2, 0]], rtol=1e-4, atol=1e-5)


@EVERY
def test_spec(kind):
    spec = build(kind).spec
    assert spec.kind == ("binary" if kind == "bae" else "discrete")
    assert spec.grid == (4, 4)
    assert spec.image_size == (16, 16)
    assert spec.order == ("scale" if kind == "msvq" else "raster")
    assert spec.scales == (((1, 1), (2, 2), (4, 4)) if kind == "msvq" else ())
    assert (spec.vocab, spec.depth) == ((8, 2) if kind == "bae" else (32, 1))


@EVERY
def test_foreign_images_are_refused(kind):
    model = build(kind)
    with pytest.raises(ValueError, match="takes images of shape"):
        model.encode(torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match="largest magnitude"):
        model.encode(torch.full((1, 3, 16, 16), 255.0))
    with pytest.raises(ValueError, match="at least one, got none"):
        model.encode(pictures(2)[:0])


@EVERY
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_weights_and_images_of_any_floating_point_type(kind, weights):
    model, x = build(kind, shortcut=True, refine=8), pictures(2)
    want = model.encode(x)
    model.to(weights)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        same = float((model.encode(x.to(dtype)).values == want.values).float().mean())
        assert same == 1 if weights == torch.float32 and dtype != torch.bfloat16 else same > 0.5
    assert model.decode(want).dtype == torch.float32


def test_drawn_bits_take_a_seed_a_row():
    with pytest.raises(ValueError, match=r"bae takes a seed a row: \(2,\) for 2 rows, got \(1,\)"):
        build("bae").encode(pictures(2), torch.tensor([5]))


@EVERY
@torch.no_grad()
def test_a_checkpoint_gives_the_same_tokens(kind, tmp_path):
    model = build(kind)
    model.save_pretrained(tmp_path / "m")
    again = from_pretrained(tmp_path / "m")
    tokens = model.encode(pictures(2))
    assert torch.equal(again.encode(pictures(2)).values, tokens.values)
    assert torch.equal(again.decode(tokens), model.decode(tokens))


@EVERY
def test_reconstruct_decodes_the_codes_and_trains_everything(kind):
    changes = {"vq": {"entropy": 0.1}, "bae": {"deterministic": True, "entropy": 0.1}, "msvq": {}}
    model, x = build(kind, **changes[kind]), pictures(3)
    recon, terms = model.reconstruct(x, Noise(torch.arange(3)))
    torch.testing.assert_close(recon.clamp(-1, 1), model.decode(model.encode(x)), rtol=1e-4, atol=1e-5)
    (recon.square().mean() + terms["prior"]).backward()
    without = [n for n, p in model.named_parameters() if p.grad is None or not bool(p.grad.isfinite().all())]
    assert not without
    # straight through the quantiser, to the first layer
    assert float(model.encoder.conv_in.weight.grad.abs().max()) > 0
    assert all(v.ndim == 0 and bool(v.isfinite()) for v in terms.values())
    assert 1 <= float(terms["perplexity"]) <= model.spec.vocab**model.spec.depth


@EVERY
def test_training_learns_from_a_good_start(kind):
    model, x = build(kind, shortcut=True).train(), pictures(64)
    with torch.no_grad():
        blank = F.mse_loss(x.mean((0, 2, 3), keepdim=True).expand_as(x), x)
        model.before_training(x)
        first = F.mse_loss(model.decode(model.encode(x)), x)
    assert float(first) < 0.7 * float(blank)
    criterion = AutoencoderLoss(AutoencoderLossConfig(l1=0.0, l2=4.0, perceptual=0.0, prior=0.3))
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for step in range(60):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            losses = criterion(model, x[(step % 4) * 16 :][:16], Noise(torch.arange(16) + 16 * step), 0)
        optimizer.zero_grad()
        losses["loss"].backward()
        optimizer.step()
    with torch.no_grad():
        last = F.mse_loss(model.decode(model.encode(x)), x)
    assert float(last) < 0.9 * float(first)
    assert codebook_usage([model.encode(x)])["usage"] > 0.4


@EVERY
def test_the_second_stage_leaves_the_tokens_alone(kind, tmp_path):
    """The decoder's recipe freezes all that makes tokens, and starts from the first decoder's very pictures."""
    first, images = build(kind, shortcut=True), pictures(4)
    first.save_pretrained(tmp_path)
    second = build(kind, seed=1, shortcut=True, refine=8)
    load_initial(second, str(tmp_path))
    tokens = first.encode(images)
    torch.testing.assert_close(second.decode(tokens), first.decode(tokens))
    freeze(second, PRESETS[f"{kind}-f4-decoder-emoji64"]().freeze)
    optimiser = torch.optim.SGD([p for p in second.parameters() if p.requires_grad], lr=1e-2)
    (second.train().reconstruct(images, Noise(torch.arange(4)))[0] - images).square().mean().backward()
    optimiser.step()
    assert torch.equal(second.eval().encode(images).values, tokens.values)
    assert not torch.equal(second.decode(tokens), first.decode(tokens))


@EVERY
def test_without_shortcut_nothing_is_started(kind):
    model = build(kind)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.before_training(pictures(4))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="not a multiple of the downsampling 4"):
        build("vq", image_size=18)
    with pytest.raises(ValueError, match=r"attention_levels \[2\] don't exist"):
        build("vq", attention_levels=(2,))
    with pytest.raises(ValueError, match="must be the side of the whole map, 4"):
        build("msvq", scales=(1, 2))
    for scales in ((0, 4), (-1, 4)):
        with pytest.raises(ValueError, match="from 1 at least"):
            build("msvq", scales=scales)
    with pytest.raises(ValueError, match="refine works on 2x2 pixels: images of 15x15"):
        build("vq", image_size=15, patch=5, channels=(8,), attention_levels=(), refine=8)
    with pytest.raises(ValueError, match="must grow"):
        build("msvq", scales=(2, 1, 4))


# -- VQ --------------------------------------------------------------------------------------------------------------


def test_nearest_is_the_nearest():
    g = torch.Generator().manual_seed(0)
    x, codes = torch.randn(300, 5, generator=g), torch.randn(2**17, 5, generator=g)  # in three parts
    want = torch.cat([torch.cdist(part.double(), codes.double()).argmin(1) for part in x.split(50)])
    assert torch.equal(nearest(x, codes), want)


@torch.no_grad()
def test_vq_codes_lie_on_the_sphere():
    model, x = build("vq"), pictures(2)
    ids, code = model.quantise(model.analyse(x))
    torch.testing.assert_close(code.norm(dim=1), torch.ones(2, 4, 4))
    tokens = model.encode(x)
    y = model.decode(tokens)
    model.codebook *= torch.rand(32, 1) + 0.5  # lengths don't matter
    assert torch.equal(model.encode(x).values, tokens.values)
    torch.testing.assert_close(model.decode(tokens), y, rtol=1e-4, atol=1e-5)


def test_lloyd_moves_codes_to_their_means_and_dead_ones_to_data():
    x = torch.tensor([[0.0], [1.0], [10.0]])
    new = lloyd(x, torch.tensor([0, 0, 2]), torch.tensor([[5.0], [99.0], [7.0]]), seed=0)
    assert new[0] == 0.5
    assert new[2] == 10
    assert new[1] in x


def test_entropy_term_prefers_even_use():
    codes = F.normalize(torch.eye(4), dim=1)
    even, same = codes.clone().requires_grad_(), codes[:1].expand(4, -1)
    loss = entropy_loss(even, codes)
    assert loss.item() == pytest.approx(-math.log(4), abs=1e-3)
    assert entropy_loss(same, codes).item() == pytest.approx(0, abs=1e-3)
    loss.backward()
    assert bool(even.grad.isfinite().all())  # though most probabilities are 0


# -- BAE -------------------------------------------------------------------------------------------------------------


def test_bits_are_most_significant_first():
    model = build("bae")
    bits = torch.zeros(1, 6, 4, 4)
    bits[0, :, 0, 1] = torch.tensor([1.0, 0, 0, 0, 1, 1])
    ids = model.to_ids(bits)
    assert ids[0, 1].tolist() == [4, 3]
    assert int(ids.sum()) == 7
    assert torch.equal(model.to_bits(ids), bits)


@torch.no_grad()
def test_zero_bits_add_nothing():
    model = build("bae", norm_first=False)
    a, b = torch.zeros(1, 6, 4, 4), torch.zeros(1, 6, 4, 4)
    assert not model.post(a).any()
    a[:, 2], b[:, 5] = 1, 1
    torch.testing.assert_close(model.post(a) + model.post(b), model.post(a + b))


@torch.no_grad()
def test_bits_are_drawn_by_their_probabilities():
    model, x = build("bae"), pictures(1)
    p = model.probabilities((x + 1) / 2)
    n = 2000
    draws = model.draw(p.expand(n, -1, -1, -1), Noise(torch.arange(n)))
    error = (draws.mean(0) - p[0]) / (p[0] * (1 - p[0]) / n).sqrt()
    assert float(error.abs().max()) < 5
    assert float(error.square().mean()) == pytest.approx(1, abs=0.5)
    # an image's bits depend on its seed alone
    two = model.encode(x.expand(2, -1, -1, -1), seeds=torch.tensor([7, 8])).values
    assert torch.equal(model.encode(x, seeds=torch.tensor([8])).values, two[1:])
    assert not torch.equal(two[0], two[1])
    rounded = build("bae", deterministic=True)
    assert torch.equal(rounded.encode(x, seeds=torch.tensor([7])).values, rounded.encode(x).values)


@torch.no_grad()
def test_the_start_uses_many_codes_and_rebuilds_better_than_principal_components():
    model, x = build("bae", shortcut=True, bits=4), F.unfold((pictures(64) + 1) / 2, 4, stride=4).mT.flatten(0, 1)

    def judge():
        bits = (F.linear(x, model.to_map.weight.flatten(1), model.to_map.bias) > 0).float()
        known = torch.cat([bits, torch.ones(len(bits), 1)], 1)
        error = (known @ torch.linalg.lstsq(known, x, driver="gelsd").solution - x).square().mean()
        return float(error), len(bits.unique(dim=0)) / 256

    model.start_map(x)
    error, usage = judge()
    super(BAE, model).start_map(x)
    of_components, _ = judge()
    assert usage > 0.45
    assert error < 0.9 * of_components


def test_entropy_of_bits_is_that_of_the_codes():
    p = torch.rand(7, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
    codes = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 5)
    each = torch.stack([torch.where(code > 0, p, 1 - p).prod(1) for code in codes], 1)
    loss = bae.entropy_loss(p)
    torch.testing.assert_close(loss, torch.special.entr(each).sum(1).mean() - torch.special.entr(each.mean(0)).sum())
    loss.backward()
    assert bool(p.grad.isfinite().all())
    assert float(bae.entropy_loss(torch.tensor([[0.0], [1.0]]))) == pytest.approx(-math.log(2), abs=1e-4)


@torch.no_grad()
def test_bae_works_on_images_in_0_to_1():
    model, x = build("bae"), pictures(1)
    bits = (model.probabilities((x + 1) / 2) > 0.5).float()
    assert torch.equal(model.to_ids(bits), model.encode(x).values)
    want = (2 * model.synthesise(bits) - 1).clamp(-1, 1)
    torch.testing.assert_close(model.decode(model.encode(x)), want, rtol=1e-4, atol=1e-5)


# -- multi-scale VQ --------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_scale_quantises_what_is_left():
    model = build("msvq")
    z = model.analyse(pictures(2))
    q = model.quantiser
    ids, maps = q(z)
    parts = ids.split([1, 4, 16], 1)
    rest = z
    for s, part in enumerate(parts):
        assert torch.equal(nearest(q.pool(rest, s).flatten(0, 1), q.codebook).view_as(part), part)
        rest = rest - q.contribution(part, s)
    torch.testing.assert_close(maps[-1], z - rest)
    for a, b in zip(q.maps(ids), maps, strict=True):
        torch.testing.assert_close(a, b)


@torch.no_grad()
def test_one_scale_is_plain_vq():
    model = build("msvq", scales=(4,), phis=0)
    z = model.analyse(pictures(2))
    ids, maps = model.quantiser(z)
    assert torch.equal(ids.flatten(), nearest(z.permute(0, 2, 3, 1).flatten(0, 2), model.quantiser.codebook))
    assert torch.equal(maps[0].permute(0, 2, 3, 1).flatten(1, 2), model.quantiser.codebook[ids])
    assert model.quantiser.next_scale_input(ids).shape == (2, 0, 4)


@torch.no_grad()
def test_next_scale_input_is_causal_in_scales():
    q = build("msvq").quantiser
    ids = torch.randint(32, (1, 21), generator=torch.Generator().manual_seed(0))
    base = q.next_scale_input(ids)
    assert base.shape == (1, 20, 4)
    for at, first in ((0, 0), (3, 4), (7, 20)):  # a token of each scale, and the first input it reaches
        other = ids.clone()
        other[0, at] = (other[0, at] + 1) % 32
        same = (q.next_scale_input(other) == base).all(-1)[0]
        assert bool(same[:first].all())
        assert not same[first:].any() or first == 20


# -- usage -----------------------------------------------------------------------------------------------------------


def tokens(values, **spec):
    values = torch.tensor(values)
    return Tokens(values, TokenSpec(grid=(values.shape[1],), **spec))


def test_usage_of_plain_codes():
    found = codebook_usage(
        [tokens([[0, 0, 1, 1]], kind="discrete", vocab=8), tokens([[5, 5, 6, 6]], kind="discrete", vocab=8)]
    )
    assert found == {"codes": 8, "used": 4, "usage": 0.5, "perplexity": pytest.approx(4)}


def test_usage_of_binary_codes_is_of_the_whole_code():
    found = codebook_usage([tokens([[[0, 1], [1, 0], [0, 1]]], kind="binary", vocab=4, depth=2)])
    assert (found["codes"], found["used"]) == (16, 2)
    assert found["perplexity"] == pytest.approx(3 / 2 ** (2 / 3))


def test_usage_of_residual_codes_is_the_mean_of_the_depths():
    found = codebook_usage([tokens([[[0, 1], [0, 2]]], kind="residual", vocab=4, depth=2)])
    assert found == {"codes": 4, "used": 1.5, "usage": 0.375, "perplexity": pytest.approx(1.5)}


def test_usage_refuses_what_has_no_codebook():
    with pytest.raises(ValueError, match="no tokens"):
        codebook_usage([])
    with pytest.raises(ValueError, match="only discrete tokens"):
        codebook_usage([Tokens(torch.zeros(1, 2, 3), TokenSpec(kind="continuous", grid=(2,), dim=3))])
    with pytest.raises(ValueError, match="62-bit"):
        whole_codes(torch.zeros(1, 7, dtype=torch.long), 1024)
    assert float(perplexity(torch.tensor([5, 0, 0]))) == 1


# -- published checkpoints -------------------------------------------------------------------------------------------


def official(case, narrow=None):
    """Weights under the official names; `narrow` divides the networks' widths by four."""
    with safe_open(str(CASES / f"{case}.safetensors"), "pt") as file:
        shapes = json.loads(file.metadata()["shapes"])
    if narrow:
        shapes = {k: [n // 4 if n >= 128 and "embedding" not in k else n for n in v] for k, v in shapes.items()}
    return fill(shapes, 0)


def test_vq_checkpoint_of_another_size():
    state = official("llamagen-vq", narrow=True)
    model = convert_vq(state | {"quantize.codebook_used": torch.zeros(65536)}, image_size=32)
    assert model.config == VQConfig(image_size=32, codes=512, channels=(32, 32, 64, 64, 128), features=64)
    assert model.encode(pictures(1, 32)).values.shape == (1, 4)
    with pytest.raises(ValueError, match=r"unexpected: surplus"):
        convert_vq(state | {"surplus": torch.zeros(1)})
    del state["decoder.conv_blocks.1.res.0.conv1.bias"]
    with pytest.raises(ValueError, match=r"missing: decoder.up_blocks.1.resnets.0.conv1.bias"):
        convert_vq(state)


def test_bae_checkpoint_of_the_whole_gan():
    alone = official("elm-bae")
    state = {f"ae.{k}": v for k, v in alone.items()} | {
        "disc.main.0.weight": torch.zeros(1),
        "perceptual.x": torch.zeros(1),
    }
    model = convert_bae(state, image_size=32)
    assert (model.config.sub_tokens, model.config.bits, model.config.norm_first) == (2, 8, True)
    same = convert_bae(alone, image_size=32, sub_tokens=1)
    assert same.spec.vocab == 2**16
    x = pictures(1, 32)
    torch.testing.assert_close(model.decode(model.encode(x)), same.decode(same.encode(x)))
    with pytest.raises(ValueError, match="don't split into 3"):
        convert_bae(alone, sub_tokens=3)
    with pytest.raises(ValueError, match=r"unexpected keys: optimizer"):
        convert_bae(state | {"optimizer": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"unexpected: quantize.surplus"):
        convert_bae(alone | {"quantize.surplus": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"missing: pre.bias"):
        convert_bae({k: v for k, v in alone.items() if k != "quantize.proj.0.bias"})
    with pytest.raises(ValueError, match="another system's"):
        convert_bae(official("var-vq"))


def test_bae_without_the_first_normalisation():
    alone = official("elm-bae")
    shifted = {}
    for name, value in alone.items():
        parts = name.split(".")
        if name.startswith("generator.blocks."):
            if parts[2] == "0":
                continue
            name = ".".join([*parts[:2], str(int(parts[2]) - 1), *parts[3:]])
        shifted[name] = value
    model = convert_bae(shifted, image_size=32)
    assert not model.config.norm_first
    torch.testing.assert_close(model.decoder.conv_in.weight, alone["generator.blocks.1.weight"])


@pytest.mark.parametrize(("phis", "name"), [(1, "qresi."), (3, "{}."), (4, "qresi_ls.{}.")])
def test_msvq_checkpoint_with_shared_and_own_phis(phis, name):
    state = {k: v for k, v in official("var-vq").items() if "quant_resi" not in k}
    for i in range(phis):
        prefix = "quantize.quant_resi." + name.format(i)
        state |= {f"{prefix}weight": torch.full((16, 16, 3, 3), float(i)), f"{prefix}bias": torch.zeros(16)}
    state["quantize.ema_vocab_hit_SV"] = torch.zeros(3, 256)
    model = convert_msvq(state, scales=(1, 2, 3))
    assert model.config.phis == phis
    assert [phi.weight.mean().item() for phi in model.quantiser.phis] == list(range(phis))
    with pytest.raises(ValueError, match="counts hits on 3 scales"):
        convert_msvq(state, scales=(1, 2, 3, 4))
    with pytest.raises(ValueError, match=r"unexpected: quantize.quant_resi.other"):
        convert_msvq(state | {"quantize.quant_resi.other": torch.zeros(1)}, scales=(1, 2, 3))


# -- presets ---------------------------------------------------------------------------------------------------------

MILLIONS = {  # computed from the official code's shapes, without what takes no part
    "vq-ds16-in256": 71.88,
    "vq-ds8-in256": 70.11,
    "bae-16-in256": 63.03,
    "bae-1-16-in256": 63.03,
    "bae-24-in256": 63.03,
    "msvq-in256": 108.95,
}


@pytest.mark.parametrize("name", MILLIONS)
def test_published_sizes(name):
    from train.presets import PRESETS

    config = PRESETS[name]()
    with torch.device("meta"):
        model = CLASSES[config.model.kind](config.model)
    assert model.n_params / 1e6 == pytest.approx(MILLIONS[name], abs=0.01)
    assert config.name == name


@pytest.mark.parametrize("kind", list(CONFIGS))
def test_small_recipes_make_256_places(kind):
    from train.presets import PRESETS

    spec = CLASSES[kind](PRESETS[f"{kind}-f4-emoji64"]().model).spec
    assert spec.grid == (16, 16)
    assert spec.vocab**spec.depth >= 1024

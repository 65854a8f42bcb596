"""The KL autoencoder: shapes, the posterior's samples, normalisation, refusals, its start."""

import dataclasses

import pytest
import torch

from genlab.noise import Noise
from tokenizers_img.kl_vae import KLVAE, KLVAEConfig

SMALL = KLVAEConfig(image_size=16, patch=2, channels=(8, 16), layers=1, latent_channels=4, norm_groups=4)


def build(**changes):
    torch.manual_seed(0)
    return KLVAE(dataclasses.replace(SMALL, **changes)).eval()


def pictures(n=6, side=16):
    return torch.rand(n, 3, side, side, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.mark.parametrize("shortcut", [False, True])
@pytest.mark.parametrize(
    ("changes", "grid"),
    [
        ({}, (4, 4)),
        ({"image_size": 24}, (6, 6)),
        ({"patch": 1}, (8, 8)),
        ({"patch": 4, "channels": (16,), "attention_levels": (0,)}, (4, 4)),
    ],
)
@torch.no_grad()
def test_shapes_and_spec(changes, grid, shortcut):
    model = build(shortcut=shortcut, **changes)
    side = model.config.image_size
    assert model.spec.describe() == f"continuous {grid[0]}x{grid[1]} raster, 4 channels"
    assert model.spec.image_size == (side, side)
    tokens = model.encode(pictures(2, side))
    assert tokens.spec == model.spec
    assert tokens.values.shape == (2, grid[0] * grid[1], 4)
    images = model.decode(tokens)
    assert images.shape == (2, 3, side, side)
    assert images.dtype == torch.float32
    assert float(images.abs().max()) <= 1
    assert torch.equal(model.decode(tokens, torch.tensor([1, 2])), images)  # the decoder is deterministic


@torch.no_grad()
def test_tokens_are_in_raster_order():
    """A change in one corner of the image changes most the token of that corner."""
    model = build(shortcut=True, patch=4, channels=(16,))
    x = pictures(1)
    y = x.clone()
    y[:, :, :4, 12:] = -y[:, :, :4, 12:]  # top right
    change = (model.encode(x).values - model.encode(y).values).abs().sum(-1)
    assert int(change.argmax()) == 3
    z = torch.zeros(1, 16, 4)
    w = z.clone()
    w[:, 12] = 3  # bottom left
    tokens = model.encode(x)
    moved = [dataclasses.replace(tokens, values=v) for v in (z, w)]
    change = (model.to_pixels.weight.abs().sum() > 0) and (model.decode(moved[0]) - model.decode(moved[1])).abs().sum(1)
    assert tuple(int(i) // 4 for i in divmod(int(change.flatten().argmax()), 16)) == (3, 0)


@torch.no_grad()
def test_seeds_draw_the_posterior():
    model, x = build(), pictures()
    seeds = torch.arange(6)
    mean, logvar = model.posterior(x)
    drawn = model.encode(x, seeds).values
    eps = Noise(seeds, purpose="posterior").normal(*mean.shape[1:]).float()
    want = (mean + (0.5 * logvar).exp() * eps).flatten(2).transpose(1, 2)
    assert torch.allclose(drawn, want)
    assert torch.equal(model.encode(x, seeds).values, drawn)
    assert torch.allclose(model.encode(x).values, mean.flatten(2).transpose(1, 2))
    assert not torch.allclose(model.encode(x, seeds + 1).values, drawn)
    one = model.encode(x[3:4], seeds[3:4]).values  # row 3 is the same in any batch, up to rounding
    assert torch.allclose(one, drawn[3:4], atol=1e-5)


@torch.no_grad()
def test_normalisation_gives_mean_0_and_std_1():
    model, x = build(), pictures(40)
    before = model.decode(model.encode(x[:2]))
    model.fit_normalisation(x, batch_size=7)
    tokens = model.encode(x).values
    assert torch.allclose(tokens.mean((0, 1)), torch.zeros(4), atol=1e-4)
    assert torch.allclose(tokens.std((0, 1)), torch.ones(4), atol=1e-4)
    assert torch.allclose(model.decode(model.encode(x[:2])), before, atol=1e-5)  # decoding undoes it
    assert "latent_mean" in model.state_dict()  # it is saved


def test_reconstruct_has_the_kl_divergence():
    model, x = build(kl_weight=0.5), pictures()
    recon, terms = model.reconstruct(x, Noise(torch.arange(6)))
    assert recon.shape == x.shape
    mean, logvar = model.posterior(x)
    normal = torch.distributions.Normal
    kl = torch.distributions.kl_divergence(normal(mean, (0.5 * logvar).exp()), normal(0.0, 1.0)).sum() / x.numel()
    assert terms["kl"].item() == pytest.approx(kl.item(), rel=1e-4)
    assert terms["prior"].item() == pytest.approx(0.5 * kl.item(), rel=1e-4)
    assert set(terms) == {"kl", "prior"}
    (recon.mean() + terms["prior"]).backward()
    assert all(p.grad is not None for p in model.parameters())
    again, _ = model.reconstruct(x, Noise(torch.arange(6)))
    assert torch.equal(again, recon)


def test_equivariance_adds_the_half_size_term():
    model, x = build(equivariance=0.5), pictures()
    _, terms = model.reconstruct(x, Noise(torch.arange(6)))
    assert terms["half"].item() > 0
    want = SMALL.kl_weight * terms["kl"].item() + 0.25 * terms["half"].item()
    assert terms["prior"].item() == pytest.approx(want, rel=1e-4)


@torch.no_grad()
def test_the_shortcut_starts_at_principal_components():
    """Pictures whose patches span fewer dimensions than a token has come back nearly whole, before any training."""
    stream = torch.Generator().manual_seed(3)
    basis = torch.randn(3, 3 * 64, generator=stream)
    basis -= basis.view(3, 3, 64).mean(2, keepdim=True).expand(3, 3, 64).reshape(3, -1)
    patches = torch.randn(40 * 4, 3, generator=stream) @ basis * 0.05 + 0.1
    x = torch.nn.functional.fold(patches.view(40, 4, -1).transpose(1, 2), 16, 8, stride=8).clamp(-1, 1)
    model = build(shortcut=True, patch=8, channels=(16,))
    untrained = (model.decode(model.encode(x)) - x).square().mean()
    model.before_training(x)
    error = (model.decode(model.encode(x)) - x).square().mean()
    assert float(error) < 0.02 * float(x.var())
    assert float(untrained) > 0.5 * float(x.var())
    mean, logvar = model.posterior(x)
    assert torch.allclose(logvar, torch.full_like(logvar, -4.0))
    plain = build()
    weights = {k: v.clone() for k, v in plain.state_dict().items()}
    plain.before_training(x)
    assert all(torch.equal(v, weights[k]) for k, v in plain.state_dict().items())


def test_flat_pictures_are_no_trouble():
    """They leave most principal components without variance: rounding errors would be all there is."""
    grey = (torch.arange(3, 255, 12) / 127.5 - 1)[:, None, None, None].expand(-1, 3, 16, 16).contiguous()
    model = build(shortcut=True, patch=8, channels=(16,))
    model.before_training(grey[::2])
    model.fit_normalisation(grey[::2])
    mean, _ = model.posterior(grey)
    assert mean.abs().max() < 10
    assert model.encode(grey).values.abs().max() < 10
    assert (model.decode(model.encode(grey)) - grey).abs().max() < 0.5


@torch.no_grad()
def test_a_seed_a_row():
    for seeds in (torch.tensor([1]), torch.arange(3), torch.tensor(1)):
        with pytest.raises(ValueError, match=r"a seed a row: \(2,\) for 2 rows, got \("):
            build().encode(pictures(2), seeds)


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("images", [torch.float64, torch.float32, torch.bfloat16])
@torch.no_grad()
def test_weights_and_images_of_any_floating_point_type(weights, images):
    model, x = build(shortcut=True, refine=8), pictures(2)
    want = model.encode(x)
    model.to(weights)
    tokens, y = model.encode(x.to(images)), model.decode(want)
    assert y.dtype == torch.float32
    torch.testing.assert_close(tokens.values, want.values, rtol=0, atol=0.1)
    if weights == torch.float32:
        torch.testing.assert_close(tokens.values, model.encode(x.to(images).float()).values)


@pytest.mark.parametrize(
    ("images", "match"),
    [
        (torch.zeros(2, 3, 24, 24), r"takes images of shape \(B, 3, 16, 16\).*got \(2, 3, 24, 24\).*open_images"),
        (torch.zeros(2, 1, 16, 16), r"got \(2, 1, 16, 16\)"),
        (torch.zeros(3, 16, 16), r"got \(3, 16, 16\)"),
        (torch.zeros(0, 3, 16, 16), "at least one, got none"),
        (torch.zeros(2, 3, 16, 16, dtype=torch.uint8), "got torch.uint8; use .*to_float"),
        (torch.full((2, 3, 16, 16), 255.0), "largest magnitude given is 255"),
        (torch.full((2, 3, 16, 16), float("nan")), "largest magnitude given is nan"),
        (torch.full((2, 3, 16, 16), float("inf")), "largest magnitude given is inf"),
    ],
)
def test_odd_images_are_refused(images, match):
    with pytest.raises(ValueError, match=match):
        build().encode(images)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"image_size": 18}, "image_size 18 is not a multiple of the downsampling 4"),
        ({"norm_groups": 3}, "num_groups|norm_groups|divisible"),
        ({"image_size": 0}, "image_size"),
        ({"channels": ()}, "channels"),
        ({"attention_levels": (5,)}, "attention_levels"),
        ({"equivariance": 1.5}, "equivariance"),
        ({"equivariance": 0.5, "image_size": 12}, "equivariance halves the map .* even, got 3x3"),
        ({"refine": 8, "image_size": 15, "patch": 5, "channels": (16,)}, "refine .* 15x15"),
        ({"refine": 8, "image_size": 10, "patch": 5, "channels": (16,), "equivariance": 0.5}, "refine .* 5x5"),
    ],
)
def test_odd_configs_are_refused(changes, match):
    with pytest.raises(ValueError, match=match):
        build(**changes)


def test_saved_and_loaded(tmp_path):
    model, x = build(shortcut=True), pictures()
    model.fit_normalisation(x)
    again = KLVAE.from_pretrained(model.save_pretrained(tmp_path / "vae"))
    with torch.no_grad():
        assert torch.equal(again.encode(x).values, model.encode(x).values)
        assert torch.equal(again.decode(again.encode(x)), model.decode(model.encode(x)))

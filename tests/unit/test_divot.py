"""Divot: its diffusion, its tokens, its stages, its figures."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from eval.bench_divot import DivotBenchConfig, describe, mixture, run
from eval.clips import I3D, frechet_of_clips, fvd, motion_correlation
from genlab.cli import main
from genlab.data.clips import open_clips
from genlab.hub import from_pretrained
from genlab.nn.zero_snr import STEPS, ddim, rescale_guidance, signal_levels
from genlab.noise import Noise
from genlab.pictures import to_float
from genlab.tokens import Tokens
from tokenizers_img.divot import Divot, DivotConfig
from tokenizers_img.frame_features import FrameFeatures
from tokenizers_img.kl_vae import KLVAE, KLVAEConfig
from tokenizers_img.video_unet import VideoUNetConfig
from train.config import DataConfig, OptimConfig, run_config
from train.loop import train
from train.tasks import build_task

VAE = KLVAEConfig(image_size=32, patch=8, channels=(16,), layers=1, latent_channels=4, norm_groups=4)
TINY = DivotConfig(
    frames=4, fps=4.0, read=4, vae=VAE, network="efficientnet-lite0", network_size=32, levels=(0, 1), places=2,
    channels=16 * 64 + 24 * 16, pool=2, width=16, temporal_layers=1, temporal_heads=2, dim=32, depth=1, heads=2,
    resampler_depth=1, resampler_heads=2, dim_head=16, queries=8, token_dim=16, context=16, patch=2, denoiser_dim=32,
    denoiser_depth=1, denoiser_heads=2, local=True, steps=3, eta=0.0, guidance=1.0,
)  # fmt: skip


@pytest.fixture(scope="module")
def clips():
    return open_clips("emoji-anim#6", "heldout", 32, 4)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Divot(TINY).eval()


# -- diffusion ----------------------------------------------------------------------------------------------------


def test_a_unet_learns_to_denoise_too_and_frames_see_each_other():
    torch.manual_seed(0)
    sizes = VideoUNetConfig(channels=32, multipliers=(1, 2), layers=1, attention_levels=(0,), head_dim=16, first=8)
    model = Divot(dataclasses.replace(TINY, local=False, unet=sizes))
    assert model.config.draws
    z, seen, noise = torch.randn(2, 4, 16, 4), torch.randn(2, 4, 4, TINY.channels), Noise(torch.arange(2))
    before = model.loss(z, seen, noise)["loss"]
    before.backward()
    nn = model.denoiser
    with torch.no_grad():
        for p in nn.parameters():
            torch.nn.init.normal_(p, std=0.1) if not bool(p.any()) else None
    nn.eval()
    x, t, context = torch.randn(1, 4, 4, 4, 4), torch.tensor([500]), torch.randn(1, 16, 32)
    v = nn(x, t, context)
    late = x.clone()
    late[:, 3] += 1.0
    assert not torch.allclose(nn(late, t, context)[:, 0], v[:, 0])
    for part in (slice(0, 8), slice(8, 16)):  # both pairs of keys and values are read
        other = context.clone()
        other[:, part] += 1.0
        assert not torch.allclose(nn(x, t, other), v)
    assert not torch.allclose(nn(x, t + 100, context), v)
    model.loss(z, seen, noise)["loss"].backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in nn.parameters())
    narrow, deep = dataclasses.replace(sizes, channels=40), dataclasses.replace(sizes, multipliers=(1, 1, 1, 1))
    for wrong, message in ((narrow, "multiple of 32"), (deep, "can't be halved 3 times")):
        with pytest.raises(ValueError, match=message):
            Divot(dataclasses.replace(TINY, local=False, unet=wrong))
    with pytest.raises(ValueError, match="local is the transformer's"):
        Divot(dataclasses.replace(TINY, unet=sizes))


def test_schedule_ends_in_noise():
    """The published constants; algorithm 1 keeps the first level and sends the last to zero."""
    a = signal_levels()
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    assert a.shape == (1000,)
    assert float(a[-1]) == 0
    assert float(a[0]) == pytest.approx(float((1 - betas[0]).sqrt()), abs=1e-12)
    assert bool((a.diff() < 0).all())


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_ddim_draws_a_gaussian(eta):
    """For data N(3, 0.5^2) the best v is known in closed form; DDIM must land on that very distribution."""
    a, mean, var = signal_levels(), 3.0, 0.25

    def velocity(x, t):
        at = a[t].view(-1, 1)
        s = (1 - at**2).sqrt()
        x0 = mean + at * var / (at**2 * var + s**2) * (x - at * mean)
        return at * (x - at * x0) / s - s * x0

    x = ddim(velocity, Noise(torch.arange(4000)), (1,), steps=100 if eta == 0 else 500, eta=eta)
    assert float(x.mean()) == pytest.approx(mean, abs=0.04)
    assert float(x.std()) == pytest.approx(0.5, abs=0.03)
    one = ddim(velocity, Noise(torch.arange(5)), (1,), steps=1)  # from pure noise, one step gives the mean
    assert torch.allclose(one, torch.full((5, 1), mean), atol=1e-5)
    with pytest.raises(ValueError, match="1 to 1000"):
        ddim(velocity, Noise(torch.arange(2)), (1,), steps=0)


def test_rescaled_guidance_keeps_the_spread():
    c, u = torch.randn(3, 50), torch.randn(3, 50)
    guided = u + 7.5 * (c - u)
    full = rescale_guidance(guided, c, 1.0)
    assert torch.allclose(full.std(1), c.std(1))
    assert torch.allclose(rescale_guidance(guided, c, 0.7), 0.7 * full + 0.3 * guided, atol=1e-5)
    assert not bool(rescale_guidance(0 * guided, 0 * c, 0.7).any())


# -- the tokenizer ------------------------------------------------------------------------------------------------


def test_clips_to_tokens_and_back(model, clips, tmp_path):
    x = to_float(clips.batch(range(3)))
    tokens = model.encode(x)
    assert tokens.values.shape == (3, 8, 16)
    assert model.spec.image_size == (4, 32, 32)
    y = model.decode(tokens, torch.arange(3))
    assert y.shape == x.shape
    assert float(y.detach().abs().max()) <= 1
    # a clip depends on its seed and tokens alone
    alone = model.decode(tokens[1:2], torch.tensor([1]))
    assert torch.allclose(alone, y[1:2], atol=1e-4)
    assert not torch.allclose(alone, model.decode(tokens[1:2], torch.tensor([2])), atol=1e-2)
    again = from_pretrained(model.save_pretrained(tmp_path / "m"))
    assert torch.allclose(again.encode(x).values, tokens.values)
    assert not any(name.startswith("features") for name in model.state_dict())
    with pytest.raises(ValueError, match=r"\(B, 4, 3, 32, 32\)"):
        model.encode(x[:, :3])
    with pytest.raises(ValueError, match=r"\(B, 4, 3, 32, 32\)"):
        model.encode(x[:, 0])
    with pytest.raises(ValueError, match=r"a seed a row: \(3,\) for 3 rows, got \(1,\)"):
        model.decode(tokens, torch.tensor([1]))


@pytest.mark.parametrize("unet", [False, True])
@torch.no_grad()
def test_weights_and_clips_of_any_floating_point_type(clips, unet):
    torch.manual_seed(0)
    sizes = VideoUNetConfig(channels=32, multipliers=(1, 2), layers=1, attention_levels=(0,), head_dim=16, first=8)
    model = Divot(dataclasses.replace(TINY, local=not unet, unet=sizes if unet else None)).eval()
    for p in model.denoiser.parameters():
        torch.nn.init.normal_(p, std=0.1) if not bool(p.any()) else None
    x = to_float(clips.batch(range(2)))
    tokens = model.encode(x)
    y = model.decode(tokens, guidance=3.0)
    torch.testing.assert_close(model.encode(x.double()).values, tokens.values)
    model.bfloat16()
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        torch.testing.assert_close(model.encode(x.to(dtype)).values, tokens.values, rtol=0, atol=0.2)
    for guidance in (1.0, 3.0):
        z = model.decode(tokens, guidance=guidance)
        assert z.dtype == torch.float32
    assert float((z - y).abs().mean()) < 0.1


def test_tubes_keep_their_frames_apart(clips):
    """Two frames a position: half the positions, and still every frame has its own say."""
    torch.manual_seed(0)
    model = Divot(dataclasses.replace(TINY, tube=2, context=8)).eval()
    assert model.denoiser.time.shape[0] == model.spatial.time.shape[0] == 2
    x = to_float(clips.batch(range(2)))
    a, b = model.encode(x).values, model.encode(x[:, [1, 0, 2, 3]]).values
    assert float(((a - b).norm() / a.norm()).detach()) > 1e-3
    assert model.decode(model.encode(x)).shape == x.shape
    z = torch.randn(1, 4, 4, 4, 4)
    model.denoiser.patch_out.weight.data.normal_()
    context = torch.randn(1, 8, 32)
    for t in range(4):  # at its start the denoiser works a position at a time
        changed = z.clone()
        changed[:, t] += 1
        out = model.denoiser(changed, torch.tensor([500]), context) - model.denoiser(z, torch.tensor([500]), context)
        moved = out.detach().abs().amax((0, 2, 3, 4)) > 1e-6
        assert moved.tolist() == [t // 2 == i // 2 for i in range(4)]


def test_order_of_frames_counts(model, clips):
    """Fresh temporal blocks are the identity, and positions still tell earlier from later."""
    x = to_float(clips.batch(range(2)))
    a, b = model.encode(x).values, model.encode(x.flip(1)).values
    assert float(((a - b).norm() / a.norm()).detach()) > 1e-3


def test_guidance_is_against_the_all_zeros_clip(model, clips):
    model.denoiser.patch_out.weight.data.normal_(std=0.1)  # it starts at zero, where nothing can be told
    tokens = model.encode(to_float(clips.batch(range(2))))
    none = model.no_tokens().expand(2, -1, -1)
    plain = model.draw_latents(tokens.values, guidance=1.0)
    assert torch.allclose(model.draw_latents(none, guidance=3.0), model.draw_latents(none, guidance=1.0), atol=1e-3)
    assert not torch.allclose(model.draw_latents(tokens.values, guidance=3.0), plain, atol=1e-2)
    blank = torch.zeros(1, 4, 3, 32, 32)
    assert torch.allclose(model.encode(blank).values, model.no_tokens(), atol=1e-6)


def test_encoder_only_and_wrong_sizes(clips):
    small = Divot(dataclasses.replace(TINY, denoiser_depth=0, local=False)).eval()
    tokens = small.encode(to_float(clips.batch([0])))
    with pytest.raises(ValueError, match="only encodes"):
        small.decode(tokens)
    for wrong, match in (
        ({"tube": 3}, "tubes of 3"),
        ({"read": 5}, "1 to 4"),
        ({"pool": 3}, "pooled"),
        ({"context": 5}, "context 16"),
    ):
        with pytest.raises(ValueError, match=match):
            Divot(dataclasses.replace(TINY, **wrong))
    wide = FrameFeatures("efficientnet-lite0", size=32, levels=(0,), side=3)
    with pytest.raises(ValueError, match="fold to 3x3"):
        wide(torch.zeros(1, 3, 32, 32))


def test_published_sizes():
    """The defaults are the release's: 64 tokens of 256 channels, of 5 frames and 5x5 places."""
    with torch.device("meta"):
        model = Divot(dataclasses.replace(DivotConfig(), denoiser_depth=0))
    assert model.spec.shape == (64, 256)
    assert model.temporal.position.shape == (5, 768)
    assert model.spatial.space.shape == (25, 1024)
    assert len(model.spatial.resampler.layers) == 6


def test_a_transformers_patches_are_features_too():
    see = FrameFeatures("vit_tiny_patch16_224", size=224, levels=(), side=14, pretrained=False)
    assert see(torch.zeros(1, 3, 64, 64)).shape == (1, 196, 192)


def test_local_start_reads_at_its_own_place():
    """Queries begin with attention on the positions they are given."""
    torch.manual_seed(0)
    model = Divot(dataclasses.replace(TINY, dim=64, resampler_heads=2, dim_head=32))
    model.before_training(torch.randn(4, 4, 4, TINY.channels))
    spatial = model.spatial
    own = (spatial.time[:, None] + spatial.space).flatten(0, 1)
    layer, x = spatial.resampler.layers[0], spatial.resampler.proj_in(torch.nn.functional.layer_norm(own, (64,)))
    q = layer.attn.q(layer.norm2(spatial.resampler.latents))
    k = layer.attn.kv(layer.norm1(x)).chunk(2, -1)[0]
    best = (q @ k.T).argmax(1) // 2  # sixteen positions, two a query
    assert (best == torch.arange(8)).float().mean() > 0.8


# -- training -----------------------------------------------------------------------------------------------------


def config(folder, **fields):
    settings = {
        "name": "divot", "model": TINY, "tokenizer": str(folder / "vae"), "images": 16, "batch_size": 4,
        "data": DataConfig(source="emoji-anim#4+moved:emoji#4", reverse=True), "precision": "fp32", "threads": 1,
        "optim": OptimConfig(lr=1e-3, warmup=4), "log_every": 4, "sample_every": 16, "save_every": 8,
    }  # fmt: skip
    return run_config(**(settings | fields))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("divot")
    torch.manual_seed(0)
    KLVAE(VAE).save_pretrained(folder / "vae")
    return folder


def test_stages(folder, monkeypatch, clips, capsys):
    monkeypatch.setenv("GENLAB_CACHE", str(folder / "cache"))
    joint = train(config(folder), folder / "joint", device="cpu")
    first = from_pretrained(joint)
    assert first.extra["vae"] == str(folder / "vae")
    assert float(first.seen_std.std()) > 0  # measured
    assert (folder / "joint" / "samples" / "000000016.png").is_file()

    stage = dataclasses.replace(TINY, stage="detokenizer", drop=0.5)
    second = from_pretrained(
        train(config(folder, model=stage, init=str(joint)), folder / "second", device="cpu")
    )  # fmt: skip
    x = to_float(clips.batch(range(2)))
    assert torch.equal(first.encode(x).values, second.encode(x).values)  # tokens stay, …
    assert not torch.equal(first.denoiser.patch_in.weight, second.denoiser.patch_in.weight)  # the denoiser learns

    with pytest.raises(ValueError, match="give --init"):
        build_task(config(folder, model=stage))
    adapt = dataclasses.replace(TINY, stage="adapt")
    with pytest.raises(ValueError, match="--teacher names the divot_lm"):
        build_task(config(folder, model=adapt, init=str(joint)))
    with pytest.raises(ValueError, match=r"set --model\.channels 1408"):
        build_task(config(folder, model=dataclasses.replace(TINY, channels=7)))

    bench = DivotBenchConfig(tokenizer=str(joint), n=4, out=folder / "bench", fd=False)
    result = run(bench)
    assert "motion correlation, own tokens" in describe(result)
    assert {p.name for p in (folder / "bench").iterdir()} == {"result.json", "clips.webp", "clips.png"}
    words = ["reconstruct", str(joint), "--n", "3", "--no-fd", "--grid", str(folder / "a.gif"), "--json"]
    assert main(words) == 0
    assert '"clips": 3' in capsys.readouterr().out
    assert main(["reconstruct", str(joint), "--images", str(folder / "a.gif"), "--no-fd"]) == 0


def test_the_denoiser_learns_from_the_tokens():
    """A clip that the condition names is denoised better than one it doesn't, after few steps on two clips."""
    torch.manual_seed(0)
    model = Divot(dataclasses.replace(TINY, time_bias=10.0))  # nearly all noise: what the tokens don't say is lost
    latents = torch.randn(2, 4, 16, 4)
    seen = torch.randn(2, 4, 4, TINY.channels)
    model.before_training(seen)
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for step in range(80):
        optimizer.zero_grad()
        terms = model.loss(latents, seen, Noise(torch.arange(2) + 2 * step))
        terms["loss"].backward()
        optimizer.step()
        losses.append(float(terms["loss"].detach()))
    assert np.mean(losses[-10:]) < 0.6 * np.mean(losses[:5])
    with torch.no_grad():
        noise = Noise(torch.arange(2) + 10_000)
        own, other = (float(model.loss(latents, s, noise)["loss"]) for s in (seen, seen.flip(0)))
    assert own < 0.8 * other


def test_times_are_of_all_sizes():
    noise = Noise(torch.arange(2000))
    for bias, mean in ((1.0, 0.5), (2.0, 2 / 3)):
        t = Divot(dataclasses.replace(TINY, time_bias=bias, denoiser_depth=1)).draw_times(noise)
        assert 0 <= int(t.min()) <= int(t.max()) < STEPS
        assert float(t.double().mean()) / STEPS == pytest.approx(mean, abs=0.02)


# -- figures ------------------------------------------------------------------------------------------------------


def test_motion_correlation(clips):
    x = clips.batch(range(4))
    assert motion_correlation(x, x) == pytest.approx(1)
    assert motion_correlation(x, 255 - x) == pytest.approx(-1)
    noisy = (x.float() + 40 * torch.randn(x.shape)).clamp(0, 255).to(torch.uint8)
    assert (motion_correlation(x, noisy) < 0.95).all()
    still = x[:, :1].expand_as(x)
    assert np.isnan(motion_correlation(x, still)).all()
    with pytest.raises(ValueError, match="two frames"):
        motion_correlation(x[:, :1], x[:, :1])


class FakeI3D(torch.nn.Module):
    """Called as StyleGAN-V's file is; sees brightness and change."""

    def forward(self, x: torch.Tensor, rescale: bool = False, resize: bool = False, return_features: bool = False):
        assert rescale
        assert resize
        assert return_features
        assert x.shape[1] == 3
        assert x.shape[2] >= 16
        assert float(x.max()) > 1.0
        change = (x[:, :, 1:] - x[:, :, :-1]).abs().mean([2, 3, 4])
        return torch.cat([x.mean([2, 3, 4]), change], 1) / 255


def test_fvd_by_a_network_that_the_user_gives(clips, tmp_path):
    torch.jit.script(FakeI3D()).save(str(tmp_path / "i3d.pt"))
    i3d, x = I3D(tmp_path / "i3d.pt"), clips.batch(range(6))
    assert i3d(x, batch_size=4).shape == (6, 6)
    assert fvd(i3d, x, x) == pytest.approx(0, abs=1e-6)
    still = x[:, :1].expand_as(x)
    assert fvd(i3d, x, still) > 1e-5
    with pytest.raises(ValueError, match=r"no I3D in .*i3d_torchscript"):
        I3D(tmp_path / "none.pt")
    (tmp_path / "other.pt").write_bytes(b"no network")
    with pytest.raises(ValueError, match="is no TorchScript file"):
        I3D(tmp_path / "other.pt")


def test_frechet_tells_motion_from_frames(clips):
    """The same frames in another order: no distance of frames, one of motion."""
    from eval.features import EfficientNetLite0

    x = clips.batch(range(4))
    mixed = x[:, [2, 0, 3, 1]]
    figures = frechet_of_clips(EfficientNetLite0(), x, mixed)
    assert figures["fd_frames_efficientnet_lite0"] == pytest.approx(0, abs=1e-3)
    assert figures["fd_motion_efficientnet_lite0"] > 0.1


def test_the_mixture_head_recovers_a_mixture():
    """The issue's figures: means within 5 %, weights within 0.05, and better than the mean head held out."""
    found = mixture(steps=250, n=2048)
    assert found["every_component_found"]
    assert found["means_error_of_their_size"] < 0.05
    assert found["weights_error"] < 0.05
    assert found["heldout_nats_a_channel"] < found["heldout_nats_a_channel_mse"] - 0.2


def test_tokens_of_clips_are_tokens(model):
    assert Tokens(torch.zeros(2, 8, 16), model.spec).values.shape == (2, 8, 16)

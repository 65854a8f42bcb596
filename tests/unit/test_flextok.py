"""FlexTok: its quantiser, its masks, decoding any first k tokens, its training, and the generator that may stop."""

import dataclasses
import json
import math
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from eval import bench_flextok as bench
from genlab.generators.base import Guidance
from genlab.generators.flexar import FlexAR, FlexARConfig
from genlab.hub import from_pretrained
from genlab.nn.apg import APG, APGConfig
from genlab.noise import Noise
from genlab.tokens import Tokens, TokenSpec, require_fit
from samplers.ancestral import AncestralConfig, AncestralSampler
from samplers.speculative_jacobi import SpeculativeJacobiConfig, SpeculativeJacobiSampler
from samplers.until_settled import UntilSettledConfig, UntilSettledSampler
from tokenizers_img.flextok import FlexTok, FlexTokConfig
from tokenizers_img.fsq import FSQ, describe_usage, fsq_usage
from tokenizers_img.kl_vae import KLVAEConfig
from train.config import DataConfig, OptimConfig, run_config
from train.loop import train
from train.presets import PRESETS
from train.tasks import build_task

VAE = KLVAEConfig(image_size=16, patch=4, channels=(16,), layers=1, latent_channels=4, norm_groups=4, shortcut=True)
TINY = FlexTokConfig(
    vae=VAE, registers=6, levels=(5, 4, 3), patch=2, encoder_dim=32, encoder_depth=2, decoder_dim=32, decoder_depth=2,
    head_dim=16, steps=3, guidance=2.0,
)  # fmt: skip


def tokenizer(**changes):
    """A FlexTok whose decoder says something: its zeros are filled."""
    torch.manual_seed(0)
    model = FlexTok(dataclasses.replace(TINY, **changes)).eval()
    for p in model.decoder.parameters():
        if not bool(p.any()):
            torch.nn.init.normal_(p, std=0.3)
    return model


def images(n=4):
    return torch.rand(n, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1


# -- the quantiser ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("levels", [(8, 8, 8, 5, 5, 5), (2,), (7, 3, 4)])
def test_every_id_is_its_own_code(levels):
    fsq = FSQ(levels)
    ids = torch.arange(fsq.vocab)[:: max(1, fsq.vocab // 5000)]
    codes = fsq.codes(ids)
    assert len(codes.unique(dim=0)) == len(ids)
    assert fsq.to_ids((codes * (fsq.levels // 2)).round()).tolist() == ids.tolist()
    assert fsq.digits(torch.tensor([1])).tolist() == [[1 % levels[0], *[0] * (len(levels) - 1)]]


def test_far_values_reach_the_outermost_levels_and_no_further():
    fsq = FSQ((8, 5))
    far = torch.tensor([[-50.0, -50.0], [50.0, 50.0], [0.0, 0.0]])
    _, ids = fsq(far)
    assert fsq.digits(ids).tolist() == [[0, 0], [7, 4], [4, 2]]
    assert fsq.codes(ids)[2].tolist() == [0.0, 0.0]


def test_gradients_pass_through_and_noise_only_perturbs_its_share():
    fsq, z = FSQ((5, 4)), torch.randn(3, 7, 2, requires_grad=True)
    codes, ids = fsq(z)
    torch.testing.assert_close(codes.detach(), fsq.codes(ids))
    codes.sum().backward()
    assert bool((z.grad > 0).all())
    u = torch.rand(3, 7, 2, 2)
    noisy, same = fsq(z, u, 0.5)
    changed = (noisy - codes).abs() > 1e-6
    assert torch.equal(same, ids)
    assert torch.equal(changed, u[..., 0] < 0.5)
    assert float(((noisy - codes).detach() * (fsq.levels // 2)).abs().max()) <= 1.0


def test_spread_knows_even_from_lumped():
    fsq = FSQ((5, 4))
    even = fsq.codes(torch.arange(20)) * (fsq.levels // 2)
    z = ((even + torch.tensor([0.0, 0.5])) / ((fsq.levels - 1) / 2 * 1.001)).clamp(-0.99, 0.99).atanh()
    assert float(fsq.spread(z)) > 0.8
    lumped = torch.zeros(20, 2, requires_grad=True)
    spread = fsq.spread(lumped)
    spread.backward()
    assert spread.item() < 0.3
    assert bool(lumped.grad.isfinite().all())  # levels that nothing reaches have no infinite slope


def test_usage_by_channel_and_position():
    fsq, spec = FSQ((3, 2)), TokenSpec(kind="discrete", grid=(2,), order="coarse_to_fine", vocab=6)
    said = fsq_usage(fsq, [Tokens(torch.tensor([[0, 1], [0, 4]]), spec)])
    assert (said["used"], said["codes"]) == (3, 6)
    assert said["channels"][0]["shares"] == [0.5, 0.5, 0.0]
    assert said["channels"][1]["shares"] == [0.75, 0.25]
    assert said["positions"] == pytest.approx([1.0, 2.0])
    assert describe_usage(said)[0] == "channel 0: levels 0.50 0.50 0.00, entropy 0.63"


@pytest.mark.parametrize("levels", [(), (1, 4), (2**16, 2**16)])
def test_impossible_levels_are_refused(levels):
    with pytest.raises(ValueError, match="FSQ needs two or more levels"):
        FSQ(levels)


# -- the tokenizer ---------------------------------------------------------------------------------------------


def test_a_register_sees_all_patches_and_no_later_register():
    model, z = tokenizer(), torch.randn(1, 4, 4, 4)
    before = model.encoder(z)
    with torch.no_grad():
        model.encoder.registers[3] += torch.randn(32)  # not a constant, which LayerNorm takes away
    after = model.encoder(z)
    assert torch.equal(before[:, :3], after[:, :3])
    assert not torch.allclose(before[:, 3:], after[:, 3:])
    z2 = z.clone()
    z2[..., -1, -1] += 1.0
    assert not torch.allclose(after[:, 0], model.encoder(z2)[:, 0])


@pytest.mark.parametrize("draft", [0, 24])
def test_tokens_behind_the_kept_ones_do_not_count_and_those_before_do(draft):
    model = tokenizer(draft=draft)
    tokens = model.encode(images())
    other = Tokens((tokens.values + torch.tensor([0, 0, 0, 1, 1, 1])) % model.fsq.vocab, tokens.spec)
    assert torch.equal(model.decode(tokens.first(3)), model.decode(other.first(3)))
    assert not torch.allclose(model.decode(tokens.first(4)), model.decode(other.first(4)))


@pytest.mark.parametrize("ours", [False, True])
def test_mixed_lengths_in_one_batch_are_one_by_one(ours):
    model = tokenizer(draft=24 * ours, precondition=ours)
    tokens = model.encode(images(6)).first(torch.tensor([1, 2, 3, 4, 5, 6]))
    seeds = torch.arange(6) + 10
    with torch.no_grad():
        together = model.decode(tokens, seeds)
        alone = torch.cat([model.decode(tokens[i : i + 1], seeds[i : i + 1]) for i in range(6)])
    assert float((together - alone).abs().max()) < 1e-5


@pytest.mark.parametrize("t", [0.0, 0.2, 0.5, 0.9, 1.0])
def test_what_a_linear_guess_leaves_of_the_velocity_has_unit_variance(t):
    z, eps = torch.randn(2, 200_000, generator=torch.Generator().manual_seed(0))
    x = (1 - t) * z + t * eps
    of_x, of_v = tokenizer(precondition=True).decoder.shares(torch.tensor([t]))
    rest = (eps - z - of_x * x) / of_v
    assert float(rest.var()) == pytest.approx(1, abs=0.02)
    assert float((rest * x).mean()) == pytest.approx(0, abs=0.02)  # nothing linear is left to be guessed


def test_an_untrained_preconditioned_decoder_says_the_linear_guess():
    model = FlexTok(dataclasses.replace(TINY, precondition=True))
    x, t = torch.randn(2, 4, 4, 4), torch.tensor([0.3, 0.8])
    given = model.decoder.condition(torch.zeros(2, 6, len(model.config.levels)), torch.tensor([2, 6]))
    v, _ = model.decoder(x, given, model.decoder.modulations(t))
    torch.testing.assert_close(v, model.decoder.shares(t)[0][:, None, None, None] * x)


def test_the_draft_teaches_the_codes_and_reaches_the_flow():
    model, z = FlexTok(dataclasses.replace(TINY, draft=24)), torch.randn(8, 16, 4)
    terms = model.loss(z, Noise(torch.arange(8)))
    assert float(terms["loss"].detach()) == pytest.approx(float(terms["flow"] + terms["draft"]))
    terms["loss"].backward()
    # the decoder, as it starts, says nothing, so all that the encoder learns now comes through the draft
    assert float(model.encoder.out.weight.grad.norm()) > 0
    assert float(model.decoder.codes_in.weight.grad.norm()) == 0
    filled = tokenizer(draft=24)
    given = filled.decoder.condition(torch.rand(2, 6, 3), torch.tensor([3, 6]))
    other = given._replace(draft_BChw=given.draft_BChw + 1)
    x, mods = torch.randn(2, 4, 4, 4), filled.decoder.modulations(torch.tensor([0.5, 0.5]), given.vector_BD)
    assert not torch.allclose(filled.decoder(x, given, mods)[0], filled.decoder(x, other, mods)[0])


@torch.no_grad()
def test_weights_and_images_of_any_floating_point_type():
    model = tokenizer()
    ids = model.encode(images()).values
    assert torch.equal(model.encode(images().double()).values, ids)
    model.bfloat16()
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        assert float((model.encode(images().to(dtype)).values == ids).float().mean()) > 0.5


def test_half_precision_decodes_nearly_the_same():
    model = tokenizer(draft=24, precondition=True, steps=10)
    tokens = model.encode(images())
    exact = model.decode(tokens)
    assert float((model.bfloat16().decode(tokens).float() - exact).abs().mean()) < 0.02


@pytest.mark.parametrize("ours", [False, True])
def test_a_row_learns_the_same_beside_longer_and_shorter_ones(ours):
    model, z = tokenizer(null=0.3, draft=24 * ours, precondition=ours), torch.randn(12, 16, 4)
    noise = Noise(torch.arange(12))
    assert len(model.keep(noise).unique()) > 2
    losses = [model.loss(z[i : i + 1], Noise(torch.tensor([i])))["loss"] for i in range(12)]
    torch.stack(losses).mean().backward()
    alone = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    loss = model.loss(z, noise)["loss"]
    loss.backward()
    torch.testing.assert_close(loss, torch.stack(losses).mean())
    assert {"decoder.null", "decoder.absent", "decoder.register_positions", "encoder.registers"} <= set(alone)
    for name, grad in alone.items():
        torch.testing.assert_close(model.get_parameter(name).grad, grad, atol=1e-5, rtol=1e-3, msg=name)


def test_a_batch_is_faster_than_one_by_one():
    model = tokenizer()
    tokens = model.encode(images(16)).first(torch.arange(16) % 6 + 1)

    def clock(parts):
        start = time.process_time()
        for part in parts:
            model.decode(part)
        return time.process_time() - start

    with torch.inference_mode():
        ones = [tokens[i : i + 1] for i in range(16)]
        best = [min(clock(parts) for _ in range(2)) for parts in ([tokens], ones)]
    assert best[0] * 3 < best[1]


def test_seeds_decide_what_tokens_leave_open():
    model, tokens = tokenizer(), tokenizer().encode(images(2))
    assert torch.equal(model.decode(tokens), model.decode(tokens, torch.zeros(2, dtype=torch.long)))
    assert not torch.allclose(model.decode(tokens), model.decode(tokens, torch.tensor([1, 2])))
    with pytest.raises(ValueError, match="steps must be at least 1"):
        model.decode(tokens, steps=0)
    one = torch.tensor([5])  # would be every row's
    for call in (lambda: model.decode(tokens, one), lambda: model.encode(images(2), one)):
        with pytest.raises(ValueError, match=r"a seed a row: \(2,\) for 2 rows, got \(1,\)"):
            call()
    with pytest.raises(ValueError, match="at least one, got none"):
        model.encode(images(2)[:0])


def test_unguided_needs_no_unconditional_rows_and_guidance_matters():
    model = tokenizer()
    tokens = model.encode(images(2))
    assert not torch.allclose(model.decode(tokens, guidance=1.0), model.decode(tokens, guidance=4.0))
    with torch.no_grad():
        model.decoder.null += 1.0
    plain = model.decode(tokens, guidance=1.0)
    assert torch.equal(plain, tokenizer().decode(tokens, guidance=1.0))


def test_projected_guidance():
    cond, uncond = torch.randn(2, 3, 4, 4).double(), torch.randn(2, 3, 4, 4).double()
    plain = APG(APGConfig(momentum=0, threshold=0, eta=1))
    torch.testing.assert_close(plain(cond, uncond, 3.0), uncond + 3 * (cond - uncond))
    guide = APG(APGConfig())
    first = guide(cond, uncond, 2.0) - cond
    torch.testing.assert_close((first * cond).sum((1, 2, 3)), torch.zeros(2).double())  # nothing parallel is left
    assert float(first.flatten(1).norm(dim=1).max()) <= 2.5 + 1e-9
    other = torch.randn(2, 3, 4, 4).double()
    assert not torch.allclose(guide(cond, other, 2.0), APG(APGConfig())(cond, other, 2.0))  # it remembers


@pytest.mark.parametrize("nested", ["uniform", "pow2", "uniform_pow2"])
def test_nested_dropout_keeps_what_it_says(nested):
    model = tokenizer(nested=nested)
    kept = model.keep(Noise(torch.arange(4000)))
    counts = torch.bincount(kept, minlength=7)[1:] / 4000
    wanted = {
        "uniform": [1 / 6] * 6,
        "pow2": [1 / 4, 1 / 4, 0, 1 / 4, 0, 1 / 4],
        "uniform_pow2": [1 / 6, 1 / 6, 0, 2 / 6, 0, 2 / 6],
    }[nested]
    torch.testing.assert_close(counts, torch.tensor(wanted), atol=0.03, rtol=0)


@pytest.mark.parametrize("times", ["logit_normal", "stratified", "mode"])
def test_training_times(times):
    t = tokenizer(times=times).draw_times(Noise(torch.arange(512)))
    assert bool(((t > 0) & (t < 1)).all())
    assert abs(float(t.mean()) - 0.5) < 0.05
    if times == "logit_normal":
        later = tokenizer(time_mean=1.0).draw_times(Noise(torch.arange(512)))
        torch.testing.assert_close(later.logit(), t.logit() + 1)
    if times == "stratified":
        assert sorted((t * 512).long().tolist()) == list(range(512))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch": 3}, "can't be cut into patches"),
        ({"encoder_dim": 40}, "not multiples of head_dim"),
        ({"registers": 0}, "at least 1"),
        ({"repa": "efficientnet-lite0", "repa_block": 2}, "none of the decoder's 2 blocks"),
    ],
)
def test_sizes_that_do_not_go_together_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        FlexTok(dataclasses.replace(TINY, **changes))


def test_saved_and_loaded(tmp_path):
    model = tokenizer(kinds=1, learned_null=False)
    again = from_pretrained(model.save_pretrained(tmp_path / "t"))
    tokens = model.encode(images(2))
    assert torch.equal(again.encode(images(2)).values, tokens.values)
    assert torch.equal(again.decode(tokens.first(2)), model.decode(tokens.first(2)))
    assert not any("fsq" in name or "positions" in name.split(".")[-1:] for name in model.state_dict())


# -- training --------------------------------------------------------------------------------------------------


def run(folder, vae, **changes):
    fields = {
        "name": "tiny",
        "model": TINY,
        "tokenizer": str(vae),
        "data": DataConfig(source=str(folder), flip=True),
        "optim": OptimConfig(lr=3e-3, warmup=16),
        "images": 64,
        "batch_size": 8,
        "precision": "fp32",
        "sample_every": 0,
        "save_every": 0,
        "threads": 1,
    }
    return run_config(**{**fields, **changes})


def test_training_learns_and_leaves_the_autoencoder_alone(tmp_path, picture_folder, tiny_tokenizer):
    model = from_pretrained(train(run(picture_folder, tiny_tokenizer), tmp_path / "run", device="cpu"))
    vae = from_pretrained(tiny_tokenizer)
    for name, value in vae.state_dict().items():
        assert torch.equal(model.vae.state_dict()[name], value), name
    assert model.extra["data"]["classes"] == ["blue", "red"]
    torch.manual_seed(0)
    fresh, noise = FlexTok(TINY), Noise(torch.arange(256))
    latents = torch.randn(1, 16, 4).expand(256, -1, -1)
    optimizer = torch.optim.Adam(fresh.decoder.parameters(), lr=3e-3)
    losses = []
    for _ in range(25):
        terms = fresh.loss(latents, noise)
        optimizer.zero_grad()
        terms["loss"].backward()
        optimizer.step()
        losses.append(float(terms["flow"]))
    assert losses[-1] < 0.8 * losses[0]
    assert all(p.grad is None for p in fresh.vae.parameters())


def test_an_autoencoder_is_needed_and_brings_its_sizes(picture_folder, tiny_tokenizer, tiny_xar):
    with pytest.raises(ValueError, match="needs --tokenizer MODEL"):
        build_task(run(picture_folder, ""))
    with pytest.raises(ValueError, match="stands on a kl_vae"):
        build_task(run(picture_folder, tiny_xar))
    task = build_task(run(picture_folder, tiny_tokenizer, model=dataclasses.replace(TINY, vae=KLVAEConfig())))
    assert task.model.config.vae == VAE
    with pytest.raises(ValueError, match="the autoencoder under the flextok"):
        tokenizer(vae=dataclasses.replace(VAE, layers=2)).adopt(task.model.vae)


def test_alignment_pulls_towards_features(picture_folder, tiny_tokenizer, monkeypatch):
    from train import repa

    real = repa.FrozenFeatures.__init__
    monkeypatch.setattr(
        "train.flextok.FrozenFeatures.__init__",
        lambda self, name, **options: real(self, "test_vit", pretrained=False, **options),
    )
    model = dataclasses.replace(TINY, repa="some network")
    task = build_task(run(picture_folder, tiny_tokenizer, model=model))
    optimizer = torch.optim.Adam([p for p in task.parameters() if p.requires_grad], lr=3e-3)
    aligned = []
    for _ in range(12):
        terms = task(task.batch(0, 8), 0)
        optimizer.zero_grad()
        terms["loss"].backward()
        optimizer.step()
        aligned.append(float(terms["alignment"]))
    assert aligned[-1] > aligned[0] + 0.1
    assert not any("projector" in name for name in task.model.state_dict())


def test_shipped_sizes():
    model = PRESETS["flextok-d6-emoji64"]().model
    assert math.prod(model.levels) >= 1024
    generators = [PRESETS[name]().model for name in ("flexar-emoji64", "flexar-text-emoji64")]
    spec = FlexTok(model).spec
    for g in generators:
        require_fit("tokenizer", spec, "generator", FlexAR(g).spec)


# -- the generator that may stop ---------------------------------------------------------------------------------


def flexar():
    torch.manual_seed(0)
    model = FlexAR(FlexARConfig(grid=(1, 6), vocab=60, num_classes=2, dim=32, depth=2, heads=2)).eval()
    torch.nn.init.normal_(model.output[0].weight, std=0.5)
    return model


LABELS, SEEDS = torch.tensor([0, 1, 1]), torch.tensor([5, 6, 7])


def test_stopping_early_gives_the_same_first_tokens():
    model = flexar()
    sampler = AncestralSampler(AncestralConfig(guidance=Guidance(scale=2.0, schedule="linear")))
    full, short = (sampler.sample(g, LABELS, SEEDS) for g in (model, model.first(2)))
    assert torch.equal(full.tokens.values[:, :2], short.tokens.values[:, :2])
    assert short.tokens.kept.tolist() == [2, 2, 2]
    assert short.stats.model_calls == 2
    with pytest.raises(ValueError, match="draws 1 to 6 tokens"):
        model.first(7)


@pytest.mark.parametrize("k", [6, 3])
def test_speculative_jacobi_draws_it_and_refuses_neighbours(k):
    model = flexar().first(k)
    plain = {"coupling": "gumbel", "window": 1, "init": "random"}
    one = SpeculativeJacobiSampler(SpeculativeJacobiConfig(**plain)).sample(model, LABELS, SEEDS)
    many = SpeculativeJacobiSampler(SpeculativeJacobiConfig(**plain | {"window": 4})).sample(model, LABELS, SEEDS)
    assert torch.equal(one.tokens.values, many.tokens.values)
    for init in ("horizontal", "vertical"):
        with pytest.raises(ValueError, match="raster order"):
            SpeculativeJacobiSampler(SpeculativeJacobiConfig(init=init)).sample(model, LABELS, SEEDS)


def test_it_stops_where_the_image_settles(tmp_path):
    model, folder = flexar(), tokenizer().save_pretrained(tmp_path / "t")
    plain = AncestralSampler().sample(model, LABELS, SEEDS).tokens.values

    def draw(tolerance, **options):
        config = UntilSettledConfig(tolerance=tolerance, tokenizer=str(folder), **options)
        return UntilSettledSampler(config).sample(model, LABELS, SEEDS)

    never, at_once = draw(0.0), draw(1e9)
    assert torch.equal(never.tokens.values, plain)
    assert never.tokens.kept.tolist() == [6, 6, 6]
    assert at_once.tokens.kept.tolist() == [1, 1, 1]
    assert torch.equal(at_once.tokens.values[:, :2], plain[:, :2])
    assert at_once.stats.model_calls == 2 < never.stats.model_calls
    t = from_pretrained(folder)
    steps = [t.decode(never.tokens.first(k), SEEDS) for k in (1, 2, 4, 6)]
    change = torch.stack([(a - b).square().mean((1, 2, 3)).sqrt() for a, b in zip(steps, steps[1:], strict=False)])
    between = float(change.detach().flatten().sort().values[4])
    wanted = [next((k for k, c in zip((1, 2, 4), row, strict=True) if c < between), 6) for row in change.T.tolist()]
    assert draw(between).tokens.kept.tolist() == wanted
    with pytest.raises(ValueError, match="checks must rise"):
        draw(0.1, checks=(4, 2))
    with pytest.raises(ValueError, match="name the MODEL that decodes"):
        UntilSettledSampler().sample(model, LABELS, SEEDS)


def test_a_raster_is_refused():
    with pytest.raises(ValueError, match="grid must be"):
        FlexAR(FlexARConfig(grid=(4, 4)))


# -- commands ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A tokenizer, and a generator whose checkpoint names it."""
    folder = tmp_path_factory.mktemp("flex")
    t = tokenizer(levels=(5, 4, 3)).save_pretrained(folder / "t")
    g = flexar()
    g.extra = {"tokenizer": str(t), "data": {"classes": ["blue", "red"]}}
    return t, g.save_pretrained(folder / "g")


def test_the_bench_measures_every_count_of_tokens(tmp_path, saved):
    g = FlexAR(FlexARConfig(grid=(1, 6), vocab=60, num_classes=10, dim=32, depth=1, heads=2))
    g.extra = {"tokenizer": str(saved[0])}
    c = bench.FlexTokBenchConfig(
        tokenizer=str(saved[0]), generator=str(g.save_pretrained(tmp_path / "g")), text_generator="", out=tmp_path,
        counts=(1, 6), n=8,
    )  # fmt: skip
    result = bench.run(c)
    assert [row["tokens"] for row in result["reconstruction"]["rows"]] == [1, 6]
    assert [row["tokens"] for row in result["generation"]["rows"]] == [1, 6]
    assert result["reconstruction"]["speed"]["largest_difference"] < 1e-5
    assert all((tmp_path / f"{name}.png").is_file() for name in ("curves", "reconstructions", "samples"))
    said = bench.describe(result)
    assert f"codes used: {result['reconstruction']['usage']['usage']:.1%} of 60" in said
    assert json.loads((tmp_path / "result.json").read_text())["tokens"] == result["tokens"]
    with pytest.raises(ValueError, match="has 1 to 6 tokens"):
        bench.run(dataclasses.replace(c, counts=(7,)))


def test_sample_shows_one_column_a_count(tmp_path, saved, capsys):
    from PIL import Image

    from genlab.commands.sample import main

    path = tmp_path / "grid.png"
    words = [str(saved[1]), "--seeds", "0-1", "--device", "cpu", "--grid", str(path)]
    assert main([*words, "--tokens", "1,2,6"]) == 0
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["columns"] == [1, 2, 6]
    with Image.open(path) as image:
        assert image.height > 4 * 16
    assert main([*words, "--tokens", "all", "--sampler", "until-settled", "--set", "tolerance=1e9"]) == 0
    assert json.loads((tmp_path / "manifest.json").read_text())["tokens_drawn"] == [1] * 4
    with pytest.raises(ValueError, match="takes 1 to 6 here"):
        main([*words, "--tokens", "1,7"])
    with pytest.raises(ValueError, match="--tokens writes one grid"):
        main([*words[:-2], "--out", str(tmp_path / "o"), "--tokens", "1"])


def test_reconstruct_tells_each_count(saved, picture_folder, tiny_tokenizer, tmp_path, capsys):
    from genlab.commands.reconstruct import main

    words = ["--images", f"{picture_folder}", "--n", "3", "--no-fd", "--device", "cpu", "--json"]
    assert main([str(saved[0]), "--tokens", "1,6", "--grid", str(tmp_path / "r.png"), *words]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["psnr_1_tokens"] != figures["psnr_6_tokens"]
    assert [len(channel["shares"]) for channel in figures["channels"]] == [5, 4, 3]
    assert main([str(saved[0]), *words[:-1]]) == 0
    assert "channel 2: levels" in capsys.readouterr().out
    with pytest.raises(ValueError, match="must be ordered"):
        main([str(tiny_tokenizer), "--tokens", "1", *words])


def test_convert_shows_the_licence_and_finds_the_scale(tmp_path, capsys):
    from safetensors import safe_open
    from safetensors.torch import save_file

    from genlab.commands.convert import main
    from tests.parity.fill import fill

    case = Path(__file__).parents[1] / "parity/cases/flextok-roundtrip.safetensors"
    with safe_open(str(case), "pt") as file:
        shapes = json.loads(file.metadata()["shapes"])
    vae = {k.removeprefix("vae."): v for k, v in fill(shapes, 0).items() if k.startswith("vae.")}
    for name, value in list(vae.items()):  # the CLI assumes 32 groups, as published: widen what is normalised
        vae[name] = value.repeat(*(4 if n == 8 else 1 for n in value.shape))
    vae["vae.quant_conv.weight"], vae["vae.quant_conv.bias"] = torch.randn(8, 8, 1, 1), torch.zeros(8)
    vae["vae.encoder.conv_out.weight"] = torch.randn(8, 32, 3, 3) / 17
    vae["vae.encoder.conv_out.bias"] = torch.zeros(8)
    source = tmp_path / "model.safetensors"
    save_file({k: v.contiguous() for k, v in vae.items()}, source)
    words = ["flextok-vae", str(source), str(tmp_path / "out")]
    with pytest.raises(ValueError, match="doesn't say its scaling_factor"):
        main(words)
    assert "research only" in capsys.readouterr().err
    (tmp_path / "config.json").write_text('{"vae": {"scaling_factor": 0.25}}')
    assert main(words) == 0
    model = from_pretrained(tmp_path / "out")
    assert float(model.latent_std[0]) == 4.0
    assert "research only" in (tmp_path / "out" / "README.md").read_text()


def test_tokens_needed():
    alike = np.array([[0.1, 0.96, 0.99], [0.9, 0.5, 0.99], [1.0, 1.0, 1.0]])
    assert bench.tokens_needed(alike, [1, 2, 4], 0.95).tolist() == [4, 4, 1]  # a lucky first token doesn't count
    needs = np.repeat([1, 4], 15)
    alike = np.where(needs[None] <= np.array([1, 2, 4])[:, None], 1.0, 0.0)
    said = bench.by_complexity(alike, np.arange(30.0), [1, 2, 4], 0.95)
    assert (said["simple"]["tokens_needed"], said["complex"]["tokens_needed"]) == (1.0, 4.0)
    assert (said["simple"]["of_the_mean"], said["complex"]["of_the_mean"]) == (1, 4)
    assert said["low"] == said["high"] == said["difference"] == 3.0
    assert said["rank_correlation"] > 0.8
    assert bench.by_complexity(np.ones((3, 9)), np.arange(9.0), [1, 2, 4], 0.95)["rank_correlation"] == 0


def test_similarity_is_zero_for_strangers_and_one_for_twins():
    x = np.eye(6) + 1.0
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    np.testing.assert_allclose(bench.similarity(x, x), 1.0)
    assert bench.similarity(np.roll(x, 1, 0), x).max() < 1e-9

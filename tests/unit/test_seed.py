"""SEED: causality, the spaces its codes serve, its stages of training, and what draws its codes."""

import dataclasses
import shutil

import pytest
import torch

from genlab.generators.xar import XAR, XARConfig
from genlab.hub import from_pretrained
from genlab.text import Text
from genlab.tokens import Tokens
from tokenizers_img.kl_vae import KLVAE, KLVAEConfig
from tokenizers_img.qformer import LITE0, FrozenEncoder, QFormer
from tokenizers_img.seed import KEEPERS, PARTS, SEED, OwnLinear, SEEDConfig, smooth_cross_entropy
from train.config import DataConfig, OptimConfig, run_config
from train.loop import train
from train.presets import PRESETS

VAE = KLVAEConfig(image_size=16, patch=4, channels=(16,), layers=1, latent_channels=4, norm_groups=4, shortcut=True)
PAINTER = XARConfig(
    grid=(4, 4), channels=4, condition="text", text_dim=1280, text_length=1, entity="image", dim=32, encoder_depth=1,
    decoder_depth=1, heads=2, dropout=0.0, steps=2,
)  # fmt: skip
TINY = SEEDConfig(
    image_size=16, encoder=LITE0, encoder_args={}, encoder_size=64, encoder_dim=1280, queries=6, dim=32, depth=4,
    heads=2, hidden=48, dropout=0.0, contrastive_dim=16, codes=40, code_dim=8, blocks=1, target_dim=1280,
)  # fmt: skip


def tokenizer(**changes):
    torch.manual_seed(0)
    model = SEED(dataclasses.replace(TINY, **changes)).eval()
    torch.nn.init.normal_(model.codebook)
    for p in model.parameters():
        if not bool(p.any()):
            torch.nn.init.normal_(p, std=0.3)
    return model


def qformer(**fields):
    torch.manual_seed(0)
    sizes = {"dim": 16, "heads": 2, "hidden": 24, "context_dim": 12}
    net = QFormer(**sizes | fields).eval()
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return net


def images(n=3):
    return torch.rand(n, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1


# -- the Q-Former -------------------------------------------------------------------------------------------------


def test_a_query_sees_no_later_query_and_all_of_the_image():
    net = qformer(queries=7, depth=4, causal=True)
    features, queries = torch.randn(2, 5, 12), torch.randn(2, 7, 16)
    before = net(features, queries)
    for i in range(7):
        changed = queries.clone()
        changed[:, i] *= -1  # not + 1: the normalisation would take it away
        moved = (net(features, changed) - before).abs().amax((0, 2)) > 1e-6
        assert moved.tolist() == [j >= i for j in range(7)]
    features[:, 4] *= -1
    assert bool(((net(features, queries) - before).abs().amax(2) > 1e-6).all())


def test_without_the_mask_all_see_all():
    net = qformer(queries=3, depth=1, causal=False)
    features, queries = torch.randn(1, 5, 12), torch.randn(1, 3, 16)
    before = net(features, queries)
    queries[:, 2] *= -1
    assert bool(((net(features, queries) - before).abs().amax(2) > 1e-6).all())


def test_it_looks_at_the_image_in_every_second_layer():
    net = qformer(queries=2, depth=5, causal=True)
    assert [layer.cross is not None for layer in net.layers] == [True, False, True, False, True]
    with pytest.raises(ValueError, match="no multiple"):
        qformer(queries=2, depth=1, heads=3, causal=True)


# -- the tokenizer ------------------------------------------------------------------------------------------------


def test_code_i_hangs_on_no_later_query():
    model, x = tokenizer(), images()
    ids = model.encode(x).values
    assert ids.shape == (3, 6)
    assert (
        model.spec.describe() == "discrete (6,), 40 codes, coarse_to_fine, for 16x16 images" or model.spec.vocab == 40
    )
    features = model.image_encoder().features(x)
    for i in range(6):
        other = tokenizer()
        with torch.no_grad():
            other.qformer.queries[i] *= -1
        other._outside = model._outside
        assert torch.equal(other.encode_features(features).values[:, :i], ids[:, :i])


def test_the_codes_are_the_nearest():
    model = tokenizer()
    z = torch.randn(4, 6, 8)
    ids, codes = model.quantise(z)
    assert torch.equal(ids, (z[:, :, None] - model.codebook).square().sum(-1).argmin(-1))
    assert torch.equal(codes, model.codebook[ids])


@pytest.mark.parametrize("saved", [False, True])
@torch.no_grad()
def test_weights_and_images_of_any_floating_point_type(saved):
    model = tokenizer(encoder_saved=saved)
    ids = model.encode(images()).values
    assert torch.equal(model.encode(images().double()).values, ids)
    model.bfloat16()
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        assert float((model.encode(images().to(dtype)).values == ids).float().mean()) > 0.5


def test_both_spaces(tmp_path):
    model = tokenizer()
    tokens = model.encode(images())
    for e in (model.embed_images(images()), model.embed_codes(tokens), model.embed_text(["a red apple", "a", "cat"])):
        assert e.shape == (3, 16)
        torch.testing.assert_close(e.norm(dim=1), torch.ones(3))
    assert model.target(model.codebook[tokens.values]).shape == (3, 1280)
    with pytest.raises(ValueError, match="all 6, not the first 2"):
        model.embed_codes(tokens.first(2))
    again = from_pretrained(model.save_pretrained(tmp_path / "m"))
    assert torch.equal(again.encode(images()).values, tokens.values)


def test_padding_of_captions_does_not_count():
    model = tokenizer()
    e = torch.randn(1, 3, 384)
    long = Text(torch.cat([e, torch.randn(1, 2, 384)], 1), torch.tensor([[True, True, True, False, False]]))
    torch.testing.assert_close(model.embed_text(Text(e)), model.embed_text(long))


def test_the_generators_targets():
    seed1 = tokenizer(target="sd_text77", reverse="qformer", target_tokens=5, target_dim=12)
    assert seed1.target(seed1.codebook[seed1.encode(images()).values]).shape == (3, 5, 12)
    seed2 = tokenizer(reverse="qformer", target_dim=12)
    assert seed2.target(seed2.codebook[seed2.encode(images()).values]).shape == (3, 12)
    with pytest.raises(ValueError, match="reverse `down` gives one embedding"):
        tokenizer(target="sd_text77")


def test_what_a_checkpoint_lacks_is_said():
    model = tokenizer(contrastive_dim=0, restores=False)
    tokens = model.encode(images())
    for call in (lambda: model.embed_images(images()), lambda: model.embed_text(["a"])):
        with pytest.raises(ValueError, match="no contrastive space"):
            call()
    with pytest.raises(ValueError, match="lacks the blocks that restore"):
        model.embed_codes(tokens)
    with pytest.raises(ValueError, match="can't draw: its config names no generator"):
        model.decode(tokens)
    with pytest.raises(FileNotFoundError, match="no StableUnCLIPImg2ImgPipeline at '/no/such'"):
        tokenizer(diffusion="/no/such").decode(tokens)


def test_the_encoder_stays_as_it_is():
    encoder = FrozenEncoder(LITE0, size=64, image_size=16).train()
    assert not encoder.net.training
    assert not any(p.requires_grad for p in encoder.parameters())
    assert encoder.encode(images()).values.shape == (3, 4, 1280)


# -- its losses -----------------------------------------------------------------------------------------------------


def test_equal_captions_are_no_counter_examples():
    logits = torch.tensor([[5.0, 5.0, 0.0], [5.0, 5.0, 0.0], [0.0, 0.0, 5.0]])
    masked = logits.masked_fill(torch.tensor([[0, 1, 0], [1, 0, 0], [0, 0, 0]]).bool(), -1e4)
    assert float(smooth_cross_entropy(masked, 0.0)) < float(smooth_cross_entropy(logits, 0.0)) / 10
    plain = torch.nn.functional.cross_entropy(logits, torch.arange(3), label_smoothing=0.1)
    torch.testing.assert_close(smooth_cross_entropy(logits, 0.1), plain)


def test_stage_two_leaves_the_q_former_alone_and_reaches_the_rest():
    model = tokenizer(stage="codes").train()
    model.freeze_others()
    terms = model.codes_loss(torch.randn(4, 4, 1280), torch.randn(4, 1280))
    terms["loss"].backward()
    reached = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None and bool(p.grad.any())}
    assert reached == set(PARTS["codes"])
    torch.testing.assert_close(terms["loss"], 5 * terms["vq"] + 2 * (1 - terms["cosine"]) + 0.5 * terms["target"])


def test_stage_two_may_also_compare_with_captions():
    model = tokenizer(stage="codes", contrast=0.5).train()
    model.freeze_others()
    text = model.reader()(["a cat", "a dog", "a red apple", "a cat"])
    says = torch.tensor([0, 1, 2, 0])
    terms = model.codes_loss(torch.randn(4, 4, 1280), torch.randn(4, 1280), None, text, says)
    plain = 5 * terms["vq"] + 2 * (1 - terms["cosine"]) + 0.5 * terms["target"]
    torch.testing.assert_close(terms["loss"], plain + 0.5 * terms["contrast"])
    terms["loss"].backward()
    assert model.image_head.weight.grad is None
    with pytest.raises(ValueError, match="give text"):
        model.codes_loss(torch.randn(4, 4, 1280), torch.randn(4, 1280))


def test_stage_two_weighs_its_terms():
    model = tokenizer(stage="codes", weights=(1.0, 3.0, 7.0))
    terms = model.codes_loss(torch.randn(4, 4, 1280), torch.randn(4, 1280))
    torch.testing.assert_close(terms["loss"], terms["vq"] + 3 * (1 - terms["cosine"]) + 7 * terms["target"])


def test_stage_one_may_keep_what_the_generator_takes():
    model = tokenizer(keep=2.0, own_down=True).train()
    model.freeze_others()
    text, features, target = model.reader()(["a cat", "a dog"]), torch.randn(2, 4, 1280), torch.randn(2, 1280)
    terms = model.contrastive_loss(features, text, None, target)
    plain = tokenizer(own_down=True).contrastive_loss(features, text)
    torch.testing.assert_close(terms["loss"], plain["loss"] + 2 * terms["target"])
    terms["loss"].backward()
    reached = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None and bool(p.grad.any())}
    assert reached == set(model.parts()) - {"encoder"} == set(PARTS["contrastive"] + KEEPERS) - {"encoder"}
    with pytest.raises(ValueError, match="give target"):
        model.contrastive_loss(features, text)


def test_each_query_may_have_its_own_map_to_its_code():
    torch.manual_seed(0)
    down = OwnLinear(3, 5, 2)
    torch.nn.init.normal_(down.bias)
    x = torch.randn(4, 3, 5)
    for i in range(3):
        torch.testing.assert_close(down(x)[:, i], x[:, i] @ down.weight[i] + down.bias[i])
    model, images_ = tokenizer(own_down=True), images()
    assert model.encode(images_).values.shape == (3, 6)


def test_the_target_begins_at_its_mean(tmp_path, captioned):
    """Stage two goes on from what stage one kept, and starts it where stage one kept nothing."""
    own = {"keep": 1.0, "own_down": True}
    first = train(run(captioned, "contrastive", model=own), tmp_path / "1", device="cpu")
    codes = run(captioned, "codes", 8, init=str(first), model={"own_down": True})
    second = from_pretrained(train(codes, tmp_path / "2", device="cpu"))
    kept = from_pretrained(first)
    assert not torch.equal(kept.down.weight, tokenizer(own_down=True).down.weight)
    frozen = dataclasses.replace(codes, freeze=("to_target", "down"))
    again = from_pretrained(train(frozen, tmp_path / "3", device="cpu"))
    assert torch.equal(again.to_target.bias, kept.to_target.bias)
    assert torch.equal(again.down.weight, kept.down.weight)
    assert not torch.equal(second.to_target.bias, kept.to_target.bias)
    bare = train(run(captioned, "contrastive", 8), tmp_path / "4", device="cpu")
    started = from_pretrained(
        train(run(captioned, "codes", 8, init=str(bare), freeze=("to_target",)), tmp_path / "5", device="cpu")
    )
    assert float(started.to_target.bias.detach().square().mean()) > 0.1  # targets have a mean square of 1


def test_the_text_side_starts_as_the_text_encoders_own_space():
    model = SEED(dataclasses.replace(TINY, contrastive_dim=384))
    e = model.embed_text(["a cat", "a red apple"])
    own = model.reader()(["a cat", "a red apple"])
    mean = torch.stack([own.embeds_BTD[i, own.mask_BT[i]].mean(0) for i in range(2)])
    torch.testing.assert_close(e, torch.nn.functional.normalize(mean, dim=-1))


def test_a_cold_codebook_is_put_where_the_encodings_are():
    model = tokenizer()
    torch.nn.init.uniform_(model.codebook, -1 / 40, 1 / 40)
    features = model.image_encoder().features(images(24))
    few = len(model.encode_features(features).values.unique())
    model.start_codes(features)
    assert len(model.encode_features(features).values.unique()) > max(15, few)


def painted(folder, **changes):
    """A seed with an autoencoder and an untrained generator that draws its codes."""
    torch.manual_seed(0)
    generator = XAR(PAINTER)
    generator.extra["tokenizer"] = str(KLVAE(VAE).save_pretrained(folder / "vae"))
    for p in generator.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return tokenizer(generator=str(generator.save_pretrained(folder / "painter")), **changes)


def test_a_generator_draws_the_codes_or_their_first(tmp_path):
    model = painted(tmp_path)
    tokens, seeds = model.encode(images()), torch.arange(3)
    drawn = model.decode(tokens, seeds)
    assert drawn.shape == (3, 3, 16, 16)
    assert float(drawn.detach().abs().max()) <= 1
    torch.testing.assert_close(model.decode(tokens[1:2], seeds[1:2])[0], drawn[1], atol=1e-4, rtol=0)
    other = Tokens((tokens.values + 7) % 40, tokens.spec)
    assert not torch.allclose(model.decode(other, seeds), drawn, atol=1e-2)
    assert not torch.allclose(model.decode(tokens, seeds, guidance=1.0), drawn, atol=1e-2)
    assert torch.equal(model.decode(tokens, seeds, steps=2), drawn)
    few = model.decode(tokens.first(2), seeds)
    tail = Tokens(tokens.values.clone(), model.spec)
    tail.values[:, 2:] = (tail.values[:, 2:] + 1) % 40
    assert torch.equal(few, model.decode(tail.first(2), seeds))
    assert not torch.allclose(few, drawn, atol=1e-2)
    assert torch.equal(from_pretrained(model.save_pretrained(tmp_path / "m")).decode(tokens, seeds), drawn)
    with pytest.raises(ValueError, match="draws from one embedding an image"):
        tokenizer(target="sd_text77", reverse="qformer", generator=model.config.generator).decode(tokens, seeds)
    with pytest.raises(ValueError, match=r"a seed a row: \(3,\) for 3 rows, got \(1,\)"):
        model.decode(tokens, seeds[:1])
    large = tokenizer(image_size=32, generator=model.config.generator)
    with pytest.raises(ValueError, match="draws 16 pixels, not 32"):
        large.decode(tokens, seeds)


def test_what_draws_codes_says_that_it_reads_no_words():
    painter = XAR(PAINTER)
    painter.extra["codes_of"] = "seed-emoji64"
    with pytest.raises(
        ValueError, match="draws the codes of seed-emoji64, not words: `genlab reconstruct seed-emoji64`"
    ):
        painter.read_captions(["a red apple"])


# -- training -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def captioned(tmp_path_factory, picture_folder):
    root = tmp_path_factory.mktemp("seed") / "pictures"
    shutil.copytree(picture_folder, root)
    for image in root.rglob("*.png"):
        image.with_suffix(".txt").write_text(f"a {image.parent.name} square, the {image.stem}th")
    return root


def run(source, stage, images=32, **fields):
    model = fields.pop("model", {})
    return run_config(
        name=stage, model=dataclasses.replace(TINY, stage=stage, **model),
        data=DataConfig(source=str(source), flip=True),
        optim=OptimConfig(lr=1e-3, warmup=8), images=images, batch_size=8, precision="fp32", sample_every=0,
        save_every=16, log_every=8, threads=1, **fields,
    )  # fmt: skip


def test_stages_drawing_and_resuming(tmp_path, captioned):
    torch.manual_seed(0)
    vae = KLVAE(VAE).save_pretrained(tmp_path / "vae")
    first = train(dataclasses.replace(run(captioned, "contrastive"), sample_every=32), tmp_path / "1", device="cpu")
    codes = run(captioned, "codes", init=str(first))
    second = train(codes, tmp_path / "2", device="cpu")
    a, b = from_pretrained(first), from_pretrained(second)
    for name, value in a.state_dict().items():
        same = torch.equal(value, b.state_dict()[name])
        assert same == (name.split(".")[0] in PARTS["contrastive"]), name
    # stopped half-way and taken up again: the same weights, bit for bit
    shutil.copytree(tmp_path / "2", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "model")
    for folder in (tmp_path / "again" / "checkpoints").iterdir():
        if "16" not in folder.name:
            shutil.rmtree(folder)
    resumed = from_pretrained(train(codes, tmp_path / "again", device="cpu"))
    for name, value in b.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    draws = run_config(
        name="paint", model=PAINTER, tokenizer=str(vae), codes_of=str(second),
        data=DataConfig(source=str(captioned), flip=True), optim=OptimConfig(lr=1e-3, warmup=8), images=16,
        batch_size=8, precision="fp32", sample_every=16, save_every=16, log_every=8, threads=1,
    )  # fmt: skip
    painter = train(draws, tmp_path / "3", device="cpu")
    assert from_pretrained(painter).extra["codes_of"] == str(second)
    assert (tmp_path / "3/samples/000000016.png").is_file()
    model = SEED(dataclasses.replace(b.config, generator=str(painter))).eval()
    model.load_state_dict(b.state_dict())
    assert model.decode(model.encode(images())).shape == (3, 3, 16, 16)
    narrow = dataclasses.replace(PAINTER, text_dim=5)
    with pytest.raises(ValueError, match=r"text-dim 1280 --model\.text-length 1"):
        train(dataclasses.replace(draws, model=narrow), tmp_path / "4", device="cpu")
    assert "text_encoder" not in from_pretrained(painter).extra
    by_class = dataclasses.replace(draws, model=dataclasses.replace(PAINTER, condition="class"))
    with pytest.raises(ValueError, match=r"set --model\.condition text"):
        train(by_class, tmp_path / "6", device="cpu")
    with pytest.raises(ValueError, match="holds a kl_vae: give a seed"):
        train(dataclasses.replace(draws, codes_of=str(vae)), tmp_path / "5", device="cpu")


def test_stage_two_towards_text_features(tmp_path, captioned):
    first = tokenizer().save_pretrained(tmp_path / "1")
    model = {"target": "sd_text77", "reverse": "qformer", "target_tokens": 20, "target_dim": 384}
    trained = from_pretrained(
        train(run(captioned, "codes", 8, init=str(first), model=model), tmp_path / "2", device="cpu")
    )
    assert trained.target(trained.codebook[trained.encode(images()).values]).shape == (3, 20, 384)


def test_what_a_stage_lacks_is_said(tmp_path, captioned):
    first = tokenizer().save_pretrained(tmp_path / "1")
    for fields, complaint in (
        ({"stage": "codes"}, "starts from stage contrastive: give --init MODEL"),
        ({"stage": "contrastive", "tokenizer": str(first)}, "takes no --tokenizer"),
        ({"stage": "contrastive", "model": {"text_dim": 5}}, "--model.text-dim 384"),
        ({"stage": "codes", "init": str(first), "model": {"target_dim": 7}}, "--model.target-dim 1280"),
    ):
        with pytest.raises(ValueError, match=complaint):
            train(run(captioned, **fields), tmp_path / "run", resume="never", device="cpu")


@pytest.mark.parametrize("name", [n for n in PRESETS if n.startswith("seed-")])
def test_presets_build(name):
    with torch.device("meta"):
        assert SEED(PRESETS[name]().model).spec.length == 32

"""Divot's published files: every name in its place, nothing left over."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from genlab.cli import main
from genlab.convert.divot import convert_divot, convert_divot_lm
from genlab.generators.divot_lm import DivotLM
from genlab.hub import from_pretrained
from genlab.nn.zero_snr import signal_levels
from tests.parity.fill import fill
from tests.unit.test_divot import TINY
from tests.unit.test_divot_lm import LM, make
from tokenizers_img.divot import Divot
from tokenizers_img.divot_nets import Resampler
from tokenizers_img.video_unet import VideoUNetConfig

CASES = Path(__file__).parents[1] / "parity/cases"
INSIDE = {"norm1": "0.norm1", "norm2": "0.norm2", "attn.q": "0.to_q", "attn.kv": "0.to_kv", "attn.proj": "0.to_out",
          "norm3": "1.0", "fc1": "1.1", "fc2": "1.3"}  # fmt: skip


def official(model):
    """A small encoder's weights under the release's names: the converter's way back, written apart."""
    state, out = model.state_dict(), {}
    for key, value in state.items():
        if key.startswith("seen_"):
            continue
        if ".attn.kv." in key and "resampler" not in key:
            continue  # with its q, below
        if block := re.match(r"temporal\.blocks\.(\d+)\.(.+)", key):
            rest = block[2]
            if rest.startswith("attn.q."):
                value = torch.cat([value, state[key.replace(".q.", ".kv.")]])
                rest = "attn.in_proj_" + rest.removeprefix("attn.q.")
            rest = rest.replace("attn.proj", "attn.out_proj").replace("norm", "ln_")
            rest = rest.replace("fc1", "mlp.c_fc").replace("fc2", "mlp.c_proj")
            name = f"temporal_encoder.transformer.resblocks.{block[1]}.{rest}"
        elif key.startswith("temporal."):
            name = key.replace("temporal.norm", "temporal_encoder.ln_final").replace("temporal.", "temporal_encoder.")
            name = name.replace("encoder.position", "encoder.positional_embedding")
        elif block := re.match(r"spatial\.blocks\.(\d+)\.(.+)", key):
            rest = block[2]
            if rest.startswith("attn.q."):
                value = torch.cat([value, state[key.replace(".q.", ".kv.")]])
                rest = "attn.qkv." + rest.removeprefix("attn.q.")
            rest = re.sub(r"^(fc\d)", r"mlp.\1", rest)
            name = f"image_proj_model.blocks.{block[1]}.{rest}"
        elif layer := re.match(r"spatial\.resampler\.layers\.(\d+)\.(.+)\.(weight|bias)", key):
            name = f"image_proj_model.down_sampler.layers.{layer[1]}.{INSIDE[layer[2]]}.{layer[3]}"
        elif key.startswith("spatial.resampler."):
            name = key.replace("spatial.resampler.", "image_proj_model.down_sampler.")
            value = value[None] if key.endswith("latents") else value
        else:
            name = key.replace("spatial.space", "image_proj_model.pos_embed_spatial")
            name = name.replace("spatial.time", "image_proj_model.pos_embed_temporal")
            name = name.replace("spatial.norm", "image_proj_model.norm")
        out[name] = value.clone()
    return out


@pytest.fixture
def encoder():
    torch.manual_seed(0)
    model = Divot(dataclasses.replace(TINY, denoiser_depth=0, local=False, resampler_heads=2, dim_head=8, width=16))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return model.eval()


OPTIONS = {
    "image_size": 32,
    "network": "efficientnet-lite0",
    "network_size": 32,
    "places": 2,
    "dim_head": 8,
    "heads": 2,
}


def test_the_encoder_converts(encoder):
    converted = convert_divot(official(encoder), **OPTIONS)
    assert converted.config.denoiser_depth == 0
    assert {k: v.shape for k, v in converted.state_dict().items()} == {
        k: v.shape for k, v in encoder.state_dict().items()
    }
    seen = torch.randn(2, 4, 4, TINY.channels)
    assert torch.allclose(converted.tokens_of(seen), encoder.tokens_of(seen), atol=1e-5)


def test_every_key_counts(encoder):
    state = official(encoder)
    with pytest.raises(ValueError, match="unexpected: surplus"):
        convert_divot(state | {"surplus": torch.zeros(1)}, **OPTIONS)
    with pytest.raises(ValueError, match=r"missing: norm\.bias"):
        convert_divot({k: v for k, v in state.items() if k != "norm.bias"}, **OPTIONS)
    with pytest.raises(ValueError, match="give this file with --detokenizer"):
        convert_divot({"diffusion_model.out.0.weight": torch.zeros(1)})


def detokenizer():
    """A small de-tokenizer's weights under the release's names, and the resampler in it.

    The shapes are those of the recorded cases, the U-Net's for 16 channels of latents and a condition of 32, the
    autoencoder's a quarter as wide.
    """
    shapes = {}
    for case in ("divot-unet", "kl_vae-roundtrip"):
        with safe_open(str(CASES / f"{case}.safetensors"), "pt") as file:
            shapes[case] = json.loads(file.metadata()["shapes"])
    unet = {k: [{24: 32}.get(n, n) for n in shape] for k, shape in shapes["divot-unet"].items()}
    unet |= {"input_blocks.0.0.weight": [32, 16, 3, 3], "out.2.weight": [16, 32, 3, 3], "out.2.bias": [16]}
    vae = {k: [n if n in (1, 3, 16, 32) else n // 4 for n in shape] for k, shape in shapes["kl_vae-roundtrip"].items()}
    torch.manual_seed(1)
    unpack = Resampler(16, 32, dim=32, depth=1, heads=2, dim_head=16, queries=80)
    state = {f"diffusion_model.{k}": v for k, v in fill(unet, 0).items()}
    state |= {f"first_stage_model.{k}": v for k, v in fill(vae, 1).items()}
    for key, value in unpack.state_dict().items():
        layer = re.match(r"layers\.(\d+)\.(.+)\.(weight|bias)", key)
        name = f"layers.{layer[1]}.{INSIDE[layer[2]]}.{layer[3]}" if layer else key
        state[f"image_proj_model.{name}"] = value[None] if key == "latents" else value
    return state | {"betas": torch.zeros(1000), "sqrt_alphas_cumprod": signal_levels().float()}, unpack.eval()


def test_the_detokenizer_converts():
    torch.manual_seed(0)
    encodes = official(Divot(dataclasses.replace(TINY, denoiser_depth=0, local=False)))
    options = OPTIONS | {"image_size": 64, "dim_head": 16}
    state, unpack = detokenizer()
    again = {f"video_tokenizer.{k}": v for k, v in encodes.items()}
    model = convert_divot(encodes, **options, detokenizer=state | again)
    c = model.config
    assert c.unet == VideoUNetConfig(channels=32, multipliers=(1, 2, 2), attention_levels=(0, 1), head_dim=16)
    assert (c.context, c.vae.latent_channels, c.vae.downsampling) == (80, 16, 16)
    assert model.vae.latent_std.tolist() == pytest.approx([1 / 0.18215] * 16)
    tokens = torch.randn(2, 8, 16)
    assert torch.equal(model.unpack(tokens), unpack(tokens))
    drawn = model.draw_latents(tokens[:1], torch.tensor([1]), steps=1, guidance=1.0)
    assert drawn.shape == (1, 16, 16, 4, 4)
    changed = next(iter(again))
    wrong = {k: v for k, v in state.items() if not k.endswith(".out.0.bias")}
    wrong |= {"surplus": torch.zeros(1), changed: again[changed] + 1}
    with pytest.raises(ValueError, match="missing") as error:
        convert_divot(encodes, **options, detokenizer=wrong)
    assert all(name in str(error.value) for name in ("denoiser.norm.bias", "surplus", changed))
    with pytest.raises(ValueError, match="another noise schedule"):
        convert_divot(encodes, **options, detokenizer=state | {"sqrt_alphas_cumprod": torch.ones(1000)})


def test_the_command_reads_a_bin_file(encoder, tmp_path, capsys):
    torch.save(official(encoder), tmp_path / "Divot_tokenizer.bin")
    words = ["convert", "divot", str(tmp_path / "Divot_tokenizer.bin"), str(tmp_path / "out"), "--image-size", "32"]
    assert main(words) == 2  # a network of other sizes than the release's: two heads of 64 don't fit
    assert "academic purpose only" in capsys.readouterr().err
    assert main(["list", "--published"]) == 0
    assert "Divot_tokenizer" in capsys.readouterr().out


@pytest.fixture
def folder(tmp_path):
    """A small LM of transformers with a tokenizer that knows a clip's words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    vocab = {w: i for i, w in enumerate(["<s>", "</s>", *"abcdefgh"])}
    pieces = Tokenizer(models.WordLevel(vocab, unk_token="<s>"))
    pieces.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=pieces, bos_token="<s>", eos_token="</s>")
    tokenizer.add_tokens(["<vid>", "</vid>", *(f"<frame_{i:05d}>" for i in range(64)), "<behind>"])
    tokenizer.save_pretrained(tmp_path / "llm")
    fields = {k: v for k, v in LM.items() if k != "model_type"}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **fields)).save_pretrained(tmp_path / "llm")
    agent = {}
    for name, sizes in (("input", (16, 32, 32)), ("output", (32, 3 * 33, 3 * 33))):
        for i, at in enumerate((0, 2)):
            agent[f"{name}_resampler.proj.{at}.weight"] = torch.randn(sizes[i + 1], sizes[i]) * 0.1
            agent[f"{name}_resampler.proj.{at}.bias"] = torch.randn(sizes[i + 1]) * 0.1
    (tmp_path / "agent").mkdir()
    torch.save(agent, tmp_path / "agent" / "pytorch_model.bin")
    return tmp_path


def test_the_language_model_converts(folder, capsys):
    """Words behind the clip's go; the clip's are where the tokenizer's table says."""
    agent = str(folder / "agent" / "pytorch_model.bin")
    assert main(["convert", "divot_lm", str(folder / "llm"), str(folder / "out"), "--agent", agent]) == 0
    model = from_pretrained(folder / "out")
    assert isinstance(model, DivotLM)
    assert (model.config.text_vocab, model.boi, model.eoi, model.config.components) == (12, 10, 11, 3)
    assert model.spec.shape == (64, 16)
    dist = model.predict(model.start(model.read_captions(["a b c"])))
    assert dist.mean_BGMC.shape == (1, 64, 3, 16)
    assert bool(dist.mean_BGMC.isfinite().all())
    capsys.readouterr()
    assert main(["convert", "divot_lm", str(folder / "llm"), str(folder / "out")]) == 2
    assert "--agent agent/pytorch_model.bin" in capsys.readouterr().err


def test_an_agent_of_another_shape_is_refused(folder):
    agent = torch.load(folder / "agent" / "pytorch_model.bin", weights_only=True)
    agent["output_resampler.proj.2.weight"] = torch.zeros(100, 99)
    with pytest.raises(ValueError, match="no mixture over 16 channels"):
        convert_divot_lm({}, source=folder / "llm", agent=agent)
    plain = make()
    (folder / "other").mkdir()
    (folder / "other" / "tokenizer.json").write_text(plain.extra["word_pieces"])
    (folder / "other" / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    agent["output_resampler.proj.2.weight"] = torch.zeros(99, 99)
    with pytest.raises(ValueError, match="lacks a clip's words"):
        convert_divot_lm({}, source=folder / "llm", agent=agent, pieces=str(folder / "other"))

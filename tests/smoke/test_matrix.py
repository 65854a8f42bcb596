"""Any x any: every tokenizer under every generator that takes its tokens, drawn by every sampler that can."""

import dataclasses
import shutil

import pytest
import torch

from genlab.generators.ddpm_unet import DDPMUNetConfig
from genlab.generators.distilled import DistilledConfig
from genlab.generators.divot_lm import DivotLMConfig
from genlab.generators.ecar import ECARConfig
from genlab.generators.elm import ELMConfig, ELMMaskedConfig
from genlab.generators.flexar import FlexARConfig
from genlab.generators.llamagen import LlamaGenConfig
from genlab.generators.mar import MARConfig
from genlab.generators.resgen import ResGenConfig
from genlab.generators.rq_transformer import RQTransformerConfig
from genlab.generators.seed_llama import SeedLlamaConfig
from genlab.generators.var import VARConfig
from genlab.generators.xar import XAR, XARConfig
from genlab.hub import from_pretrained
from genlab.noise import Noise
from genlab.registry import GENERATORS, SAMPLERS, TOKENIZERS, model_class
from tokenizers_img.bae import BAEConfig
from tokenizers_img.flextok import FlexTokConfig
from tokenizers_img.kl_vae import KLVAEConfig
from tokenizers_img.msvq import MSVQConfig
from tokenizers_img.pixels import PixelsConfig
from tokenizers_img.qformer import LITE0
from tokenizers_img.rvq import RVQConfig
from tokenizers_img.seed import SEEDConfig
from tokenizers_img.vq import VQConfig
from train.config import DataConfig, OptimConfig, run_config
from train.loop import train

CONV = {"image_size": 16, "patch": 2, "channels": (8, 16), "layers": 1, "decoder_layers": 1, "features": 8}
CONV |= {"norm_groups": 4, "attention_levels": ()}
VAE = KLVAEConfig(image_size=16, patch=4, channels=(16,), layers=1, latent_channels=4, norm_groups=4)
FLEX = {"encoder_dim": 32, "encoder_depth": 1, "decoder_dim": 32, "decoder_depth": 1, "head_dim": 16, "steps": 2}
KINDS = {
    "kl_vae": VAE,
    "pixels": PixelsConfig(image_size=16, patch=4),
    "vq": VQConfig(**CONV, codes=32, dim=4),
    "bae": BAEConfig(**CONV, sub_tokens=2, bits=3),
    "msvq": MSVQConfig(**CONV, codes=32, dim=4, scales=(1, 2, 4), phis=2),
    "rvq": RVQConfig(**CONV, codes=32, depth=3, dim=4),
    "flextok": FlexTokConfig(vae=VAE, registers=6, levels=(4, 4, 2), **FLEX),
    "seed": SEEDConfig(
        image_size=16, encoder=LITE0, encoder_args={}, encoder_size=32, encoder_dim=1280, queries=6, dim=32, depth=2,
        heads=2, hidden=32, codes=32, code_dim=4, blocks=1, target_dim=1280,
    ),
}  # fmt: skip
LM = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
LM |= {"num_attention_heads": 2, "num_key_value_heads": 2, "bos_token_id": 0, "eos_token_id": 1}
PAINTER = {"encoder_depth": 1, "decoder_depth": 1, "dim": 32, "heads": 2, "steps": 2}
SMALL = {"num_classes": 2, "dim": 32, "heads": 2}


def generator_config(kind, channels):
    """A tiny generator over 4x4 tokens."""
    stages = {"sides": (2, 4), "ends": (0.5, 0.0), "steps": (2, 2), "context_depth": 1, "flow_depth": 1}
    return {
        "xar": lambda: XARConfig(
            grid=(4, 4), channels=channels, size=2, encoder_depth=1, decoder_depth=1, dropout=0.0, **SMALL
        ),
        "llamagen": lambda: LlamaGenConfig(grid=(4, 4), vocab=32, depth=1, **SMALL),
        "flexar": lambda: FlexARConfig(grid=(1, 6), vocab=32, depth=1, **SMALL),
        "elm": lambda: ELMConfig(grid=(4, 4), sub_tokens=2, bits=3, depth=1, **SMALL),
        "elm_masked": lambda: ELMMaskedConfig(grid=(4, 4), sub_tokens=2, bits=3, depth=1, **SMALL),
        "var": lambda: VARConfig(scales=(1, 2, 4), vocab=32, code_dim=4, phis=2, depth=1, **SMALL),
        "mar": lambda: MARConfig(
            grid=(4, 4),
            channels=channels,
            encoder_depth=1,
            decoder_depth=1,
            head_depth=1,
            head_width=16,
            head_steps=10,
            **SMALL,
        ),
        "ecar": lambda: ECARConfig(grid=(4, 4), channels=channels, **stages, **SMALL),
        "resgen": lambda: ResGenConfig(grid=(4, 4), vocab=32, codes_depth=3, code_dim=4, depth=1, mixtures=4, **SMALL),
        "rq_transformer": lambda: RQTransformerConfig(
            grid=(4, 4), vocab=32, codes_depth=3, depth=1, stack_depth=1, **SMALL
        ),
        "ddpm_unet": lambda: DDPMUNetConfig(grid=(4, 4), channels=channels, widths=(32, 32), num_classes=2),
        "divot_lm": lambda: DivotLMConfig(lm=LM, text_vocab=300, text_length=16),
        "seed_llama": lambda: SeedLlamaConfig(grid=(6,), vocab=32, lm=LM, text_vocab=300, text_length=16),
        "distilled": lambda: DistilledConfig(net=generator_config("llamagen", channels), code_dim=4),
    }[kind]()


@pytest.fixture(scope="session")
def tokenizers(tmp_path_factory):
    folder, made = tmp_path_factory.mktemp("tokenizers"), {}
    painter = XAR(XARConfig(grid=(4, 4), channels=4, condition="text", text_dim=1280, text_length=1, size=2, **PAINTER))
    painter.extra["tokenizer"] = str(folder / "kl_vae")
    painter.save_pretrained(folder / "painter")
    for kind, config in KINDS.items():
        if kind == "seed":
            config = dataclasses.replace(config, generator=str(folder / "painter"))
        torch.manual_seed(0)
        made[kind] = model_class(kind)(config).save_pretrained(folder / kind)
    return made


@pytest.fixture(scope="session")
def captioned_folder(tmp_path_factory, picture_folder):
    root = tmp_path_factory.mktemp("captioned") / "pictures"
    shutil.copytree(picture_folder, root)
    for image in root.rglob("*.png"):
        image.with_suffix(".txt").write_text(f"a {image.parent.name} square")
    return root


def test_the_matrix_is_whole():
    assert {*KINDS, "divot"} == set(
        TOKENIZERS
    )  # tokens of clips have a generator of their own: tests/unit/test_divot.py
    for kind in GENERATORS:
        assert generator_config(kind, 4).kind == kind


# a student has a teacher instead of a tokenizer and data: tests/unit/test_distilled.py walks its three kinds
@pytest.mark.parametrize("generator", [kind for kind in GENERATORS if kind != "distilled"])
@pytest.mark.parametrize("tokenizer", list(KINDS))
def test_pair(tmp_path, captioned_folder, tokenizers, tokenizer, generator):
    t = from_pretrained(tokenizers[tokenizer])
    config = run_config(
        name="pair",
        model=generator_config(generator, t.spec.dim or 4),
        tokenizer=str(tokenizers[tokenizer]),
        data=DataConfig(source=str(captioned_folder)),
        optim=OptimConfig(lr=1e-3, warmup=8),
        images=16, batch_size=8, precision="fp32", sample_every=0, save_every=0, threads=1,
    )  # fmt: skip
    blank = model_class(generator)(config.model)
    if not blank.spec.fits(t.spec):
        with pytest.raises(ValueError, match="but generator 'pair' takes"):
            train(config, tmp_path / "run", device="cpu")
        return
    model = from_pretrained(train(config, tmp_path / "run", device="cpu"))
    seeds = torch.tensor([3, 4])
    labels = model.read_captions(["a red square", "blue"]) if model.by_text else torch.tensor([0, 1])
    drew = 0
    for name in SAMPLERS:
        cls = SAMPLERS[name]
        fields = {f.name for f in dataclasses.fields(cls.Config)}
        if not cls.supports(model):
            with pytest.raises(ValueError, match="these can: "):
                cls().sample(model, labels, seeds)
            continue
        options = {"draft": str(tmp_path / "run" / "model")} if "draft" in fields else {}
        out = cls(cls.Config(**options)).sample(model, labels, seeds)
        assert out.tokens.spec.fits(t.spec)
        with torch.no_grad():
            images = t.decode(out.tokens, seeds)
        assert tuple(images.shape) == (2, 3, 16, 16)
        assert bool(images.isfinite().all())
        assert out.stats.model_calls > 0
        drew += 1
    assert drew, "no sampler draws from it"
    loss = model.loss(t.encode(torch.zeros(2, 3, 16, 16)).values, labels, Noise(seeds))["loss"]
    assert bool(loss.isfinite())


# the others draw from words, or from a teacher's noise
@pytest.mark.parametrize("kind", [k for k in GENERATORS if k not in ("distilled", "divot_lm", "seed_llama")])
def test_every_generator_draws_in_bfloat16(tmp_path, tokenizers, kind):
    made = (from_pretrained(folder) for folder in tokenizers.values())
    blanks = ((t, model_class(kind)(generator_config(kind, t.spec.dim or 4))) for t in made)
    t, model = next((t, m) for t, m in blanks if m.spec.fits(t.spec))
    torch.manual_seed(0)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.05)
    if hasattr(model, "adopt"):
        model.adopt(t)
    model.extra["tokenizer"] = str(tokenizers[t.kind])
    draft, seeds = str(model.save_pretrained(tmp_path / "draft")), torch.tensor([3, 4])
    model = model.eval().to(torch.bfloat16)
    for cls in (SAMPLERS[name] for name in SAMPLERS):
        if not cls.supports(model):
            continue
        options = {"draft": draft} if "draft" in {f.name for f in dataclasses.fields(cls.Config)} else {}
        out = cls(cls.Config(**options)).sample(model, torch.tensor([0, 1]), seeds)
        with torch.no_grad():
            assert bool(t.to(torch.bfloat16).decode(out.tokens, seeds).isfinite().all())

"""Tiny runs of every family that trains, for `test_processes`: two steps each."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import torch

from genlab.generators.base import Guidance
from genlab.generators.distilled import MapConfig
from genlab.hub import from_pretrained
from genlab.registry import GENERATORS, model_class
from tests.smoke.test_matrix import KINDS, generator_config
from tests.unit.test_divot import TINY as DIVOT
from tests.unit.test_divot import VAE as DIVOT_VAE
from tests.unit.test_divot_lm import SMALL as DIVOT_LM
from tokenizers_img.losses import AutoencoderLossConfig
from train.config import DataConfig, OptimConfig, TrainConfig, run_config


def family_runs(root: Path, pictures: Path) -> dict[str, TrainConfig]:
    """A run a family, by name; what they start from is written to `root`.

    Args:
        root: a folder of its own.
        pictures: 16x16 pixels, in two classes.
    """
    captioned = root / "captioned"
    shutil.copytree(pictures, captioned)
    for i, image in enumerate(sorted(captioned.rglob("*.png"))):  # some captions longer than others
        image.with_suffix(".txt").write_text(f"a {image.parent.name} square" + i % 3 * " on white")

    def saved(name, config):
        torch.manual_seed(0)
        model = model_class(config.kind)(config)
        return str(model.save_pretrained(root / name))

    def run(name, model, source=captioned, **fields):
        fields.setdefault("data", DataConfig(source=str(source)))
        return run_config(
            name=name, model=model, optim=OptimConfig(lr=1e-3, warmup=4), images=8, batch_size=4, precision="fp32",
            log_every=4, sample_every=0, save_every=0, threads=1, **fields,
        )  # fmt: skip

    made = {kind: saved(kind, config) for kind, config in KINDS.items()}
    plain = AutoencoderLossConfig(perceptual=0.0)
    small = {"patch": 4, "channels": (8,)}
    terms = {"vq": {"entropy": 0.1}, "bae": {"entropy": 1.0}, "msvq": {}, "rvq": {}}
    tokenizers = {kind: dataclasses.replace(KINDS[kind], **small, **terms[kind]) for kind in terms}
    tokenizers["kl_vae"] = KINDS["kl_vae"]
    runs = {kind: run(kind, model, loss=plain) for kind, model in tokenizers.items()}
    runs["vq"] = run("vq", tokenizers["vq"], loss=dataclasses.replace(plain, adversarial=0.1, adversarial_start=0))
    runs["flextok"] = run("flextok", KINDS["flextok"], tokenizer=made["kl_vae"])
    model = dataclasses.replace(KINDS["seed"], dropout=0.0)
    runs["seed"] = run("seed", dataclasses.replace(model, stage="contrastive"))
    words = {"target": "sd_text77", "reverse": "qformer", "target_tokens": 20, "target_dim": 384}
    model = dataclasses.replace(model, stage="codes", **words)
    runs["seed-codes"] = run("seed-codes", model, init=saved("seed-words", model))
    for kind in GENERATORS:
        model = generator_config(kind, 4)
        if hasattr(model, "dropout"):
            model = dataclasses.replace(model, dropout=0.0)
        if kind == "ddpm_unet":
            model = dataclasses.replace(model, widths=(32,))
        for tokenizer in made.values():
            if kind not in ("distilled", "divot_lm") and model_class(kind)(model).spec.fits(
                from_pretrained(tokenizer).spec
            ):
                runs[kind] = run(kind, model, tokenizer=tokenizer)
                break
    net = dataclasses.replace(generator_config("llamagen", 4), dropout=0.0)
    teacher = model_class("llamagen")(net)
    teacher.extra |= {"tokenizer": made["vq"], "data": {"source": "gone", "classes": ["a", "b"]}}
    teacher.save_pretrained(root / "teacher")
    how = MapConfig(guidance=Guidance(), steps=4)
    student = dataclasses.replace(
        generator_config("distilled", 4), net=net, map=how, pairs=8, teacher=str(root / "teacher")
    )
    runs["distilled"] = run("distilled", student, data=DataConfig())
    films = DataConfig(source="emoji-anim#4")
    runs["divot"] = run("divot", DIVOT, tokenizer=saved("divot_vae", DIVOT_VAE), data=films)
    model = dataclasses.replace(DIVOT_LM, head="mse")  # it also keeps a mean of its errors
    runs["divot_lm"] = run("divot_lm", model, tokenizer=saved("divot", DIVOT), data=films)
    return runs

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
    for image in captioned.rglob("*.png"):
        image.with_suffix(".txt").write_text(f"a {image.parent.name} square")

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
    spread = {kind: dataclasses.replace(KINDS[kind], entropy=0.1) for kind in ("vq", "bae")}
    runs = {kind: run(kind, spread.get(kind, KINDS[kind]), loss=plain) for kind in ("kl_vae", "bae", "msvq", "rvq")}
    runs["vq-gan"] = run("vq-gan", spread["vq"], loss=dataclasses.replace(plain, adversarial=0.1, adversarial_start=0))
    runs["flextok"] = run("flextok", KINDS["flextok"], tokenizer=made["kl_vae"])
    for stage in ("contrastive", "codes"):
        model = dataclasses.replace(KINDS["seed"], stage=stage, dropout=0.0)
        runs[f"seed-{stage}"] = run(f"seed-{stage}", model, init="" if stage == "contrastive" else made["seed"])
    for kind in GENERATORS:
        model = generator_config(kind, 4)
        if hasattr(model, "dropout"):
            model = dataclasses.replace(model, dropout=0.0)
        for tokenizer in made.values():
            if kind not in ("distilled", "divot_lm") and model_class(kind)(model).spec.fits(
                from_pretrained(tokenizer).spec
            ):
                runs[kind] = run(kind, model, tokenizer=tokenizer)
                break
    teacher = model_class("llamagen")(net := generator_config("llamagen", 4))
    teacher.extra |= {"tokenizer": made["vq"], "data": {"source": "gone", "classes": ["a", "b"]}}
    teacher.save_pretrained(root / "teacher")
    how = MapConfig(guidance=Guidance(), steps=4)
    student = dataclasses.replace(
        generator_config("distilled", 4), net=net, map=how, pairs=8, teacher=str(root / "teacher")
    )
    runs["distilled"] = run("distilled", student, data=DataConfig())
    films = DataConfig(source="emoji-anim#4")
    runs["divot"] = run("divot", DIVOT, tokenizer=saved("divot_vae", DIVOT_VAE), data=films)
    runs["divot_lm"] = run("divot_lm", dataclasses.replace(DIVOT_LM, head="mse"), tokenizer=saved("divot", DIVOT), data=films)
    return runs

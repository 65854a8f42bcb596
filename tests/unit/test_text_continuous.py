"""xAR, ECAR and MAR by text, from captioned pictures to drawn ones."""

import json

import pytest
import torch
from PIL import Image

from genlab.commands.models import load_line
from genlab.generators.ecar import ECARConfig
from genlab.generators.mar import MARConfig
from genlab.generators.xar import XARConfig
from genlab.text import TextEncoder
from samplers import default_sampler
from tests.unit.test_text import encoder_folder  # noqa: F401
from train.config import DataConfig, OptimConfig, run_config
from train.loop import train
from train.presets import PRESETS

SMALL = {"grid": (4, 4), "channels": 4, "dim": 32, "heads": 2, "condition": "text", "text_dim": 24}
MODELS = {
    "xar": XARConfig(**SMALL, size=2, encoder_depth=1, decoder_depth=1, text_length=5, steps=2),
    "ecar": ECARConfig(**SMALL, sides=(2, 4), ends=(0.5, 0.0), steps=(1, 1), context_depth=1, flow_depth=1,
                       text_length=5),
    "mar": MARConfig(**SMALL, encoder_depth=1, decoder_depth=1, head_depth=1, head_width=16, buffer=5, head_steps=4),
}  # fmt: skip


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    root, rows = tmp_path_factory.mktemp("captioned"), []
    for i, (colour, value) in enumerate((("red", (220, 40, 40)), ("blue", (40, 40, 220)))):
        for thing in ("apple", "box"):
            Image.new("RGB", (16, 16), value).save(root / f"{i}{thing}.png")
            rows.append({"file_name": f"{i}{thing}.png", "caption": f"{colour} {thing}"})
    (root / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


@pytest.mark.parametrize("kind", MODELS)
def test_train_and_draw_by_text(kind, encoder_folder, pictures, tiny_tokenizer, tmp_path):  # noqa: F811
    run = run_config(
        name="text", model=MODELS[kind], tokenizer=str(tiny_tokenizer), text_encoder=str(encoder_folder),
        data=DataConfig(source=str(pictures), split="all"), optim=OptimConfig(lr=1e-3, warmup=4), images=8,
        batch_size=4, sample_every=0, precision="fp32", threads=1,
    )  # fmt: skip
    line = load_line(train(run, tmp_path / "run", device="cpu"))
    assert line.generator.by_text
    text = TextEncoder(str(encoder_folder), line.generator.text_length)(["red apple", "blue box", "red apple"])
    images, stats = line.draw(default_sampler(line.generator), text, torch.tensor([3, 3, 3]))
    assert images.shape == (3, 3, 16, 16)
    assert stats.images == 3
    assert torch.equal(images[0], images[2])


def test_the_text_preset_fits_the_packaged_encoder():
    c = PRESETS["xar-text-emoji64"]()
    assert (c.text_encoder, c.model.condition, c.model.text_dim) == ("minilm", "text", 384)

"""Small models and data that several tests share."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch
from PIL import Image

torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory):
    """No test reads or writes the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GENLAB_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        yield


@pytest.fixture(scope="session")
def picture_folder(tmp_path_factory):
    """24 little pictures in two classes."""
    root = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for split in ("train", "heldout"):
        for label, colour in (("red", (220, 40, 40)), ("blue", (40, 40, 220))):
            folder = root / split / label
            folder.mkdir(parents=True)
            for i in range(12):
                pixels = np.full((16, 16, 3), 255, np.uint8)
                y, x = rng.integers(0, 8, 2)
                pixels[y : y + 8, x : x + 8] = colour
                pixels[y + 2, x + 2] = rng.integers(0, 255, 3)
                Image.fromarray(pixels).save(folder / f"{i:02d}.png")
    return root


@pytest.fixture(scope="session")
def tiny_tokenizer(tmp_path_factory, picture_folder):
    """A saved KL autoencoder: 16x16 pixels to 4x4 tokens of 4 channels."""
    from tokenizers_img.kl_vae import KLVAE, KLVAEConfig

    torch.manual_seed(0)
    model = KLVAE(
        KLVAEConfig(image_size=16, patch=4, channels=(16,), layers=1, latent_channels=4, norm_groups=4, shortcut=True)
    )
    folder = tmp_path_factory.mktemp("models") / "tiny_vae"
    model.extra["data"] = {"classes": ["blue", "red"]}
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_xar(tmp_path_factory, tiny_tokenizer):
    """A saved xAR on those tokens, random weights."""
    from genlab.generators.xar import XAR, XARConfig

    torch.manual_seed(1)
    model = XAR(
        XARConfig(
            grid=(4, 4),
            channels=4,
            num_classes=2,
            size=2,
            dim=32,
            encoder_depth=1,
            decoder_depth=1,
            heads=2,
            dropout=0.1,
        )
    )
    folder = tmp_path_factory.mktemp("models") / "tiny_xar"
    model.extra["tokenizer"] = str(tiny_tokenizer)
    model.extra["data"] = {"classes": ["blue", "red"]}
    model.save_pretrained(folder)
    return folder

"""Tokens of a whole set: where they are encoded."""

import pytest
import torch
from torch import nn

from genlab.data import open_images
from genlab.data.cache import cached_tokens
from genlab.tokens import Tokens, TokenSpec
from train.tasks import training_device


class Elsewhere(nn.Module):
    """Stands in for a tokenizer on an accelerator: `meta` holds no numbers, so it makes its tokens on the host."""

    kind, config = "elsewhere", None

    def __init__(self, breaks=False):
        super().__init__()
        self.at, self.moves, self.encoded_at, self.breaks = torch.device("cpu"), [], [], breaks

    @property
    def device(self):
        return self.at

    def to(self, device):
        self.at = torch.device(device)
        self.moves.append(self.at.type)
        return self

    def encode(self, images):
        assert images.device == self.at
        self.encoded_at.append(self.at.type)
        if self.breaks:
            raise MemoryError
        spec = TokenSpec(kind="continuous", grid=(1,), dim=1, image_size=(16, 16))
        return Tokens(torch.ones(len(images), 1, 1), spec)


def test_it_encodes_on_the_device_and_comes_back(picture_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("GENLAB_CACHE", str(tmp_path))
    images, device = open_images(picture_folder, size=16), torch.device("meta")
    broken = Elsewhere(breaks=True)
    with pytest.raises(MemoryError):
        cached_tokens(broken, images, device=device)
    assert broken.device.type == "cpu"  # else it would stay in an accelerator's memory
    tokenizer = Elsewhere()
    tokens = cached_tokens(tokenizer, images, batch_size=10, device=device)
    assert tokens.shape == (24, 1, 1)
    assert tokens.device.type == "cpu"
    assert tokenizer.encoded_at == ["meta"] * 3
    assert tokenizer.moves[0] == "meta"
    assert tokenizer.moves[-1] == "cpu"
    again = Elsewhere()  # what is cached moves nobody
    assert torch.equal(cached_tokens(again, images, batch_size=10, device=device), tokens)
    assert again.moves == []


def test_the_device_is_that_of_the_training_that_has_begun(monkeypatch):
    from accelerate import PartialState

    monkeypatch.setattr(PartialState, "_shared_state", {})
    assert training_device() is None
    monkeypatch.setattr(PartialState, "_shared_state", {"device": torch.device("meta"), "_cpu": False})
    assert training_device() == torch.device("meta")

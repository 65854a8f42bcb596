"""What every tokenizer does: pictures to `Tokens` and back."""

from __future__ import annotations

from typing import Any

import torch

from genlab.hub import Model
from genlab.noise import Noise
from genlab.tokens import Tokens, TokenSpec

from .usage import codebook_usage


class Tokenizer(Model):
    """Pictures to tokens and back.

    Images are (B, 3, H, W) in [-1, 1], of any floating-point type, whatever that of the weights; clips are
    (B, T, 3, H, W). Subclasses define `spec`, `encode`, `decode` and, to be trained, `reconstruct`.
    """

    @property
    def spec(self) -> TokenSpec:
        """The tokens this makes and reads."""
        raise NotImplementedError

    def encode(self, images: torch.Tensor, seeds: torch.Tensor | None = None) -> Tokens:
        """Tokens of images; with seeds, (B,), a stochastic tokenizer draws, without it takes the mode."""
        raise NotImplementedError

    def decode(self, tokens: Tokens, seeds: torch.Tensor | None = None) -> torch.Tensor:
        """Images of tokens, in [-1, 1]; a stochastic decoder draws by `seeds`, (B,)."""
        raise NotImplementedError

    def reconstruct(self, images: torch.Tensor, noise: Noise) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """One training pass: reconstructed images and the tokenizer's own loss terms, unweighted means."""
        raise NotImplementedError

    def usage(self, batches: list[Tokens]) -> dict[str, Any]:
        """How much of its codebook these tokens use, see `codebook_usage`; nothing where there is no codebook."""
        return codebook_usage(batches) if self.spec.vocab is not None else {}

    def check_images(self, images: torch.Tensor) -> torch.Tensor:
        """Refuse what isn't a batch of images of this tokenizer's size.

        Raises:
            ValueError: for a wrong shape, dtype or range, or no images.
        """
        size = self.spec.image_size or ()
        expected = f"({'B, ' + str(size[0]) if len(size) == 3 else 'B'}, 3, {size[-2]}, {size[-1]}) float in [-1, 1]"
        lead = (size[0],) if len(size) == 3 else ()
        if tuple(images.shape[1:]) != (*lead, 3, *size[-2:]):
            raise ValueError(
                f"{self.kind} takes images of shape {expected}, got {tuple(images.shape)}; resize them first "
                f"(`open_images(source, size={size[-1]})` does)"
            )
        if not len(images):
            raise ValueError(f"{self.kind} takes images {expected}, at least one, got none")
        if not images.is_floating_point():
            raise ValueError(f"{self.kind} takes images {expected}, got {images.dtype}; use `genlab.pictures.to_float`")
        if (bad := float(images.detach().abs().max())) > 1.01 or bool(images.isnan().any()):
            raise ValueError(f"{self.kind} takes images {expected}; the largest magnitude given is {bad:.3g}")
        return images

    def check_seeds(self, seeds: torch.Tensor | None, rows: int) -> torch.Tensor:
        """Seeds (rows,) on this device; zeros, the same noise for every row, where none are given.

        Raises:
            ValueError: for any other number of them.
        """
        if seeds is None:
            return torch.zeros(rows, dtype=torch.long, device=self.device)
        if seeds.shape != (rows,):
            raise ValueError(
                f"{self.kind} takes a seed a row: ({rows},) for {rows} {'row' if rows == 1 else 'rows'}, "
                f"got {tuple(seeds.shape)}"
            )
        return seeds.to(self.device)

"""FlexTok's autoregressive transformer: a GPT over ordered tokens, by class or by text (arXiv 2502.13967, sec. 4).

The blocks, the cache and the conditions are LlamaGen's; the raster is one row, so rotary positions turn half of each
head by the token's number and leave the other half alone. What is new is that it may stop: the first k tokens are a
whole image. `first(k)` is the same transformer that draws k tokens only, under any sampler; the sampler
`until-settled` stops each image when more tokens no longer change it.
"""

from __future__ import annotations

import copy
from typing import Literal

import torch.nn.functional as F

from genlab.config import config
from genlab.tokens import Tokens, TokenSpec

from .base import Guidance
from .causal import CausalState
from .llamagen import LlamaGen, LlamaGenConfig


@config
class FlexARConfig(LlamaGenConfig):
    """Sizes of a FlexAR; the defaults are a depth of 12 under the paper's rule, width 64 times the depth."""

    kind: Literal["flexar"] = "flexar"  # type: ignore[assignment]
    grid: tuple[int, int] = (1, 256)
    """One row, as long as the tokenizer's tokens are many."""
    vocab: int = 64000
    """Codebook size."""


class FlexAR(LlamaGen):
    """See the module's docstring."""

    kind = "flexar"
    Config = FlexARConfig  # type: ignore[assignment]
    config: FlexARConfig

    def __init__(self, config: FlexARConfig) -> None:
        """Args: config: sizes. Raises: ValueError: for sizes that don't go together."""
        if config.grid[0] != 1:
            raise ValueError(f"a flexar's tokens have one dimension: grid must be (1, length), got {config.grid}")
        super().__init__(config)

    @property
    def spec(self) -> TokenSpec:
        """Ids in one dimension, coarse to fine."""
        c = self.config
        return TokenSpec(kind="discrete", grid=c.grid[1:], order="coarse_to_fine", vocab=c.vocab)

    @property
    def default_guidance(self) -> Guidance:
        """Constant: 1.5 by class, 3 by text, the published models' defaults."""
        return Guidance(scale=3.0 if self.by_text else 1.5, schedule="constant")

    def progress(self, group: int) -> float:
        """A token's place among all there could be, so that stopping early changes no guidance."""
        return group / max(1, self.spec.length - 1)

    def first(self, k: int) -> FlexAR:
        """The same transformer, drawing the first k tokens only; the weights are shared.

        Raises:
            ValueError: for k outside 1 … length.
        """
        if not 1 <= k <= self.spec.length:
            raise ValueError(f"this flexar draws 1 to {self.spec.length} tokens, asked for {k}")
        short = copy.copy(self)
        short.n_groups = k
        return short

    def tokens(self, state: CausalState) -> Tokens:
        """The finished ids; those never drawn are absent."""
        self.require_complete(state)
        absent = self.spec.length - self.n_groups
        tokens = Tokens(F.pad(state.ids_BLK[..., 0], (0, absent)), self.spec)
        return tokens.first(self.n_groups) if absent else tokens

"""LlamaGen: Llama's architecture on the ids of a VQ tokenizer, in raster order (Sun et al., arXiv 2406.06525).

Class-conditional, or text-conditional from the embeddings of any text encoder.
"""

from __future__ import annotations

from typing import Literal

from genlab.config import config
from genlab.tokens import TokenSpec

from .base import Guidance
from .causal import CausalConfig, CausalLM


@config
class LlamaGenConfig(CausalConfig):
    """Sizes of a LlamaGen; the defaults are the paper's B at 256x256."""

    kind: Literal["llamagen"] = "llamagen"
    vocab: int = 16384
    """Codebook size."""
    guidance: float = 0.0
    """Guidance scale where the user names none; 0: as published, 2 by class and 7.5 by text."""


class LlamaGen(CausalLM):
    """See the module's docstring."""

    kind = "llamagen"
    Config = LlamaGenConfig
    config: LlamaGenConfig

    @property
    def spec(self) -> TokenSpec:
        """A raster of ids."""
        return TokenSpec(kind="discrete", grid=self.config.grid, vocab=self.config.vocab)

    @property
    def default_guidance(self) -> Guidance:
        """The config's, constant."""
        return Guidance(scale=self.config.guidance or (7.5 if self.by_text else 2.0), schedule="constant")

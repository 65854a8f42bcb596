"""Plain sampling of ordered tokens that stops when the image has settled: simple things need fewer tokens.

FlexTok's first k tokens are a whole image (arXiv 2502.13967). After 1, 2, 4, … tokens the image is decoded with its
own decoder noise, and a row is done when the newest tokens changed it by less than `tolerance`. The tokens are those of
the plain sampler, fewer of them: the images are not exactly its images.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from genlab.config import config
from genlab.distributions import Categorical
from genlab.generators.base import Condition, Generator
from genlab.noise import Noise
from genlab.tokens import Tokens

from .ancestral import CategoricalConfig
from .base import Sampler, Stats


@config
class UntilSettledConfig(CategoricalConfig):
    """When an image counts as settled."""

    tolerance: float = 0.1
    """Root mean square change of the pixels, which lie in [-1, 1], from one check to the next."""
    checks: tuple[int, ...] = ()
    """Numbers of tokens after which to look, rising; empty: the powers of two."""
    tokenizer: str = ""
    """The MODEL that decodes; empty: the one that the generator's checkpoint names."""


class UntilSettledSampler(Sampler):
    """Token by token, each row until its image no longer changes."""

    name = "until-settled"
    Config = UntilSettledConfig
    config: UntilSettledConfig
    exact = False
    _loaded: tuple[str, Any] | None = None

    @classmethod
    def supports(cls, generator: Generator) -> bool:
        """Generators over ids whose first k tokens are an image."""
        return (
            generator.predicts is Categorical
            and not generator.any_order
            and generator.spec.order == "coarse_to_fine"
            and generator.spec.kind == "discrete"
        )

    def tokenizer(self, generator: Generator) -> Any:
        """The tokenizer that decodes, loaded once.

        Raises:
            ValueError: if there is none, or its tokens aren't the generator's.
        """
        from genlab.hub import from_pretrained
        from genlab.tokens import require_fit

        name = self.config.tokenizer or generator.extra.get("tokenizer", "")
        if not name:
            raise ValueError("until-settled looks at images: name the MODEL that decodes, --set tokenizer=MODEL")
        if self._loaded is None or self._loaded[0] != name:
            self._loaded = name, from_pretrained(name, device=generator.device)
        require_fit(name, self._loaded[1].spec, generator.kind, generator.spec)
        return self._loaded[1]

    def draw(self, generator: Generator, labels: Condition, noise: Noise) -> tuple[Tokens, Stats]:
        """One batch; it ends when every row has settled.

        Raises:
            ValueError: for checks that don't rise, or lie outside 1 … length.
        """
        c, L, length = self.config, generator.n_groups, generator.spec.length
        checks = list(c.checks) or [2**i for i in range(L.bit_length()) if 2**i < L] or [L]
        if checks != sorted(set(checks)) or not 1 <= checks[0] <= checks[-1] <= length:
            raise ValueError(f"checks must rise within 1 to {length}, got {c.checks}")
        tokenizer, state = self.tokenizer(generator), generator.start(labels, c.guidance)
        B = len(labels)
        kept, running = torch.full((B,), L, device=generator.device), torch.arange(B, device=generator.device)
        ids: list[torch.Tensor] = []
        before: tuple[int, torch.Tensor] | None = None
        while len(ids) < L and len(running):
            here = noise.at(position=generator.where(len(ids)))
            event = c.shape(generator.predict(state)).sample(here)  # type: ignore[arg-type]
            generator.commit(state, event)
            ids.append(event[:, 0, 0])
            k = len(ids)
            if k not in (*checks, L):
                continue
            values = F.pad(torch.stack(ids, 1), (0, length - k))[running]
            images = tokenizer.decode(Tokens(values, generator.spec).first(k), noise.seeds_B[running])
            if before is not None:
                settled = (images - before[1]).square().mean((1, 2, 3)).sqrt() < c.tolerance
                kept[running[settled]] = before[0]
                running, images = running[~settled], images[~settled]
            before = k, images
        values = F.pad(torch.stack(ids, 1), (0, length - len(ids)))
        stats = Stats(model_calls=state.calls, rows=state.rows_computed)
        return Tokens(values, generator.spec).first(kept), stats

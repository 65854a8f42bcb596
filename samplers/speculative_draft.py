"""Speculative decoding with a smaller model (Leviathan et al., arXiv 2211.17192): it drafts, the large one verifies."""

from __future__ import annotations

import torch

from genlab.config import config
from genlab.distributions import Categorical
from genlab.generators.base import Condition, Generator
from genlab.noise import Noise
from genlab.tokens import Tokens

from .ancestral import CategoricalConfig
from .base import Sampler, Stats
from .speculative_jacobi import advance, in_single_file
from .verify import Heads, verify


@config
class SpeculativeDraftConfig(CategoricalConfig):
    """The drafting model, and how far it runs ahead."""

    draft: str = ""
    """Checkpoint of the drafting model, over the same tokens and classes: a shipped name, a folder or a Hub id."""
    window: int = 4
    """Drafts a forward of the large model."""
    heads: Heads = "joint"
    """Several sub-token heads: one test of the whole token, or each head on its own."""


class SpeculativeDraftSampler(Sampler):
    """Draft, verify, advance; each row at its own pace. Temperature, top-k and top-p act on both models alike."""

    name = "speculative-draft"
    Config = SpeculativeDraftConfig
    config: SpeculativeDraftConfig
    verify = staticmethod(verify)

    def __init__(self, config: SpeculativeDraftConfig | None = None, draft: Generator | None = None) -> None:
        """Args: config: settings. draft: the drafting model itself, instead of `config.draft`."""
        super().__init__(config)
        self.draft = draft

    @classmethod
    def supports(cls, generator: Generator) -> bool:
        """Generators over ids that draw one position after the other."""
        return in_single_file(generator)

    def _drafter(self, generator: Generator) -> Generator:
        if self.draft is None:
            if not self.config.draft:
                raise ValueError("speculative-draft needs a drafting model: --set draft=CHECKPOINT")
            from genlab.hub import from_pretrained

            self.draft = from_pretrained(self.config.draft).to(generator.device)
        if not (in_single_file(self.draft) and self.draft.spec.fits(generator.spec)):
            raise ValueError(
                f"the drafting model makes {self.draft.spec.describe()}, the large one {generator.spec.describe()}: "
                "both must be models over the same ids, drawn one after the other"
            )
        if self.draft.num_classes != generator.num_classes:
            raise ValueError(f"the drafting model knows {self.draft.num_classes} classes, not {generator.num_classes}")
        return self.draft.eval()

    def draw(self, generator: Generator, labels: Condition, noise: Noise) -> tuple[Tokens, Stats]:
        """One batch; `model_calls` counts both models' evaluations.

        Raises:
            ValueError: if there is no drafting model, or it doesn't fit.
        """
        c, L, drafter = self.config, generator.n_groups, self._drafter(generator)
        if c.window < 1:
            raise ValueError(f"the window must hold at least one draft, got {c.window}")
        state, ahead = generator.start(labels, c.guidance), drafter.start(labels, c.guidance)
        position = torch.cat([generator.where(g) for g in range(L)])
        proposed = accepted = round_ = 0
        while min(state.n) < L:
            n_B1 = torch.tensor(state.n, device=position.device)[:, None]
            width = min(c.window, L - min(state.n) - 1)
            at_BW = n_B1 + torch.arange(width + 1, device=position.device)
            valid = at_BW[:, :-1] < L - 1
            here = noise.at(position=position[at_BW.clamp(max=L - 1)], step=round_)
            drafts, q = [], []
            for j in range(width):
                dist = c.shape(drafter.predict(ahead))  # type: ignore[arg-type]
                place: torch.Tensor = here.position[:, j : j + 1]  # type: ignore[index]
                drafts.append(dist.sample(here.at(position=place, purpose="draft")))
                q.append(dist.logits_BGKV)
                drafter.commit(ahead, drafts[-1])
            dists = generator.predict_many(state, drafts)
            p = c.shape(Categorical(torch.cat([d.logits_BGKV for d in dists], 1)))  # type: ignore[attr-defined]
            new, leading = p.sample(here.at(purpose="bonus")), n_B1[:, 0] * 0
            if width:
                v = self.verify(
                    Categorical(p.logits_BGKV[:, :-1]),
                    Categorical(torch.cat(q, 1)),
                    torch.cat(drafts, 1),
                    here.at(position=here.position[:, :-1], purpose="verify"),  # type: ignore[index]
                    heads=c.heads,
                    in_order=True,
                    where=valid,
                )
                leading = v.leading
                new[:, :-1] = torch.where(valid[..., None], v.replacement, new[:, :-1])
            take = torch.where(n_B1[:, 0] < L, leading + 1, 0)
            proposed, accepted, round_ = proposed + int(valid.sum()), accepted + int(leading.sum()), round_ + 1
            advance(generator, state, new, take.tolist())
            # the drafting model keeps what was accepted, and learns what came instead
            drafter.crop(ahead, (n_B1[:, 0] + leading).tolist())
            final = (take - 1).clamp(min=0)
            drafter.commit(ahead, new[torch.arange(len(new), device=new.device), final][:, None])
        calls, rows = state.calls + ahead.calls, state.rows_computed + ahead.rows_computed
        return generator.tokens(state), Stats(model_calls=calls, rows=rows, proposed=proposed, accepted=accepted)

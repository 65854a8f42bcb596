"""Speculative decoding with a cheap draft (Leviathan et al., arXiv 2211.17192): it runs ahead, the model verifies.

The draft is a smaller model, or n-grams that are counted as decoding goes on and need no model at all.
"""

from __future__ import annotations

from typing import Any

import torch

from genlab.config import config
from genlab.distributions import Categorical
from genlab.generators.base import Condition, Generator
from genlab.noise import Noise
from genlab.tokens import Tokens

from .ancestral import CategoricalConfig
from .base import Sampler, Stats
from .ngram import NGram, NGramConfig
from .speculative_jacobi import in_single_file
from .verify import Heads, verify
from .window import Costs, Count, Window


@config
class DraftConfig(CategoricalConfig):
    """Where drafts come from."""

    draft: str = "ngram"
    """`ngram`: counts of the ids drawn so far. Or the checkpoint of a smaller model over the same tokens and classes: a
    shipped name, a folder or a Hub id."""
    order: int = 2
    """n-gram: neighbours that are looked at."""
    memory: int = 0
    """n-gram: finished images whose ids count too. Images then depend on those drawn before them, though not in
    distribution; 0 keeps each to itself."""


@config
class SpeculativeDraftConfig(DraftConfig):
    """How far the draft runs ahead."""

    window: int = 4
    """Drafts a forward of the model; with `costs`, the most."""
    costs: Costs = ()
    """(tokens, seconds) of the model's calls, measured. With them each row's window adapts to what its drafts did."""
    draft_cost: float = 0.0
    """Seconds of one call of the drafting model, where `costs` are given."""
    heads: Heads = "joint"
    """Several sub-token heads: one test of the whole token, or each head on its own."""


class DraftSampler(Sampler):
    """What samplers with a draft share. Temperature, top-k and top-p act on both models alike."""

    config: Any

    def __init__(self, config: DraftConfig | None = None, draft: Generator | None = None) -> None:
        """Args: config: settings. draft: the drafting model itself, instead of `config.draft`."""
        super().__init__(config)
        self.draft = draft

    @classmethod
    def supports(cls, generator: Generator) -> bool:
        """Generators over ids that draw one position after the other."""
        return in_single_file(generator)

    def drafter(self, generator: Generator) -> Generator:
        """The drafting model; n-grams are begun anew for another target.

        Raises:
            ValueError: if it doesn't fit the target.
        """
        c = self.config
        about = (generator.spec, generator.num_classes)
        if isinstance(self.draft, NGram) and (self.draft.spec, self.draft.num_classes) != about:
            self.draft = None
        if self.draft is None and c.draft == "ngram":
            self.draft = NGram(NGramConfig(order=c.order, memory=c.memory), generator)
        if self.draft is None:
            if not c.draft:
                raise ValueError(f"{self.name} needs a drafting model: --set draft=CHECKPOINT, or draft=ngram")
            from genlab.hub import from_pretrained

            self.draft = from_pretrained(c.draft).to(generator.device)
        if not (in_single_file(self.draft) and self.draft.spec.fits(generator.spec)):
            raise ValueError(
                f"the drafting model makes {self.draft.spec.describe()}, the large one {generator.spec.describe()}: "
                "both must be models over the same ids, drawn one after the other"
            )
        if self.draft.num_classes != generator.num_classes:
            raise ValueError(f"the drafting model knows {self.draft.num_classes} classes, not {generator.num_classes}")
        if self.draft.n_groups < generator.n_groups:
            raise ValueError(f"the drafting model draws {self.draft.n_groups} tokens, not {generator.n_groups}")
        return self.draft.eval()

    def finish(self, generator: Generator, state: Any, ahead: Any, count: Count) -> tuple[Tokens, Stats]:
        """The tokens and their cost, both models' calls; the draft may learn from them."""
        tokens = generator.tokens(state)
        if isinstance(self.draft, NGram):
            self.draft.remember(tokens)
        calls, rows = state.calls + ahead.calls, state.rows_computed + ahead.rows_computed
        return tokens, Stats(model_calls=calls, rows=rows, **count.stats())


class SpeculativeDraftSampler(DraftSampler):
    """Draft, verify, advance; each row at its own pace."""

    name = "speculative-draft"
    Config = SpeculativeDraftConfig
    config: SpeculativeDraftConfig
    verify = staticmethod(verify)

    def draw(self, generator: Generator, labels: Condition, noise: Noise) -> tuple[Tokens, Stats]:
        """One batch; `model_calls` counts both models' evaluations (n-grams have none).

        Raises:
            ValueError: if there is no drafting model, or it doesn't fit.
        """
        c, L, drafter = self.config, generator.n_groups, self.drafter(generator)
        window = Window(len(labels), c.window, c.costs, c.draft_cost)
        state, ahead = generator.start(labels, c.guidance), drafter.start(labels, c.guidance)
        position, count, round_ = torch.cat([generator.where(g) for g in range(L)]), Count(L), 0
        while min(state.n) < L:
            n_B1 = torch.tensor(state.n, device=position.device)[:, None]
            wanted = torch.tensor(window.choose(), device=position.device)[:, None]
            width_B1 = torch.minimum(wanted, (L - 1 - n_B1).clamp(min=0))
            width = int(width_B1.max())
            j = torch.arange(width + 1, device=position.device)
            valid = j[:-1] < width_B1
            here = noise.at(position=position[(n_B1 + j).clamp(max=L - 1)], step=round_)
            drafts, q, u_BWK = [], [], here.at(purpose="draft").uniform(generator.spec.depth)
            for i in range(width):
                dist = c.shape(drafter.predict(ahead))  # type: ignore[arg-type]
                drafts.append(dist.pick(u_BWK[:, i : i + 1]))
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
            running = n_B1[:, 0] < L
            take = torch.where(running, leading + 1, 0)
            drafted, stood = (width_B1[:, 0] * running).tolist(), leading.tolist()
            window.learn(drafted, stood)
            count.add(state.n, drafted, stood)
            round_ += 1
            generator.advance(state, new, take.tolist())
            # the drafting model keeps what was accepted, and learns what came instead
            drafter.crop(ahead, (n_B1[:, 0] + leading).tolist())
            if min(state.n) < L:
                final = (take - 1).clamp(min=0)
                drafter.commit(ahead, new[torch.arange(len(new), device=new.device), final][:, None])
        return self.finish(generator, state, ahead, count)

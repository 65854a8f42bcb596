"""What every generator does: a training loss, and the calls that draw tokens group by group.

    state = generator.start(labels, guidance)
    for group in range(generator.n_groups):
        where = generator.where(group)                       # absolute positions (G,)
        dist = generator.predict(state)                      # a TokenDistribution
        generator.commit(state, dist.sample(noise.at(where)))
    tokens = generator.tokens(state)

Generators of `any_order` (MAR, ELM's MLM, ResGen) take a set of open positions a call instead, which the sampler
chooses: `predict(state, where)` and `commit(state, event, where)` with where (B, G); a position is their group.

Conditional and unconditional rows live in one batch inside the state, so guidance is part of what is
predicted, and no sampler repeats it. Guidance is a function of the group's index.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar, Literal

import torch

from genlab.config import config
from genlab.distributions import Categorical, TokenDistribution
from genlab.hub import Model
from genlab.noise import Noise
from genlab.text import Text, TextEncoder
from genlab.tokens import Tokens, TokenSpec

from .tree import predict_each


@config
class Guidance:
    """Classifier-free guidance (arXiv 2207.12598), u + s (c - u), with s a function of the group."""

    scale: float = 1.0
    """s at full strength; 1 is unguided, and then no unconditional rows are computed."""
    schedule: Literal["constant", "linear", "cosine", "log", "square", "square_root"] = "linear"
    """How s grows from 1 with the progress r in [0, 1]: at once, by r, sin(pi r / 2), log(1 + (e - 1) r), r^2, r^(1/2)
    (ELM's)."""
    until: float = 1.0
    """Progress behind which guidance is off (LlamaGen's cfg-interval)."""

    def at(self, r: float) -> float:
        """The scale at progress r."""
        if r > self.until:
            return 1.0
        weight = {
            "constant": 1.0,
            "linear": r,
            "cosine": math.sin(math.pi * r / 2),
            "log": math.log1p((math.e - 1) * r),
            "square": r * r,
            "square_root": r**0.5,
        }[self.schedule]
        return 1 + (self.scale - 1) * weight


Condition = torch.Tensor | Text
"""What an image is to show: classes (B,), integers, or captions (`genlab.text.Text`)."""


@dataclass(eq=False)
class State:
    """A log of what has been committed, row by row; generators add their caches."""

    labels_B: torch.Tensor
    guidance: Guidance
    n: list[int] = field(default_factory=list)
    """Groups committed, a row."""
    ticket: int = 0
    """Changes whenever what was predicted is out of date."""
    calls: int = 0
    """Network evaluations so far."""
    rows_computed: int = 0
    """Rows of all evaluations, the unconditional ones too."""

    def check(self, ticket: int) -> None:
        """Refuse a distribution that was made from an older state.

        Raises:
            ValueError: if the state has moved on.
        """
        if ticket != self.ticket:
            raise ValueError("this distribution was made from an older state; call predict again after commit or crop")

    def keep_first(self, n: list[int]) -> None:
        """Count only the first n[b] groups of row b.

        Raises:
            ValueError: for more than a row holds.
        """
        if len(n) != len(self.n) or any(not 0 <= m <= old for m, old in zip(n, self.n, strict=True)):
            raise ValueError(f"can't crop rows at {self.n} groups to {n}")
        self.n, self.ticket = list(n), self.ticket + 1

    @property
    def group(self) -> int:
        """The group that comes next, the same for all rows.

        Raises:
            ValueError: if rows stand at different groups.
        """
        if min(self.n) != max(self.n):
            raise ValueError(f"rows stand at different groups ({min(self.n)} to {max(self.n)}); crop them to one")
        return self.n[0]


@dataclass(eq=False)
class AnyOrderState(State):
    """The log of a generator of any order: which positions each row holds, in the order of their commits."""

    order_BL: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    """Row b's first `n[b]` entries are its committed positions; the others mean nothing."""

    def open(self) -> torch.Tensor:
        """The positions that are still open, (B, M), in raster order.

        Raises:
            ValueError: if rows hold different numbers of positions.
        """
        if len(set(self.n)) > 1:
            raise ValueError(f"rows hold different numbers of positions: {sorted(set(self.n))}")
        B, L = self.order_BL.shape
        held_BL = torch.zeros(B, L, dtype=torch.bool, device=self.order_BL.device)
        return places_of(~held_BL.scatter_(1, self.order_BL[:, : self.n[0]], True))

    def after(self, where_BG: torch.Tensor) -> AnyOrderState:
        """The log with these positions behind it: a shallow copy, this state stays as it is."""
        G = where_BG.shape[1]
        n_B1 = torch.tensor(self.n, device=where_BG.device)[:, None]
        at_BG = n_B1 + torch.arange(G, device=where_BG.device)
        held_BL = (torch.arange(self.order_BL.shape[1], device=where_BG.device) < n_B1).long()
        counts_BL = torch.zeros_like(held_BL).scatter_add(1, self.order_BL, held_BL)
        counts_BL = counts_BL.scatter_add(1, where_BG, torch.ones_like(where_BG))
        if bool((counts_BL > 1).any()):
            twice = counts_BL.gt(1).nonzero()[:4].tolist()
            raise ValueError(f"positions would be committed twice, [row, position]: {twice}")
        return replace(self, order_BL=self.order_BL.scatter(1, at_BG, where_BG), n=[n + G for n in self.n])

    def record(self, where_BG: torch.Tensor) -> None:
        """Note the commit of these positions.

        Raises:
            ValueError: if a row holds one of them already, or one is named twice.
        """
        later = self.after(where_BG)
        self.order_BL, self.n, self.ticket = later.order_BL, later.n, self.ticket + 1


def places_of(known_BL: torch.Tensor) -> torch.Tensor:
    """Where a mask is true, (B, M), in raster order.

    Raises:
        ValueError: if it is true at different numbers of places in different rows.
    """
    counts = known_BL.sum(1).tolist()
    if len(set(counts)) > 1:
        raise ValueError(f"as many tokens must be given in each row, got {counts}; draw such rows apart")
    return known_BL.nonzero()[:, 1].view(len(known_BL), counts[0])


class Generator(Model):
    """Draws the tokens of an image group by group, given a class or a caption."""

    num_classes: int
    n_groups: int
    predicts: ClassVar[type]
    """The class of the distributions it predicts: what a sampler must be able to draw from."""
    text_length: int = 0
    """By text: embeddings a caption at most."""
    any_order: bool = False
    """Whether `predict` takes any set of open positions; then each position is a group of its own."""

    @property
    def spec(self) -> TokenSpec:
        """The tokens it takes and makes."""
        raise NotImplementedError

    @property
    def by_text(self) -> bool:
        """Whether it draws by captions, `Text`; otherwise by classes. What a config with a `condition` says."""
        return getattr(self.config, "condition", "class") == "text"

    @property
    def event_ids(self) -> int:
        """How many ids a position of an event holds, where ids are predicted."""
        return self.spec.depth

    @property
    def default_guidance(self) -> Guidance:
        """Guidance where the user names none."""
        return Guidance()

    @cached_property
    def text_encoder(self) -> TextEncoder:
        """By text: the frozen encoder that reads captions for it.

        Raises:
            ValueError: if its checkpoint doesn't say.
        """
        if not (name := self.extra.get("text_encoder")):
            where = self.extra.get("name", f"this {self.kind}")
            if seed := self.extra.get("codes_of"):
                raise ValueError(
                    f"{where} draws the codes of {seed}, not words: `genlab reconstruct {seed}` shows what it draws of "
                    "pictures, and a language model over those codes takes words, `genlab sample seed_llama-emoji64 "
                    '--prompt "a red apple"`'
                )
            raise ValueError(f"{where} draws by text, but its checkpoint names no text encoder (text_encoder)")
        return TextEncoder(name, self.text_length)

    def read_captions(self, captions: Sequence[str]) -> Text:
        """By text: captions as `start` takes them.

        Raises:
            ValueError: if its checkpoint doesn't say who reads them.
        """
        return self.text_encoder(captions)

    def where(self, group: int) -> torch.Tensor:
        """Absolute positions (G,) of a group's tokens; they address the noise."""
        raise NotImplementedError

    def progress(self, group: int) -> float:
        """The guidance schedule's r at a group: 0 at the first, 1 at the last."""
        return group / max(1, self.n_groups - 1)

    def loss(self, tokens: torch.Tensor, labels: Condition, noise: Noise) -> dict[str, torch.Tensor]:
        """Training loss of token values (B, *spec.shape) under classes (B,) or captions; `loss` is to be minimised."""
        raise NotImplementedError

    def start(self, labels: Condition, guidance: Guidance | None = None) -> Any:
        """An empty state for rows of these classes (B,), `num_classes` being "no class", or of these captions."""
        raise NotImplementedError

    def predict(self, state: Any, where: torch.Tensor | None = None) -> TokenDistribution:
        """The distribution of each row's next group; with `any_order`, at the open positions where (B, G)."""
        raise NotImplementedError

    def predict_many(
        self, state: Any, drafts: list[torch.Tensor], where: list[torch.Tensor] | None = None
    ) -> Sequence[TokenDistribution]:
        """The distributions of the next len(drafts) + 1 groups, each given the drafts before it, in one forward.

        With `any_order`, `where` lists the positions (B, G) of each of the len(drafts) + 1 sets.
        """
        raise NotImplementedError

    def predict_tree(self, state: Any, ids_BNK: torch.Tensor, parent_BN: torch.Tensor) -> Categorical:
        """The distributions behind each row's end and behind each node of a tree of drafts: logits (B, N + 1, K, V).

        Node i of row b holds ids_BNK[b, i]; its parent is an earlier node, or -1, the row's end. One forward where a
        generator defines it, here one a node. Generators over ids, one position a group.
        """
        return predict_each(self, state, ids_BNK, parent_BN)

    def keep_path(self, state: Any, path_BD: torch.Tensor) -> None:
        """Before committing a path of the tree just read, nodes (B, D), -1 behind its end: keep what was computed."""

    def commit(self, state: Any, event: torch.Tensor, where: torch.Tensor | None = None) -> None:
        """Fix what was drawn for the next group; with `any_order`, at the positions where (B, G)."""
        raise NotImplementedError

    def advance(self, state: Any, events_BTK: torch.Tensor, take_B: list[int]) -> None:
        """Commit the first take_B[b] of row b's events, one position a group; drafts behind them are forgotten."""
        begin = list(state.n)
        for t in range(max(take_B)):
            self.commit(state, events_BTK[:, t : t + 1])
        self.crop(state, [n + t for n, t in zip(begin, take_B, strict=True)])

    def hold(self, state: Any, values: torch.Tensor, known_BL: torch.Tensor) -> None:
        """Fix given tokens in an empty state, so that only the others are drawn (inpainting).

        Args:
            state: as `start` makes it.
            values: tokens (B, *spec.shape); unknown ones are not read.
            known_BL: which count. In any order: any, as many in each row; otherwise those of the first groups.

        Raises:
            ValueError: for tokens that can't be given, naming those that can.
        """
        B, L = known_BL.shape
        values, known_BL = values.to(self.device).reshape(B, L, -1), known_BL.to(self.device)
        if self.any_order:
            where = places_of(known_BL)
            if where.shape[1]:
                self.commit(state, values.gather(1, where[..., None].expand(-1, -1, values.shape[-1])), where)
            return
        self.require_parts()
        groups, codes = [self.positions(g) for g in range(self.n_groups)], self.spec.depth // self.event_ids
        whole = [bool(known_BL[:, g].all()) for g in groups]
        first = whole.index(False) if False in whole else len(groups)
        if any(bool(known_BL[:, g].any()) for g in groups[first:]):
            raise ValueError(
                f"a {self.kind} draws its {self.n_groups} groups of tokens one after the other, so what is given must "
                f"be the first of them; group {first} is not given, or not whole, and something behind it is"
            )
        for i, g in enumerate(groups[:first]):
            self.commit(state, values[:, g] if codes == 1 else values[:, g, i % codes, None])

    def positions(self, group: int) -> torch.Tensor:
        """Positions of the token map that a group draws, wholly or a code of: what a mask of known tokens counts."""
        return self.where(group) // (self.spec.depth // self.event_ids)

    def require_parts(self) -> None:
        """Refuse to be given tokens.

        Raises:
            ValueError: for generators whose groups are whole maps.
        """
        if not (self.any_order or self._part_by_part):
            raise ValueError(
                f"a {self.kind} of these sizes draws whole maps, none of which can be given: parts of an image are "
                "filled in by mar, elm_masked or resgen, or the end of one by models that draw part after part"
            )

    @property
    def _part_by_part(self) -> bool:
        """Whether each group is some positions of the one map (or a code of one position), and not a map of its own."""
        places = torch.cat([self.where(g) for g in range(self.n_groups)]).sort().values
        # a coarse-to-fine one may draw the first tokens only
        spec = self.spec
        drawn = len(places) if spec.order == "coarse_to_fine" else spec.length * spec.depth // self.event_ids
        return spec.order != "scale" and torch.equal(places, torch.arange(drawn, device=places.device))

    def crop(self, state: Any, n: list[int]) -> None:
        """Keep only the first n[b] groups of row b."""
        raise NotImplementedError

    def tokens(self, state: Any) -> Tokens:
        """The finished tokens.

        Raises:
            ValueError: if groups are still missing.
        """
        raise NotImplementedError

    def peek(self, state: Any) -> Tokens:
        """The tokens so far, to show an image as it forms: missing ids and vectors are 0, of ordered tokens absent.

        They are a copy: what is committed later doesn't change them.

        Raises:
            ValueError: for generators whose groups are whole maps.
        """
        if not self._part_by_part:
            raise ValueError(f"a {self.kind} of these sizes draws whole maps: there is nothing to see before the last")
        tokens = self.tokens(replace(state, n=[self.n_groups] * len(state.n)))
        so_far = torch.tensor(state.n, device=self.device).clamp(min=1)
        return tokens.first(so_far) if self.spec.order == "coarse_to_fine" else tokens

    def require_complete(self, state: State) -> None:
        """Refuse a state that isn't finished.

        Raises:
            ValueError: if groups are still missing.
        """
        if min(state.n) < self.n_groups:
            raise ValueError(f"only {min(state.n)} of {self.n_groups} groups are committed")

    def check_labels(self, labels: Condition) -> torch.Tensor:
        """Labels as long (B,) on this device.

        Raises:
            ValueError: for captions, or classes outside 0 … num_classes.
        """
        if isinstance(labels, Text):
            raise ValueError(f"this {self.kind} draws by class, not by text: give labels (B,) in 0..{self.num_classes}")
        labels = labels.to(self.device).long()
        if labels.ndim != 1 or bool(((labels < 0) | (labels > self.num_classes)).any()):
            raise ValueError(
                f"labels must be (B,) integers in 0..{self.num_classes} ({self.num_classes} = no class), "
                f"got {labels.tolist()}"
            )
        return labels

    def check_captions(self, captions: Condition, side: Literal["left", "right"] = "right") -> Text:
        """Captions padded to `text_length` on one side, with a mask, on this device.

        Raises:
            ValueError: for classes, or captions of another size.
        """
        if not isinstance(captions, Text):
            raise ValueError(
                f"this {self.kind} draws by text: give `Text(embeddings (B, T, D), mask (B, T))`, not classes"
            )
        T, D = captions.embeds_BTD.shape[1:]
        if self.config.text_dim != D or not 0 < T <= self.text_length:
            raise ValueError(
                f"captions must be 1 to {self.text_length} embeddings of {self.config.text_dim} channels, got {T} of "
                f"{D}: use the text encoder it was trained with, and cut captions to that length"
            )
        return captions.to(self.device).padded(self.text_length, side)

    def labels_of(self, condition: Condition) -> torch.Tensor:
        """What a state notes as the labels (B,) of a checked condition: classes, or zeros for captions."""
        if isinstance(condition, Text):
            return torch.zeros(len(condition), dtype=torch.long, device=self.device)
        return condition

    def drop_labels(self, labels: Condition, rate: float, noise: Noise) -> torch.Tensor:
        """Replace a share of labels by "no class", for guidance."""
        labels = self.check_labels(labels)
        drop = noise.at(purpose="label drop").uniform(1)[:, 0] < rate
        return torch.where(drop.to(labels.device), self.num_classes, labels)

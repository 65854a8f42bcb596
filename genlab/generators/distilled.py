"""Distilled Decoding: a student that draws all of a teacher's tokens at once (Liu et al., arXiv 2412.17153).

`CodeFlow` makes of an autoregressive teacher a function from noise to tokens: eps_1 … eps_L to q_1 … q_L. The student
learns that function. It is given (q_1 … q_t, eps_t+1 … eps_L), for any t, and says the rest in one forward pass: one
step from t = 0, more by keeping the first part of what it said and jumping again, with the same noise.

It is the teacher's network, with the teacher's weights to start from. A place that predicts token i also reads
eps_i, and where what it would read of earlier tokens isn't known, an embedding for that. Its logits are then bent by
the noise: a few coarse steps of the flow under the distribution that they say. So with all tokens before i known, a
fresh student already is nearly its teacher's map (nine ids of ten); what it has to learn is to do without the tokens.
The published student shifts its sequence instead (output i reads token i), and its head isn't bent.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

from genlab.code_flow import CodeFlow, bend, code_vectors, follow_flow
from genlab.config import config
from genlab.distributions import Categorical, Deterministic
from genlab.noise import Noise
from genlab.processes import batch_mean
from genlab.tokens import Tokens, TokenSpec

from .base import Condition, Generator, Guidance, State
from .causal import CausalLM
from .elm import ELM, ELMConfig
from .llamagen import LlamaGen, LlamaGenConfig
from .var import VAR, VARConfig

START_GAINS = (0.75, 0.25)
"""How much of the noise's pull is added to the logits at first: where all earlier tokens are known, and elsewhere."""
PACE = 10.0
"""Gains are exp(PACE x) of what is learned, so that they move faster than weights do."""


@config
class MapConfig:
    """The function from noise to tokens: how the teacher's distribution is shaped, and how the flow is solved."""

    guidance: Guidance | None = None
    """The teacher's guidance, which the student learns with it; None takes the teacher's default."""
    temperature: float = 1.0
    """Divides the teacher's logits."""
    top_k: int = 0
    """Keep the k likeliest ids; 0 keeps all."""
    top_p: float = 1.0
    """Keep the smallest set of ids whose mass reaches p; 1 keeps all."""
    method: Literal["heun", "euler"] = "heun"
    """The flow's solver."""
    steps: int = 25
    """Its steps; Heun wants 25, Euler 100."""

    def shape(self, dist: Categorical) -> Categorical:
        """The teacher's distribution that ids are drawn from."""
        return dist.temperature(self.temperature).top_k(self.top_k).top_p(self.top_p)


@config
class DistilledConfig:
    """A student: its network is its teacher's."""

    kind: Literal["distilled"] = "distilled"
    net: LlamaGenConfig | ELMConfig | VARConfig
    """The teacher's sizes."""
    code_dim: int = 8
    """Channels of a code: VQ's or VAR's `code_dim`, ELM's bits of a sub-token."""
    map: MapConfig = MapConfig()
    """What it learns."""
    teacher: str = ""
    """To train: the teacher, a MODEL (shipped name, folder or Hub id)."""
    captions: str = ""
    """To train a student by text: a file of captions, one a line; empty: those of the teacher's training set."""
    pairs: int = 10_000
    """To train: how many images of the teacher to learn from."""
    times: tuple[float, ...] = (1.0, 0.7, 0.4)
    """Times of the flow's coarse steps (Heun's) by which the noise bends the logits."""
    from_noise: float = 0.5
    """Share of training rows that start from noise alone; the others start behind any group, uniformly."""
    embedding: float = 0.0
    """Weight of the squared distance between the mean code that the logits expect and the teacher's, beside the
    cross-entropy."""


@dataclass(eq=False)
class DistilledState(State):
    """Ids so far, and the checked condition."""

    ids_BLK: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    condition: Any = None


class Distilled(Generator):
    """The student; a group is a group of the teacher's, and `predict` gives all that are missing."""

    kind = "distilled"
    Config = DistilledConfig
    config: DistilledConfig
    predicts = Deterministic
    codes: torch.Tensor
    begins: torch.Tensor

    def __init__(self, config: DistilledConfig) -> None:
        """Args: config: sizes. Raises: ValueError: for sizes that don't go together."""
        super().__init__(config)
        c = config
        kinds: dict[str, Any] = {"llamagen": LlamaGen, "elm": ELM, "var": VAR}
        self.net: CausalLM | VAR = kinds[c.net.kind](c.net)
        needed = {"elm": getattr(c.net, "bits", 0), "var": getattr(c.net, "code_dim", 0)}.get(c.net.kind, c.code_dim)
        if needed != c.code_dim:
            raise ValueError(f"the codes of this {c.net.kind} have {needed} channels, not code_dim {c.code_dim}")
        if not c.times or list(c.times) != sorted(set(c.times), reverse=True) or c.times[0] > 1 or c.times[-1] <= 0:
            raise ValueError(f"times must fall from at most 1 to above 0, got {c.times}")
        if not 0 < c.from_noise <= 1:
            raise ValueError(f"from_noise must be in (0, 1], got {c.from_noise}")
        self.num_classes, self.n_groups = self.net.num_classes, self.net.n_groups
        self.text_length = self.net.text_length
        self.K, self.M = self.spec.depth, self.spec.depth * c.code_dim
        groups = [len(self.net.where(g)) for g in range(self.n_groups)]
        self.ends = list(accumulate(groups))
        begins = [end - n for end, n in zip(self.ends, groups, strict=True) for _ in range(n)]
        self.register_buffer("begins", torch.tensor(begins), persistent=False)  # where each place's group begins
        self.register_buffer("codes", torch.full((self.spec.vocab or 0, c.code_dim), torch.nan))
        self.noise_proj = nn.Linear(self.M, c.net.dim)
        self.unknown = nn.Parameter(torch.zeros(c.net.dim))
        self.log_gain = nn.Parameter(torch.tensor(START_GAINS).log().repeat(self.K, 1) / PACE)
        for value in self.noise_proj.parameters():  # it starts as its teacher
            nn.init.zeros_(value)

    @property
    def spec(self) -> TokenSpec:
        """The teacher's tokens."""
        return self.net.spec

    @property
    def by_text(self) -> bool:
        """As the teacher."""
        return self.net.by_text

    @property
    def flow(self) -> CodeFlow:
        """The map it has learnt, for mixing with the teacher."""
        return CodeFlow(self.codes.float(), self.config.map.method, self.config.map.steps)

    def inherit(self, teacher: Generator, tokenizer: Any) -> None:
        """Take the teacher's weights and the tokenizer's codes, before training.

        Raises:
            ValueError: for a teacher of other sizes, or a tokenizer without such codes.
        """
        from genlab.hub import load_strict

        load_strict(self.net, teacher.state_dict(), where=f"the teacher, a {teacher.kind},")
        codes = code_vectors(tokenizer)
        if codes.shape != self.codes.shape:
            raise ValueError(f"codes are {tuple(codes.shape)}, the student expects {tuple(self.codes.shape)}")
        self.codes.copy_(codes)

    def where(self, group: int) -> torch.Tensor:
        """The teacher's places."""
        return self.net.where(group)

    # -- the network --------------------------------------------------------------------------------------------

    def check_condition(self, condition: Condition) -> Any:
        """The condition, as the teacher checks it."""
        return self.net.check_condition(condition)

    def logits(
        self, condition: Any, ids_BLK: torch.Tensor, first_B: torch.Tensor, noise_BLM: torch.Tensor
    ) -> torch.Tensor:
        """Logits (B, L, K, V), float32, of every token given the first ones and the noise of the others.

        Args:
            condition: checked.
            ids_BLK: ids, of which row b's first `first_B[b]` count.
            first_B: how many tokens are known, whole groups.
            noise_BLM: the noise (B, L, K C) of all tokens, of which the known ones' isn't read.
        """
        noise = noise_BLM.to(self.codes.device, torch.float32)  # decides ids, so it is never rounded with the weights
        own = torch.arange(len(self.begins), device=noise.device) >= first_B[:, None]
        reads = (self.begins <= first_B[:, None])[..., None]  # all that the teacher would read here is known
        heard = self.noise_proj(noise.to(self.noise_proj.weight))
        extra = torch.where(own[..., None], heard, 0) + torch.where(reads, 0, self.unknown)
        net = self.net
        if isinstance(net, VAR):
            with torch.no_grad(), torch.autocast(noise.device.type, enabled=False):
                x = net.inputs(ids_BLK[..., 0])
            x = net.embed(condition, torch.where(reads[:, net.sizes[0] :], x, 0), 0, net.n_groups) + extra
            logits = net.forward(x, net.modulation(condition), net.scale_of[:, None] >= net.scale_of)[:, :, None]
        else:
            prefix, seen = net.embed_condition(condition)
            P = prefix.shape[1]
            x = torch.cat([prefix, torch.where(reads[:, 1:], net.embed(ids_BLK[:, :-1]), 0)], 1)
            x = torch.cat([x[:, : P - 1], x[:, P - 1 :] + extra], 1)
            mask = None if seen is None else net.visible(torch.arange(x.shape[1], device=x.device), x.shape[1], seen)
            logits = net.heads(net.gpt(x, mask=mask)[:, P - 1 :])
        gain = (PACE * self.log_gain).exp()
        return logits + torch.where(reads[..., None], gain[:, :1], gain[:, 1:]) * self.pull(logits, noise)

    @torch.no_grad()
    def pull(self, logits_BLKV: torch.Tensor, noise_BLM: torch.Tensor) -> torch.Tensor:
        """What the noise adds to logits (B, L, K, V): where a few coarse steps of the flow under them lead.

        Without gradients: logits learn by what they say themselves, and how far to trust the pull is learned (`gain`).
        """
        times = self.config.times
        with torch.autocast(noise_BLM.device.type, enabled=False):
            log_p, eps = logits_BLKV.float().log_softmax(-1), noise_BLM.unflatten(-1, (self.K, -1))
            parts = zip(log_p.flatten(0, 2).split(4096), eps.flatten(0, 2).split(4096), strict=True)
            codes = self.codes.float()
            x = torch.cat([follow_flow(codes, p, e, times, heun=True) for p, e in parts])
            return bend(codes, x, times[-1]).view_as(logits_BLKV)

    def noise_of(self, noise: Noise, positions: torch.Tensor | None = None) -> torch.Tensor:
        """The noise (B, G, K C) of all positions, or of these: that of `Deterministic`."""
        every = torch.arange(len(self.begins), device=self.begins.device)
        return noise.at(position=every if positions is None else positions, step=0, purpose="start").normal(self.M)

    def loss(self, tokens: torch.Tensor, labels: Condition, noise: Noise) -> dict[str, torch.Tensor]:
        """Cross-entropy of every unknown id, nats, for tokens that the noise leads to.

        Args:
            tokens: what the map makes of the noise, values (B, *spec.shape).
            labels: their condition.
            noise: theirs; its `step` chooses what is known.
        """
        ids = tokens.view(len(tokens), -1, self.K)
        u = noise.at(position=0, purpose="split").uniform(2)
        group = torch.where(u[:, 0] < self.config.from_noise, 0, (u[:, 1] * self.n_groups).long())
        ends = torch.tensor([0, *self.ends], device=ids.device)
        first = ends[group.to(ids.device)]
        logits = self.logits(self.check_condition(labels), ids, first, self.noise_of(noise))
        own = (torch.arange(ids.shape[1], device=ids.device) >= first[:, None]).float()
        nats = F.cross_entropy(logits.flatten(0, 2), ids.flatten(), reduction="none").view(ids.shape).mean(-1)
        hit = (logits.detach().argmax(-1) == ids).float().mean(-1)
        blank = own * (first == 0).float()[:, None]
        terms = {
            "cross_entropy": batch_mean(nats, own),
            "agreement": batch_mean(hit, own),
            "agreement_from_noise": batch_mean(hit, blank),
        }
        loss = terms["cross_entropy"]
        if self.config.embedding:
            far = (logits.softmax(-1) @ self.codes - self.codes[ids]).square().mean((-1, -2))
            terms["embedding"] = batch_mean(far, own)
            loss = loss + self.config.embedding * terms["embedding"]
        return {"loss": loss, **terms}

    # -- drawing ------------------------------------------------------------------------------------------------

    def start(self, labels: Condition, guidance: Guidance | None = None) -> DistilledState:
        """An empty state.

        Raises:
            ValueError: for guidance, which the student has learnt from its teacher and can't change.
        """
        if guidance is not None and guidance.scale != 1:
            raise ValueError(
                f"a student has its teacher's guidance in its weights, it can't be guided by {guidance.scale}: "
                "leave --guidance away, or distil again with --model.map.guidance"
            )
        condition = self.check_condition(labels)
        B = len(condition)
        return DistilledState(
            labels_B=self.labels_of(condition),
            guidance=Guidance(),
            n=[0] * B,
            ids_BLK=torch.zeros(B, len(self.begins), self.K, dtype=torch.long, device=self.device),
            condition=condition,
        )

    def rest(self, state: DistilledState) -> torch.Tensor:
        """The places that are missing: they address the noise of `predict`."""
        return torch.arange(self._known(state), len(self.begins), device=self.device)

    def _known(self, state: DistilledState) -> int:
        return self.ends[state.group - 1] if state.group else 0

    def predict(self, state: DistilledState, where: torch.Tensor | None = None) -> Deterministic:
        """All that is missing, ids (B, rest, K), as a function of its noise; one network evaluation."""
        first, ticket = self._known(state), state.ticket
        if first == len(self.begins):
            raise ValueError(f"all {self.n_groups} groups are committed already")

        def decide(noise_BRM: torch.Tensor) -> torch.Tensor:
            state.check(ticket)
            first_B = torch.full((len(state.n),), first, device=self.device)
            noise = F.pad(noise_BRM, (0, 0, first, 0))
            logits = self.logits(state.condition, state.ids_BLK, first_B, noise)
            state.calls += 1
            state.rows_computed += len(state.n)
            return logits[:, first:].argmax(-1)

        return Deterministic(decide, self.M)

    def commit(self, state: DistilledState, event: torch.Tensor, where: torch.Tensor | None = None) -> None:
        """Fix the next ids (B, n, K): whole groups, one or more.

        Raises:
            ValueError: for an event of another shape, or one that ends inside a group.
        """
        first, (B, n) = self._known(state), (len(state.n), event.shape[1])
        if tuple(event.shape) != (B, n, self.K) or first + n not in self.ends or not n:
            raise ValueError(
                f"an event must be ids ({B}, n, {self.K}) that fill whole groups behind token {first}, "
                f"got {tuple(event.shape)}"
            )
        state.ids_BLK[:, first : first + n] = event
        state.n = [self.ends.index(first + n) + 1] * B
        state.ticket += 1

    def crop(self, state: DistilledState, n: list[int]) -> None:
        """Keep the first n[b] groups of row b; `predict` wants all rows at one group.

        Raises:
            ValueError: for more than a row holds.
        """
        state.keep_first(n)

    def tokens(self, state: DistilledState) -> Tokens:
        """The finished ids, as the spec shapes them."""
        self.require_complete(state)
        return Tokens(state.ids_BLK.view(len(state.n), *self.spec.shape).clone(), self.spec)

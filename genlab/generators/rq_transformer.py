"""Autoregression over stacks of residual codes: RQ-Transformer (Lee et al., arXiv 2203.01941), and the flat kind.

What ResGen is measured against: here every code costs a step. `stack`: a transformer over positions, whose input is
the sum of the codes of the position before, and behind each of its outputs a small one over the depths. `flat`: one
transformer over all L D codes in a row. Either draws one code a group, position after position, coarse before fine.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

from genlab.config import config
from genlab.distributions import Categorical
from genlab.nn.attention import KVCache
from genlab.nn.gpt import GPT
from genlab.nn.layers import Linear
from genlab.noise import Noise
from genlab.tokens import Tokens, TokenSpec, require_fit

from .base import Condition, Generator, Guidance, State


@config
class RQTransformerConfig:
    """Sizes of an autoregressive model of residual codes."""

    kind: Literal["rq_transformer"] = "rq_transformer"
    style: Literal["stack", "flat"] = "stack"
    """A transformer over positions and one over depths, or one over all codes."""
    grid: tuple[int, int] = (8, 8)
    """Rows and columns of the positions."""
    vocab: int = 1024
    """Codes of each depth."""
    codes_depth: int = 8
    """Codes D a position."""
    code_dim: int = 0
    """Channels of the tokenizer's codes, which are read as they are, through one linear layer (the paper's way); 0: a
    learned table each depth."""
    num_classes: int = 1000
    """Classes; one more row of the table stands for "no class"."""
    dim: int = 1024
    """Width."""
    depth: int = 24
    """Blocks over positions; `flat`: over codes."""
    stack_depth: int = 4
    """`stack`: blocks over depths."""
    heads: int = 16
    """Attention heads."""
    hidden: int = 0
    """Width inside the MLP; 0 takes 8/3 of the width, rounded up."""
    dropout: float = 0.0
    """In training."""
    label_drop: float = 0.1
    """Share of training labels replaced by "no class"."""


@dataclass(eq=False)
class RQState(State):
    """Codes so far, and what the networks have read; all rows stand at the same code."""

    ids_BN: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    classes_R: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    cache: KVCache | None = None
    stack: KVCache | None = None
    h_RD: torch.Tensor | None = None
    """`stack`: the output over positions that the position in hand builds on."""


class RQTransformer(Generator):
    """One code a group."""

    kind = "rq_transformer"
    Config = RQTransformerConfig
    config: RQTransformerConfig
    codebooks: torch.Tensor
    predicts = Categorical

    def __init__(self, config: RQTransformerConfig) -> None:
        """Args: config: sizes. Raises: ValueError: for sizes that don't go together."""
        super().__init__(config)
        c = config
        self.num_classes, self.D = c.num_classes, c.codes_depth
        self.n_groups = c.grid[0] * c.grid[1] * self.D
        sizes: dict[str, Any] = {"dim": c.dim, "heads": c.heads, "hidden": c.hidden, "dropout": c.dropout}
        # flat: the codes of a position stand side by side, as columns
        grid = c.grid if c.style == "stack" else (c.grid[0], c.grid[1] * self.D)
        self.class_emb = nn.Embedding(c.num_classes + 1, c.dim)
        if c.code_dim:
            # NaN until a tokenizer's are adopted
            self.register_buffer("codebooks", torch.full((self.D, c.vocab, c.code_dim), torch.nan))
            self.enter = nn.Linear(c.code_dim, c.dim)
        else:
            self.tables = nn.ModuleList(nn.Embedding(c.vocab, c.dim) for _ in range(self.D))
        self.gpt = GPT(grid=grid, prefix=1, depth=c.depth, **sizes)
        if c.style == "stack":
            self.stack = GPT(grid=(1, self.D), prefix=0, depth=c.stack_depth, **sizes)
        self.depth_emb = nn.Embedding(self.D, c.dim)
        self.outputs = nn.ModuleList(Linear(c.dim, c.vocab, bias=False) for _ in range(self.D))
        for module in self.modules():
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        for head in self.outputs:
            nn.init.zeros_(head.weight)  # type: ignore[arg-type]

    @property
    def spec(self) -> TokenSpec:
        """Stacks of ids."""
        c = self.config
        return TokenSpec(kind="residual", grid=c.grid, vocab=c.vocab, depth=self.D)

    @property
    def event_ids(self) -> int:
        """One code a group."""
        return 1

    @property
    def default_guidance(self) -> Guidance:
        """Constant."""
        return Guidance(scale=1.5, schedule="constant")

    def where(self, group: int) -> torch.Tensor:
        """The code's place among all."""
        return torch.tensor([group], device=self.device)

    @torch.no_grad()
    def adopt(self, tokenizer: Any) -> None:
        """Copy the codebooks of the tokenizer whose codes it reads, if it reads them.

        Raises:
            ValueError: if its tokens or codes are of another size.
        """
        require_fit(getattr(tokenizer, "kind", "tokenizer"), tokenizer.spec, self.kind, self.spec)
        if not self.config.code_dim:
            return
        codes = tokenizer.codebooks
        if codes.shape != self.codebooks.shape:
            raise ValueError(
                f"the tokenizer's codebooks are {tuple(codes.shape)}, this {self.kind} takes "
                f"{tuple(self.codebooks.shape)}: set --model.code-dim {codes.shape[-1]}"
            )
        self.codebooks.copy_(codes)

    # -- the networks -----------------------------------------------------------------------------------------------

    def embed(self, ids_BLD: torch.Tensor) -> torch.Tensor:
        """Each code, (B, L, D, dim)."""
        if self.config.code_dim:
            if bool(self.codebooks[0, 0, 0].isnan()):
                raise ValueError(
                    f"this {self.kind} has no codebooks yet: call adopt(tokenizer), as `genlab train` does"
                )
            size = self.codebooks[0].float().square().mean().sqrt()  # deeper codes stay the smaller ones they are
            codes = self.codebooks[torch.arange(self.D, device=ids_BLD.device), ids_BLD]
            return self.enter((codes / size).to(self.enter.weight.dtype))
        return torch.stack([table(ids) for table, ids in zip(self.tables, ids_BLD.unbind(-1), strict=True)], 2)

    def logits(self, ids_BLD: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Teacher forcing: logits (B, L, D, V) of every code given those before it, float32."""
        B, L, D = ids_BLD.shape
        codes, start = self.embed(ids_BLD), self.class_emb(labels)[:, None]
        if self.config.style == "flat":
            x = (codes + self.depth_emb.weight).flatten(1, 2)
            h = self.gpt(torch.cat([start, x[:, :-1]], 1)).unflatten(1, (L, D))
            h = self.gpt.norm(h)
        else:
            h = self.gpt.norm(self.gpt(torch.cat([start, codes.sum(2)[:, :-1]], 1)))
            before = torch.cat([torch.zeros_like(codes[:, :, :1]), codes[:, :, :-1].cumsum(2)], 2)
            x = (h[:, :, None] + before + self.depth_emb.weight).flatten(0, 1)
            h = self.stack.norm(self.stack(x)).unflatten(0, (B, L))
        return torch.stack([head(h[:, :, d]) for d, head in enumerate(self.outputs)], 2).float()

    def loss(self, tokens: torch.Tensor, labels: Condition, noise: Noise) -> dict[str, torch.Tensor]:
        """Cross-entropy of every code given those before it, nats."""
        labels = self.drop_labels(labels, self.config.label_drop, noise)
        logits = self.logits(tokens, labels)
        each = F.cross_entropy(logits.flatten(0, 2), tokens.flatten(), reduction="none").view(tokens.shape)
        mean = each.detach().mean((0, 1))
        return {"loss": each.mean(), "loss_first_depth": mean[0], "loss_last_depth": mean[-1]}

    # -- drawing ----------------------------------------------------------------------------------------------------

    def start(self, labels: Condition, guidance: Guidance | None = None) -> RQState:
        """An empty state; conditional rows first, then (where guidance needs them) unconditional ones."""
        labels = self.check_labels(labels)
        guidance = guidance or self.default_guidance
        B, c = len(labels), self.config
        guided = any(guidance.at(self.progress(g)) != 1 for g in range(self.n_groups))
        classes = torch.cat([labels, torch.full_like(labels, self.num_classes)]) if guided else labels
        like, rows, head_dim = self.class_emb.weight, len(classes), c.dim // c.heads
        length = self.n_groups if c.style == "flat" else self.n_groups // self.D
        return RQState(
            labels_B=labels,
            guidance=guidance,
            n=[0] * B,
            ids_BN=torch.zeros(B, self.n_groups, dtype=torch.long, device=self.device),
            classes_R=classes,
            cache=KVCache(c.depth, rows, c.heads, length, head_dim, like=like),
            stack=KVCache(c.stack_depth, rows, c.heads, self.D, head_dim, like=like) if c.style == "stack" else None,
        )

    def predict(self, state: RQState, where: torch.Tensor | None = None) -> Categorical:
        """The next code of each row, logits (B, 1, 1, V).

        Raises:
            ValueError: if all codes are committed.
        """
        g, R, B = state.group, len(state.classes_R), len(state.n)
        if g >= self.n_groups:
            raise ValueError(f"all {self.n_groups} groups are committed already")
        ids = state.ids_BN.repeat(R // B, 1)
        h = self._flat(state, ids, g) if self.config.style == "flat" else self._stack(state, ids, *divmod(g, self.D))
        logits = self.outputs[g % self.D](h).float()[:, None, None]
        state.calls, state.rows_computed = state.calls + 1, state.rows_computed + R
        if R > B:
            s = state.guidance.at(self.progress(g))
            cond, uncond = logits.chunk(2)
            logits = cond + (s - 1) * (cond - uncond)
        ticket = state.ticket
        return Categorical(logits, check=lambda: state.check(ticket))

    def _flat(self, state: RQState, ids_RN: torch.Tensor, g: int) -> torch.Tensor:
        """The output (R, dim) that predicts code g, from all codes before it."""
        first, D = _resume(state.cache, g), self.D
        parts = [self.class_emb(state.classes_R)[:, None]] if first == 0 else []
        if g > 0:
            begin = max(first, 1) - 1
            whole = slice(begin // D * D, -(-g // D) * D)  # whole positions
            codes = self.embed(ids_RN[:, whole].view(len(ids_RN), -1, D)) + self.depth_emb.weight
            parts.append(codes.flatten(1, 2)[:, begin - whole.start : g - whole.start])
        return _run(self.gpt, state.cache, torch.cat(parts, 1), first)

    def _stack(self, state: RQState, ids_RN: torch.Tensor, at: int, d: int) -> torch.Tensor:
        """The output (R, dim) that predicts code d of a position, from the positions before it and its codes."""
        ids = ids_RN.view(len(ids_RN), -1, self.D)
        if d == 0 or state.h_RD is None:
            first = _resume(state.cache, at)
            parts = [self.class_emb(state.classes_R)[:, None]] if first == 0 else []
            if at > 0:
                parts.append(self.embed(ids[:, max(first, 1) - 1 : at]).sum(2))
            state.h_RD = _run(self.gpt, state.cache, torch.cat(parts, 1), first)
            assert state.stack is not None
            state.stack.crop([0] * len(ids))
        first = _resume(state.stack, d)
        codes = self.embed(ids[:, at : at + 1])[:, 0]
        before = torch.cat([torch.zeros_like(codes[:, :1]), codes.cumsum(1)], 1)[:, first : d + 1]
        x = state.h_RD[:, None] + before + self.depth_emb.weight[first : d + 1]
        return _run(self.stack, state.stack, x, first)

    def commit(self, state: RQState, event: torch.Tensor, where: torch.Tensor | None = None) -> None:
        """Fix the next code (B, 1, 1) of each row.

        Raises:
            ValueError: for an event of another shape, or if all codes are committed.
        """
        g = state.group
        if tuple(event.shape) != (len(state.n), 1, 1) or g >= self.n_groups:
            raise ValueError(f"expected one code a row, ({len(state.n)}, 1, 1), got {tuple(event.shape)}")
        state.ids_BN[:, g] = event[:, 0, 0]
        state.n, state.ticket = [g + 1] * len(state.n), state.ticket + 1
        if state.n[0] % self.D == 0:  # it was this position's
            state.h_RD = None

    def crop(self, state: RQState, n: list[int]) -> None:
        """Keep the first n codes, as many of each row.

        Raises:
            ValueError: for more than there are, or rows of different lengths.
        """
        if len(set(n)) != 1 or not 0 <= n[0] <= state.group:
            raise ValueError(f"can't crop rows at {state.n} groups to {n}")
        state.n, state.h_RD, state.ticket = list(n), None, state.ticket + 1
        assert state.cache is not None
        keep = n[0] if self.config.style == "flat" else n[0] // self.D
        state.cache.crop([min(m, keep) for m in state.cache.lengths])

    def tokens(self, state: RQState) -> Tokens:
        """The finished ids (B, L, D).

        Raises:
            ValueError: if codes are missing.
        """
        self.require_complete(state)
        return Tokens(state.ids_BN.clone().view(len(state.n), -1, self.D), self.spec)


def _resume(cache: KVCache | None, place: int) -> int:
    """Where reading begins so that `place` is read: behind what the cache holds, or at the place itself, again."""
    assert cache is not None
    cache.crop([min(n, place) for n in cache.lengths])
    return cache.lengths[0]


def _run(net: GPT, cache: KVCache | None, x_RTD: torch.Tensor, first: int) -> torch.Tensor:
    """The last output (R, dim) of T inputs at places first, first + 1, … behind what the cache holds."""
    assert cache is not None
    rows, T = slice(0, len(x_RTD)), x_RTD.shape[1]
    at = torch.arange(first, first + T, device=x_RTD.device)
    mask = (at[:, None] >= torch.arange(first + T, device=x_RTD.device))[None, None] if T > 1 else None
    h = net(x_RTD, at, mask, causal=False, keep=cache.keep(rows))
    cache.advance(T, rows)
    return net.norm(h[:, -1])

"""ResGen: masked generation of residual codes, a whole stack at a time (Kim et al., arXiv 2412.10208, ICML 2025).

A position is a stack of D residual codes. The forward process masks n of the L D codes, spread over the positions like
draws without replacement, and at each position the deepest; the model sees the sums of the codes that are left and
predicts, at each position, the sum z of those that are missing, with a mixture of Gaussians. Quantising a drawn z gives
all missing codes at once, so the number of steps has nothing to do with the depth.

No code is public. What the paper's summaries leave open is ours, and said here: the network also reads how many codes a
position still has; targets are divided by the size that sums of so many codes have; the means m_v + P_v a + shift, m
starting on codes of the first depth, and a spread a component; the weight of the classification; guidance works on what
the head gives linearly (weights, a, shift), the spreads are the conditional one's; and `CodeHead`, a component for each
code of the next depth. docs/resgen.md has both derivations of the loss.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

from genlab.config import config
from genlab.distributions import Gaussian, LowRankMixture
from genlab.nn.gpt import GPT
from genlab.noise import Noise
from genlab.processes import batch_mean
from genlab.tokens import Tokens, TokenSpec, require_fit

from .base import Condition, Generator, Guidance, State, places_of


@config
class ResGenConfig:
    """Sizes of a ResGen."""

    kind: Literal["resgen"] = "resgen"
    grid: tuple[int, ...] = (8, 8)
    """Axes of the positions: rows and columns, or (L,) for a sequence."""
    vocab: int = 1024
    """Codes V of each depth."""
    codes_depth: int = 8
    """Codes D a position."""
    code_dim: int = 64
    """Channels C of a code."""
    num_classes: int = 1000
    """Classes; one more row of the table stands for "no class"."""
    dim: int = 1024
    """Width."""
    depth: int = 24
    """Blocks."""
    heads: int = 16
    """Attention heads."""
    hidden: int = 0
    """Width inside the MLP; 0 takes 8/3 of the width, rounded up."""
    mixtures: int = 256
    """Components of the mixture; 0: one for each code of the next depth, around that code, of one common spread."""
    rank: int = 16
    """Rank of what the network adds to a component's own mean; 0: the shift alone, which components share."""
    mask_power: float = 1.0
    """Training masks the share cos(pi r / 2)^power of the codes, r uniform: 1 / D leaves a position without any code as
    often as MaskGIT does."""
    classification: float = 16.0
    """Weight of the bound's classification in training. The two parts share the network and nothing else, so none
    changes what is best for the other; at 1, the many channels of the regression leave it nothing to learn with."""
    dropout: float = 0.0
    """In training."""
    label_drop: float = 0.1
    """Share of training labels replaced by "no class"."""
    guidance: float = 2.0
    """Guidance scale where the user names none."""


class MixtureHead(nn.Module):
    """A `LowRankMixture` of y: weights, a, shift and spreads from the network; m, P and sigma are learned constants.

    Component v is N(m_v + P_v a + shift, (sigma_v spread_v)^2).
    """

    def __init__(self, dim: int, channels: int, mixtures: int, rank: int) -> None:
        """Args: dim: width of the input. channels: C. mixtures: K. rank: of the means' moving part."""
        super().__init__()
        self.K, self.C, self.rank = mixtures, channels, rank
        self.linear = nn.Linear(dim, mixtures + rank + channels)
        self.spread = nn.Linear(dim, mixtures)
        self.mean = nn.Parameter(torch.randn(mixtures, channels))
        self.low_rank = nn.Parameter(torch.randn(mixtures, channels, rank) * max(rank, 1) ** -0.5)
        self.log_std = nn.Parameter(torch.full((mixtures,), -0.7))
        for layer in (self.linear, self.spread):
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)

    def start(self, codes_DVC: torch.Tensor, size: torch.Tensor) -> None:
        """Put the means on codes of the first depth."""
        picked = torch.arange(self.K) * codes_DVC.shape[1] // self.K
        self.mean.copy_(codes_DVC[0, picked] / size[-1])

    def forward(self, h: torch.Tensor, filled: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What the network says, in float32: the linear part (…, K + rank + C) and the log-spreads (…, K)."""
        with torch.autocast(h.device.type, enabled=False):
            layers = (self.linear, self.spread)
            linear, spread = (F.linear(h.float(), x.weight.float(), x.bias.float()) for x in layers)
        return linear, spread

    def mixture(self, linear: torch.Tensor, spread: torch.Tensor, size: torch.Tensor) -> LowRankMixture:
        """The distribution of z = size y; size is (…, 1)."""
        logits, a, shift = linear.split([self.K, self.rank, self.C], -1)
        log_std = spread + self.log_std.float()
        return LowRankMixture(logits, a, shift, log_std, size, self.mean.float()[None], self.low_rank.float())


class CodeHead(nn.Module):
    """A component for each code of the next depth: N(code + size shift, (size spread)^2), its weight the code's.

    A code's logit is the product of a query and of the code's own key; keys start on the codes.
    """

    def __init__(self, dim: int, channels: int, depths: int, vocab: int) -> None:
        """Args: dim: width of the input. channels: C. depths: D. vocab: V."""
        super().__init__()
        self.query, self.rest = nn.Linear(dim, channels), nn.Linear(dim, channels + 1)
        self.key = nn.Parameter(torch.zeros(depths, vocab, channels))
        self.bias = nn.Parameter(torch.zeros(depths, vocab))
        for layer in (self.query, self.rest):
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)

    def start(self, codes_DVC: torch.Tensor, size: torch.Tensor) -> None:
        """Put the keys on the codes."""
        self.key.copy_(codes_DVC / codes_DVC.square().mean((1, 2), keepdim=True).sqrt())

    def forward(self, h: torch.Tensor, filled: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What the network says, in float32: the linear part (…, V + C) and the log-spread (…, 1)."""
        query, rest = self.query(h), self.rest(h).float()
        # all alike where every code is there: nobody looks at what is drawn of nothing
        logits = query.new_zeros(*query.shape[:-1], self.bias.shape[1], dtype=torch.float32)
        for d, (key, bias) in enumerate(zip(self.key, self.bias, strict=True)):
            logits[filled == d] = F.linear(query[filled == d], key, bias).float()
        return torch.cat([logits, rest[..., :-1]], -1), rest[..., -1:]

    def mixture(
        self,
        linear: torch.Tensor,
        spread: torch.Tensor,
        size: torch.Tensor,
        mean_DVC: torch.Tensor,
        filled: torch.Tensor,
    ) -> LowRankMixture:
        """The distribution of z = size y; size is (…, 1), mean_DVC the codes in units of y, filled (…) the depth."""
        V, C = mean_DVC.shape[1:]
        logits, shift = linear.split([V, C], -1)
        a, P = linear.new_empty(*linear.shape[:-1], 0), linear.new_empty(V, C, 0)
        depth = filled.clamp_max(len(mean_DVC) - 1)  # where nothing is missing, none is drawn
        return LowRankMixture(logits, a, shift, spread, size, mean_DVC, P, depth, in_cell=True)


@dataclass(eq=False)
class ResGenState(State):
    """Codes so far, and how many of each position's are there."""

    ids_BLD: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    filled_BL: torch.Tensor = field(default_factory=lambda: torch.empty(0))


class ResGen(Generator):
    """See the module's docstring."""

    kind = "resgen"
    Config = ResGenConfig
    config: ResGenConfig
    predicts = LowRankMixture
    any_order = True
    codebooks: torch.Tensor
    size_of: torch.Tensor

    def __init__(self, config: ResGenConfig) -> None:
        """Args: config: sizes. Raises: ValueError: for sizes that don't go together."""
        super().__init__(config)
        c = config
        self.num_classes, self.n_groups, self.D = c.num_classes, math.prod(c.grid), c.codes_depth
        if len(c.grid) > 2:
            raise ValueError(f"grid {c.grid} has more than two axes")
        # NaN until a tokenizer's are adopted; size_of[k]: root mean square of sums of a position's k deepest codes
        self.register_buffer("codebooks", torch.full((c.codes_depth, c.vocab, c.code_dim), torch.nan))
        self.register_buffer("size_of", torch.full((c.codes_depth + 1,), torch.nan))
        self.enter = nn.Linear(c.code_dim, c.dim)
        self.filled_emb = nn.Embedding(c.codes_depth + 1, c.dim)
        self.class_emb = nn.Embedding(c.num_classes + 1, c.dim)
        rows = c.grid if len(c.grid) == 2 else (1, *c.grid)
        self.gpt = GPT(grid=rows, prefix=0, dim=c.dim, depth=c.depth, heads=c.heads, hidden=c.hidden, dropout=c.dropout)  # type: ignore[arg-type]
        if not c.mixtures and c.rank:
            raise ValueError("with a component for each code (mixtures 0) the rank is 0")
        self.head: MixtureHead | CodeHead = (
            MixtureHead(c.dim, c.code_dim, c.mixtures, c.rank)
            if c.mixtures
            else CodeHead(c.dim, c.code_dim, c.codes_depth, c.vocab)
        )
        for weight in (self.enter.weight, self.filled_emb.weight, self.class_emb.weight):
            nn.init.normal_(weight, std=0.02)
        nn.init.zeros_(self.enter.bias)

    @property
    def spec(self) -> TokenSpec:
        """Stacks of ids."""
        c = self.config
        return TokenSpec(kind="residual", grid=c.grid, vocab=c.vocab, depth=c.codes_depth)

    @property
    def default_guidance(self) -> Guidance:
        """Constant."""
        return Guidance(scale=self.config.guidance, schedule="constant")

    def progress(self, group: int) -> float:
        """The share of positions' worth of codes that is there."""
        return group / self.n_groups

    def where(self, group: int) -> torch.Tensor:
        """The position itself."""
        return torch.tensor([group], device=self.device)

    @torch.no_grad()
    def adopt(self, tokenizer: Any) -> None:
        """Copy the codebooks of the tokenizer whose tokens it reads; where there were none, the mixture starts on them.

        Args:
            tokenizer: a model with `spec` and `codebooks` (D, V, C).

        Raises:
            ValueError: if its tokens or codes are of another size.
        """
        require_fit(getattr(tokenizer, "kind", "tokenizer"), tokenizer.spec, self.kind, self.spec)
        codes = tokenizer.codebooks
        fresh = bool(self.codebooks.isnan().any())
        if codes.shape != self.codebooks.shape:
            raise ValueError(
                f"the tokenizer's codebooks are {tuple(codes.shape)}, this resgen takes {tuple(self.codebooks.shape)}: "
                f"set --model.code-dim {codes.shape[-1]}"
            )
        self.codebooks.copy_(codes)
        square = self.codebooks.square().mean((1, 2)).flip(0).cumsum(0)  # of the k deepest, k = 1 … D
        self.size_of.copy_(torch.cat([square[:1], square]).sqrt())
        if fresh:
            self.head.start(codes, self.size_of)

    # -- codes and sums -----------------------------------------------------------------------------------------

    def sums(self, ids_BLD: torch.Tensor, filled_BL: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The sums of the codes that are there and of those that are masked, both (B, L, C)."""
        depth = torch.arange(self.D, device=ids_BLD.device)
        there = depth < filled_BL[..., None]
        codes = self.codebooks[depth, ids_BLD]
        seen, target = (torch.stack([there, ~there], -2).to(codes) @ codes).unbind(-2)
        return seen, target

    def quantise(
        self, z_BGC: torch.Tensor, filled_BG: torch.Tensor, count_BG: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Ids (B, G, D) of the codes from depth `filled` on that residual quantisation makes of z, and 0 elsewhere.

        `count` is how many of them, None all; the others are not looked for.
        """
        rest, begin = z_BGC.float().flatten(0, 1).clone(), filled_BG.flatten()
        end = torch.full_like(begin, self.D) if count_BG is None else begin + count_BG.flatten()
        ids = begin.new_zeros(len(begin), self.D)
        for d, codes in enumerate(self.codebooks.float()):
            (here,) = torch.where((begin <= d) & (d < end))
            if not len(here):
                continue
            found = (rest[here] @ codes.T - codes.square().sum(1) / 2).argmax(1)
            rest[here] -= codes[found]
            ids[here, d] = found
        return ids.view(*filled_BG.shape, self.D)

    # -- training -----------------------------------------------------------------------------------------------

    def hidden(self, seen_BLC: torch.Tensor, filled_BL: torch.Tensor, labels_B: torch.Tensor) -> torch.Tensor:
        """The network's output (B, L, dim)."""
        if bool(self.size_of.isnan().any()):
            raise ValueError("this resgen has no codebooks yet: call adopt(tokenizer), as `genlab train` does")
        x = self.enter((seen_BLC / self.size_of[-1]).to(self.enter.weight.dtype))
        x = x + self.filled_emb(filled_BL) + self.class_emb(labels_B)[:, None]
        return self.gpt.norm(self.gpt(x, causal=False))

    def mask(self, B: int, noise: Noise) -> torch.Tensor:
        """How many codes of each position stay, (B, L): n = ceil(cos(pi r / 2)^power L D) are masked, r uniform a row.

        n draws without replacement from L D codes fall on the positions (multivariate hypergeometric).
        """
        L, D = self.n_groups, self.D
        r = noise.at(purpose="mask ratio").uniform(1)
        n = (torch.cos(math.pi / 2 * r) ** self.config.mask_power * L * D).ceil().clamp(1, L * D)
        rank = noise.at(purpose="mask").uniform(L * D).argsort(-1).argsort(-1)
        return D - (rank < n).view(B, L, D).sum(-1)

    def loss(self, tokens: torch.Tensor, labels: Condition, noise: Noise) -> dict[str, torch.Tensor]:
        """The bound -log p(z) <= regression + classification, nats a channel, at positions with codes masked.

        `loss` weighs the classification with `config.classification`, `bound` with 1.

        With components N_v, weights pi_v and q_v = N_v / sum N: regression is -log sum_v N_v, classification
        -sum_v q_v log pi_v (Jensen; q trains no component).
        """
        filled = self.mask(len(tokens), noise).to(tokens.device)
        seen, target = self.sums(tokens, filled)
        h = self.hidden(seen, filled, self.drop_labels(labels, self.config.label_drop, noise))
        open_BL = filled < self.D
        y = (target / self.size_of[self.D - filled][..., None])[open_BL]
        with torch.autocast(h.device.type, enabled=False):
            next_BL = tokens.gather(2, filled.clamp_max(self.D - 1)[..., None])[..., 0]
            regression, classification = self.bound(y.float(), h[open_BL], filled[open_BL], next_BL[open_BL])
            weighted = (regression + self.config.classification * classification) / self.config.code_dim
        return {
            "loss": batch_mean(weighted),
            "bound": batch_mean((regression + classification) / self.config.code_dim).detach(),
            "regression": batch_mean(regression / self.config.code_dim).detach(),
            "classification": batch_mean(classification).detach(),
        }

    def bound(
        self, y_NC: torch.Tensor, h_ND: torch.Tensor, filled_N: torch.Tensor, next_N: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The two parts (N,), nats.

        Args:
            y_NC: targets in units of `size_of`.
            h_ND: what the network gives there.
            filled_N: how many codes are there.
            next_N: the first of those that are missing.
        """
        linear, spread = self.head(h_ND, filled_N)
        p = self.mixture(linear, spread, torch.ones_like(y_NC[:, :1]), filled_N)
        log_pi = p.logits_BGM.log_softmax(-1)
        if isinstance(self.head, CodeHead):  # q is certain: the component is the code
            regression = -Gaussian(p.mean(next_N), p.log_std_BGM.exp().expand_as(y_NC)).log_prob(y_NC)
            return regression, -log_pi.gather(-1, next_N[:, None])[:, 0]
        each = p.component_log_prob(y_NC)
        q = each.detach().softmax(-1)
        return -each.logsumexp(-1), -(q * log_pi).sum(-1)

    def mixture(
        self, linear: torch.Tensor, spread: torch.Tensor, size: torch.Tensor, filled: torch.Tensor
    ) -> LowRankMixture:
        """What the head says (linear, spread) as a distribution of sums, in units of size (…, 1)."""
        if isinstance(self.head, CodeHead):
            mean_DVC = self.codebooks.float() / self.size_of.float()[1:].flip(0)[:, None, None]
            return self.head.mixture(linear, spread, size, mean_DVC, filled)
        return self.head.mixture(linear, spread, size)

    # -- drawing ------------------------------------------------------------------------------------------------

    def start(self, labels: Condition, guidance: Guidance | None = None) -> ResGenState:
        """A state with every code masked."""
        labels = self.check_labels(labels)
        B, L = len(labels), self.n_groups
        return ResGenState(
            labels_B=labels,
            guidance=guidance or self.default_guidance,
            n=[0] * B,
            ids_BLD=torch.zeros(B, L, self.D, dtype=torch.long, device=self.device),
            filled_BL=torch.zeros(B, L, dtype=torch.long, device=self.device),
        )

    def predict(self, state: ResGenState, where: torch.Tensor | None = None) -> LowRankMixture:
        """The mixture of the sum of the codes that are missing at the positions where (B, G); None: at all."""
        B, L = state.filled_BL.shape
        if where is None:
            where = torch.arange(L, device=self.device).expand(B, L)
        share = [min(1.0, n / L) for n in state.n]
        scales = [state.guidance.at(s) for s in share]
        guided = any(s != 1 for s in scales)
        seen, filled, labels = self.sums(state.ids_BLD, state.filled_BL)[0], state.filled_BL, state.labels_B
        if guided:
            seen, filled = seen.repeat(2, 1, 1), filled.repeat(2, 1)
            labels = torch.cat([labels, torch.full_like(labels, self.num_classes)])
        h = self.hidden(seen, filled, labels)
        state.calls, state.rows_computed = state.calls + 1, state.rows_computed + len(h)
        rows = torch.arange(len(h), device=h.device)[:, None]
        h = h[rows, where.repeat(2, 1) if guided else where]
        filled = state.filled_BL.gather(1, where)
        linear, spread = self.head(h, filled.repeat(2, 1) if guided else filled)
        if guided:
            (cond, uncond), spread = linear.chunk(2), spread[:B]
            s = torch.tensor(scales, device=linear.device)[:, None, None]
            linear = uncond + s * (cond - uncond)
        return self.mixture(linear, spread, self.size_of.float()[self.D - filled][..., None], filled)

    def commit(
        self,
        state: ResGenState,
        event: torch.Tensor,
        where: torch.Tensor | None = None,
        count: torch.Tensor | None = None,
    ) -> None:
        """Quantise the sums (B, G, C) at positions where (B, G), and fix each one's `count` (B, G) coarsest missing.

        `count` None fixes all that are missing.

        Raises:
            ValueError: for another shape, or more codes than are missing.
        """
        B, L = state.filled_BL.shape
        where = torch.arange(L, device=self.device).expand(B, L) if where is None else where
        if tuple(event.shape) != (*where.shape, self.config.code_dim):
            raise ValueError(f"expected sums of shape {(*where.shape, self.config.code_dim)}, got {tuple(event.shape)}")
        filled = state.filled_BL.gather(1, where)
        count = self.D - filled if count is None else count
        if bool((count > self.D - filled).any()) or bool((count < 0).any()):
            raise ValueError("more codes committed than are missing")
        new = self.quantise(event, filled, count)
        depth = torch.arange(self.D, device=self.device)
        fresh = (depth >= filled[..., None]) & (depth < (filled + count)[..., None])
        index = where[..., None].expand(-1, -1, self.D)
        old = state.ids_BLD.gather(1, index)
        state.ids_BLD = state.ids_BLD.scatter(1, index, torch.where(fresh, new, old))
        state.filled_BL = state.filled_BL.scatter(1, where, filled + count)
        state.n = (state.filled_BL.sum(1) // self.D).tolist()
        state.ticket += 1

    def hold(self, state: ResGenState, values: torch.Tensor, known_BL: torch.Tensor) -> None:
        """See `Generator.hold`; a position is given with all its codes."""
        places_of(known_BL)
        known_BL = known_BL.to(self.device)
        state.ids_BLD = torch.where(known_BL[..., None], values.to(state.ids_BLD), state.ids_BLD)
        state.filled_BL = self.D * known_BL.long()
        state.n, state.ticket = known_BL.sum(1).tolist(), state.ticket + 1

    def crop(self, state: ResGenState, n: list[int]) -> None:
        """Start over (all rows at 0), or leave everything as it is: codes of many positions are drawn together."""
        if set(n) == {0}:
            state.filled_BL, state.n, state.ticket = torch.zeros_like(state.filled_BL), list(n), state.ticket + 1
        elif n != state.n:
            raise ValueError(f"a resgen can only be cropped to nothing, not from {state.n} to {n}")

    def peek(self, state: ResGenState) -> Tokens:
        """See `Generator.peek`."""
        depth = torch.arange(self.D, device=self.device)
        return Tokens(state.ids_BLD.where(depth < state.filled_BL[..., None], 0), self.spec)

    def tokens(self, state: ResGenState) -> Tokens:
        """The finished ids (B, L, D)."""
        if missing := int((self.D - state.filled_BL).sum()):
            raise ValueError(f"{missing} codes are missing yet")
        return Tokens(state.ids_BLD.clone(), self.spec)

"""ECAR: stages of rising resolution, each of which does a part of the denoising (arXiv 2412.14170).

Paper-described, not parity-tested: no official code is public. From the paper's abstract: token maps are generated
stage by stage at rising resolution, all tokens of a stage in parallel; a stage's map is conditioned on the earlier
ones by a hierarchical autoregressive transformer; a multistage flow transforms only partly denoised distributions
at each stage. Our choices, all of them config or stated here:

- how many stages, their resolutions, and the noise levels at which each ends;
- the transformer has two parts: `context` blocks, run once a stage, read the earlier stages' partly denoised maps at
  their own resolution (block-causal, with a cache); what they say about a token goes to the tokens it becomes, to which
  the `flow` blocks, run at every integration step, add it. So no context block runs at the full resolution;
- a stage's clean map is the area average of the finest, and stages are joined by Pyramid-Flow's jump (Jin et al.,
  arXiv 2410.05954): upsample by repetition, scale, and add noise that is negatively correlated inside a block, so
  that the sum is white (`Jump`). Training runs the same jumps on data, so that the noise of a stage agrees with what
  the context shows of the stage before. Pyramid-Flow shows it nothing, and can add the least noise possible; here
  some more is needed (`gamma`);
- the velocity inside a stage is that of the straight line between the stage's two ends, a noise level apart;
- uneven steps: many where a step is cheap (coarse), few at full resolution;
- a caption's tokens, where it draws by text, stand before the context's and the flow's, read once a draw.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange, reduce, repeat
from torch import nn

from genlab.config import config
from genlab.distributions import Flow, Gaussian
from genlab.nn.attention import KVCache, axial_rope
from genlab.nn.layers import TimestepEmbedding
from genlab.noise import Noise
from genlab.tokens import Tokens, TokenSpec

from .base import Condition, Guidance, State
from .conditioned import ConditionConfig, ConditionedGenerator
from .xar import Block, Keep, behind, collect, modulation, run


@config
class ECARConfig(ConditionConfig):
    """Sizes of an ECAR, its stages and how they are joined."""

    kind: Literal["ecar"] = "ecar"
    grid: tuple[int, int] = (16, 16)
    """Rows and columns of the token map, equal."""
    channels: int = 16
    """Channels of a token."""
    text_length: int = 120
    """condition text: tokens of a caption; shorter ones are padded."""
    sides: tuple[int, ...] = (4, 8, 16)
    """Side of each stage's map, each a multiple of the one before, the last being the grid's."""
    ends: tuple[float, ...] = (2 / 3, 1 / 3, 0.0)
    """Noise level at which each stage ends; the next begins where its jump leads (`begins`)."""
    gamma: float | None = None
    """Correlation of a jump's noise inside a block of f x f tokens is -gamma / (1 + gamma). It must stay below
    1 / (f^2 - 1), where the noise added to a block would have no mean: the flow, which sees the map before the jump,
    would then have nothing random left for what is new about that mean. None takes half of it."""
    dim: int = 768
    """Width."""
    context_depth: int = 8
    """Blocks that run once a stage, but the first."""
    flow_depth: int = 8
    """Blocks that run at every step."""
    heads: int = 12
    """Attention heads."""
    dropout: float = 0.1
    """Of attention's output and the MLP, in training."""
    method: Literal["euler-maruyama", "euler", "heun"] = "euler"
    """The integrator that samplers take unless told otherwise."""
    steps: tuple[int, ...] = (6, 4, 3)
    """Steps of each stage, likewise."""


@dataclass(frozen=True)
class Jump:
    """From a map at noise level `level` to one f times finer at `begin`: scale * repeat(x) + noise.

    White noise of the coarse map, repeated, has covariance J = 11^T in a block. The jump adds noise of covariance
    (1 + gamma) I - gamma J, so much of it that the sum is begin^2 I (Pyramid-Flow, eq. 13-15, solved for any f).
    """

    f: int
    level: float
    gamma: float

    @property
    def begin(self) -> float:
        """The noise level behind the jump."""
        k = math.sqrt(self.gamma / (1 + self.gamma))
        return self.level / (self.level + k * (1 - self.level))

    @property
    def scale(self) -> float:
        """Factor of the repeated map: its signal share becomes 1 - begin."""
        return (1 - self.begin) / (1 - self.level)

    def repeat(self, x_BGC: torch.Tensor) -> torch.Tensor:
        """Each token becomes a block of f x f equal ones."""
        side = math.isqrt(x_BGC.shape[1])
        return repeat(x_BGC, "b (h w) c -> b (h i w j) c", h=side, i=self.f, j=self.f)

    def block_mean(self, x_BGC: torch.Tensor) -> torch.Tensor:
        """Each token becomes the mean of its f x f block."""
        side = math.isqrt(x_BGC.shape[1]) // self.f
        mean = reduce(x_BGC, "b (h i w j) c -> b (h w) c", "mean", h=side, i=self.f, j=self.f)
        return self.repeat(mean)

    @property
    def fresh(self) -> float:
        """Share (a factor of the deviation) of new noise in a block's mean; beside the mean all noise is new."""
        return math.sqrt((1 - self.gamma * (self.f**2 - 1)) / (1 + self.gamma))

    def noise(self, z_BGC: torch.Tensor) -> torch.Tensor:
        """White noise to noise of the covariance above, scaled as the jump wants it."""
        mean = self.block_mean(z_BGC)
        return self.begin * (z_BGC - mean + self.fresh * mean)


@dataclass(eq=False)
class ECARState(State):
    """The stages' events, the context's keys and values, and the caption's in the flow blocks."""

    events: list[torch.Tensor] = field(default_factory=list)
    cache: KVCache | None = None
    text: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)
    """By text: each flow block's keys and values of the caption."""
    vectors_KD: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    """The distinct conditions of the batch, "nothing" among them; what depends on them is computed once for each."""
    row: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    """Of each row, conditional and then unconditional: which of the K is its."""


class ECAR(ConditionedGenerator):
    """See the module's docstring."""

    kind = "ecar"
    Config = ECARConfig
    predicts = Flow
    config: ECARConfig
    rope_cos: torch.Tensor
    rope_sin: torch.Tensor
    stage_of: torch.Tensor

    def __init__(self, config: ECARConfig) -> None:
        """Args: config: sizes. Raises: ValueError: for stages that don't go together."""
        super().__init__(config)
        c = config
        if c.dim % c.heads:
            raise ValueError(f"dim {c.dim} is not a multiple of heads {c.heads}")
        if c.grid != (c.sides[-1],) * 2 or any(b % a or a == b for a, b in pairwise(c.sides)):
            raise ValueError(
                f"sides must rise, each a multiple of the one before, to that of the square {c.grid}; got {c.sides}"
            )
        if not len(c.sides) == len(c.ends) == len(c.steps) or c.ends[-1] != 0:
            raise ValueError(f"{len(c.sides)} stages need as many ends, the last 0, and steps; got {c.ends}, {c.steps}")
        self.n_groups = len(c.sides)
        self.jumps = []
        for (a, b), level in zip(pairwise(c.sides), c.ends, strict=False):
            most = 1 / ((b // a) ** 2 - 1)
            gamma = most / 2 if c.gamma is None else c.gamma
            if not 0 < gamma < most:
                raise ValueError(f"gamma must be in (0, {most:.4g}) for a jump from side {a} to {b}, got {gamma}")
            self.jumps.append(Jump(b // a, level, gamma))
        self.begins = [1.0, *(j.begin for j in self.jumps)]
        if any(not 0 <= e < b for b, e in zip(self.begins, c.ends, strict=True)):
            raise ValueError(f"stages begin at noise levels {self.begins}: they can't end at {c.ends}, above that")
        sizes = [s * s for s in c.sides]
        self.ends = list(accumulate(sizes))
        self.N = self.ends[-1]
        read = self.N - sizes[-1]  # places that the context reads: all maps but the last

        self.make_condition(c, c.dim, c.text_length)
        self.time_embed = TimestepEmbedding(c.dim)
        self.context_in = nn.Linear(c.channels, c.dim)
        self.context_pos = nn.Parameter(torch.empty(read, c.dim))
        self.context_blocks = nn.ModuleList(Block(c.dim, c.heads, c.dropout) for _ in range(c.context_depth))
        self.context_norm = nn.RMSNorm(c.dim, eps=1e-6)
        self.context_out = nn.Linear(c.dim, c.dim)
        self.flow_in = nn.Linear(c.channels, c.dim)
        self.flow_pos = nn.Parameter(torch.empty(self.N, c.dim))
        self.flow_in_norm = nn.RMSNorm(c.dim, eps=1e-6)
        self.flow_blocks = nn.ModuleList(Block(c.dim, c.heads, c.dropout) for _ in range(c.flow_depth))
        self.flow_norm = nn.RMSNorm(c.dim, eps=1e-6)
        self.pred = nn.Linear(c.dim, c.channels)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        tables = [m.weight for m in self.modules() if isinstance(m, nn.Embedding)]
        for p in (*tables, self.context_pos, self.flow_pos):
            nn.init.normal_(p, std=0.02)

        places = [(torch.arange(s) + 0.5) * (c.sides[-1] / s) - 0.5 for s in c.sides]  # in units of the finest grid
        y, x = (torch.cat([p.repeat_interleave(len(p)) for p in places]), torch.cat([p.repeat(len(p)) for p in places]))
        angles = axial_rope(y, x, c.dim // c.heads)
        self.register_buffer("rope_cos", angles.cos(), persistent=False)
        self.register_buffer("rope_sin", angles.sin(), persistent=False)
        stage_of = torch.cat([torch.full((n,), s) for s, n in enumerate(sizes)])
        self.register_buffer("stage_of", stage_of, persistent=False)

    @property
    def spec(self) -> TokenSpec:
        """A raster of continuous tokens."""
        return TokenSpec(kind="continuous", grid=self.config.grid, dim=self.config.channels)

    @property
    def default_guidance(self) -> Guidance:
        """The same in all stages but the last: coarse maps decide what is seen, and the finest costs half without it.
        Our choice.
        """
        return Guidance(scale=3.0, schedule="constant", until=0.99)

    def span(self, stage: int) -> slice:
        """A stage's places among the N of all stages."""
        return slice(self.ends[stage] - self.config.sides[stage] ** 2, self.ends[stage])

    def where(self, group: int) -> torch.Tensor:
        """Places of the stage's tokens among those of all stages."""
        return torch.arange(self.N, device=self.device)[self.span(group)]

    # -- the network --------------------------------------------------------------------------------------

    def _rope(self, at: slice) -> torch.Tensor:
        return torch.complex(self.rope_cos[at].float(), self.rope_sin[at].float())[:, None, None]

    def context(self, x_RTC, at: slice, mods_RL6D, mask=None, keep: Keep | None = None) -> torch.Tensor:
        """What the context blocks make of earlier stages' maps, (R, T, D).

        Args:
            x_RTC: partly denoised tokens.
            at: their places.
            mods_RL6D: `context_mods`.
            mask: boolean, which keys each place sees; None: all.
            keep: a function of the layer's number, to the block's `keep`.
        """
        x = self.context_in(x_RTC.to(self.context_in.weight)) + self.context_pos[at]
        x = run(self.context_blocks, x[:, None], mods_RL6D[:, None], self._rope(at), mask, keep)
        return self.context_out(self.context_norm(x[:, 0]))

    def velocity(self, x_RGC, stage: int, context_RGD, mods_RL6D, keep: Keep | None = None) -> torch.Tensor:
        """Velocity of one stage's tokens.

        Args:
            x_RGC: noisy tokens.
            stage: whose they are.
            context_RGD: what the context says about them; None in the first stage.
            mods_RL6D: `flow_mods`.
            keep: by text, what puts the caption's keys and values in front.
        """
        at = self.span(stage)
        x = self.flow_in(x_RGC.to(self.flow_in.weight)) + self.flow_pos[at]
        x = self.flow_in_norm(x if context_RGD is None else x + context_RGD)
        x = run(self.flow_blocks, x[:, None], mods_RL6D[:, None], self._rope(at), None, keep)
        return self.pred(self.flow_norm(x[:, 0]))

    def read_text(self, tokens_RPD, vectors_RD, keep_context: Keep, keep_flow: Keep) -> None:
        """A caption's tokens through the context and on through the flow, for the keys and values there."""
        x = run(
            self.context_blocks, tokens_RPD[:, None], self.context_mods(vectors_RD)[:, None], None, None, keep_context
        )
        x = self.flow_in_norm(self.context_out(self.context_norm(x)))
        mods = self.flow_mods(vectors_RD, torch.zeros_like(vectors_RD[:, 0]))
        run(self.flow_blocks, x, mods[:, None], None, None, keep_flow)

    def context_mods(self, vectors_RD: torch.Tensor) -> torch.Tensor:
        """The context blocks' modulation for conditions, (R, L, 6, D)."""
        return modulation(self.context_blocks, F.silu(vectors_RD))

    def flow_mods(self, vectors_RD: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """The flow blocks' modulation for conditions and noise levels, (R, L, 6, D)."""
        return modulation(self.flow_blocks, F.silu(vectors_RD + self.time_embed(1000 * t)))

    def read_maps(self, maps: list[torch.Tensor], condition: Condition):
        """The training forward's context: all maps but the last, under one block-causal mask.

        Returns:
            each stage's context (B, G, D), None for the first; the flow's `keep`; and the conditions' vectors.
        """
        tokens, vectors = self.embed_condition(condition)
        in_context: list[tuple[torch.Tensor, torch.Tensor]] = []
        in_flow: list[tuple[torch.Tensor, torch.Tensor]] = []
        if tokens is not None:
            self.read_text(tokens, vectors, collect(in_context), collect(in_flow))
        keep = None if tokens is None else behind(in_flow)
        if not self.jumps:
            return [None], keep, vectors
        stage_of = self.stage_of[: len(self.context_pos)]
        mask = F.pad(stage_of[:, None] >= stage_of, (self.prefix, 0), value=True)[None, None]
        at, see = slice(0, len(stage_of)), None if tokens is None else behind(in_context)
        said = self.context(torch.cat(maps, 1), at, self.context_mods(vectors), mask, see)
        return [None, *(j.repeat(said[:, self.span(s)]) for s, j in enumerate(self.jumps))], keep, vectors

    def ends_of(self, tokens_BLC: torch.Tensor, noise: Noise) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Start and end of every stage's straight line, for data: (x at begin, x at end), each (B, G, C).

        Every jump is the sampler's own, so the noise of neighbouring stages is joined as it will be in sampling.
        """
        c = self.config
        out: list[tuple[torch.Tensor, torch.Tensor]] = []
        finest = rearrange(tokens_BLC, "b (h w) c -> b c h w", h=c.grid[0])
        clean = torch.empty(0)
        for s, side in enumerate(c.sides):
            z = noise.at(step=s, purpose="noise").normal(side * side, c.channels).to(tokens_BLC)
            coarser, clean = clean, rearrange(F.adaptive_avg_pool2d(finest, side), "b c h w -> b (h w) c")
            if s == 0:
                start = eps = z
            else:
                jump = self.jumps[s - 1]
                start = jump.scale * jump.repeat(out[-1][1]) + jump.noise(z)
                eps = (start - (1 - jump.begin) * jump.repeat(coarser)) / jump.begin
            out.append((start, (1 - c.ends[s]) * clean + c.ends[s] * eps))
        return out

    def loss(self, tokens: torch.Tensor, labels: Condition, noise: Noise) -> dict[str, torch.Tensor]:
        """Flow matching on every stage's line, uniform in its interval; stages count alike."""
        c, S = self.config, self.n_groups
        condition = self.drop_condition(labels, noise)
        lines = self.ends_of(tokens, noise)
        contexts, keep, vectors = self.read_maps([end for _, end in lines[:-1]], condition)
        u_BS = noise.at(purpose="time").uniform(S).float()
        terms = {}
        for s, (start, end) in enumerate(lines):
            u, width = u_BS[:, s], self.begins[s] - c.ends[s]
            x = end + u[:, None, None] * (start - end)
            v = self.velocity(x, s, contexts[s], self.flow_mods(vectors, c.ends[s] + width * u), keep)
            terms[f"loss_stage_{s}"] = F.mse_loss(v.float(), (start - end) / width)
        return {"loss": torch.stack(list(terms.values())).mean()} | {k: v.detach() for k, v in terms.items()}

    # -- drawing ------------------------------------------------------------------------------------------

    def start(self, labels: Condition, guidance: Guidance | None = None) -> ECARState:
        """An empty state; conditional rows first, then (where guidance needs them) unconditional ones."""
        condition, guidance = self.check_condition(labels), guidance or self.default_guidance
        B, c, P = len(condition), self.config, self.prefix
        guided = any(guidance.at(self.progress(g)) != 1 for g in range(self.n_groups))
        text, vectors, row = self.embed_rows(condition, guided)
        places = P + len(self.context_pos)
        cache = KVCache(c.context_depth, len(row), c.heads, places, c.dim // c.heads, like=self.pred.weight)
        state = ECARState(
            labels_B=self.labels_of(condition), guidance=guidance, n=[0] * B, cache=cache, vectors_KD=vectors, row=row
        )
        if text is not None:
            rows = slice(0, len(row))
            self.read_text(text, vectors[row], cache.keep(rows), collect(state.text))
            cache.advance(P, rows)
            state.calls, state.rows_computed = 1, len(row)
        return state

    def _guided(self, state: ECARState, first: int) -> bool:
        """Whether any stage from this one on needs unconditional rows."""
        return any(state.guidance.at(self.progress(g)) != 1 for g in range(first, self.n_groups))

    def _read_context(self, state: ECARState, stage: int) -> torch.Tensor | None:
        """The stage's context, (R, G, D), for conditional rows and, as far as guidance goes, unconditional ones."""
        if stage == 0:
            return None
        cache, at, B = state.cache, self.span(stage - 1), len(state.n)
        assert cache is not None
        R = len(state.row) if self._guided(state, stage) else B
        cache.crop([min(n, self.prefix + at.start) for n in cache.lengths])
        x = state.events[-1].repeat(R // B, 1, 1)
        mods = self.context_mods(state.vectors_KD)[state.row[:R]]
        out = self.context(x, at, mods, None, cache.keep(slice(0, R)))
        cache.advance(at.stop - at.start, slice(0, R))
        state.calls += 1
        state.rows_computed += R
        return self.jumps[stage - 1].repeat(out)

    def predict(self, state: ECARState, where: torch.Tensor | None = None) -> Flow:
        """The next stage's flow, over its own part of the noise levels."""
        stage, ticket, B, c = state.group, state.ticket, len(state.labels_B), self.config
        if stage >= self.n_groups:
            raise ValueError(f"all {self.n_groups} stages are committed already")
        context = self._read_context(state, stage)
        scale = state.guidance.at(self.progress(stage))
        R = B if scale == 1 else 2 * B

        def velocity(x_BGC: torch.Tensor, t: float) -> torch.Tensor:
            state.check(ticket)
            at = torch.full_like(state.vectors_KD[:, 0], t, dtype=torch.float32)
            mods = self.flow_mods(state.vectors_KD, at)[state.row[:R]]
            text = [(k[:R], v[:R]) for k, v in state.text]
            known = None if context is None else context[:R]
            v = self.velocity(x_BGC.repeat(R // B, 1, 1), stage, known, mods, behind(text) if text else None)
            state.calls += 1
            state.rows_computed += R
            v = v.double()
            if R == B:
                return v
            conditional, unconditional = v.chunk(2)
            return unconditional + scale * (conditional - unconditional)

        flow = Flow(
            velocity,
            (B, c.sides[stage] ** 2, c.channels),
            self.device,
            begin=self.begins[stage],
            end=c.ends[stage],
            method=c.method,
            steps=c.steps[stage],
        )
        if stage == 0:
            return flow
        jump, width = self.jumps[stage - 1], self.begins[stage] - c.ends[stage]
        before, level, end = jump.repeat(state.events[-1]), jump.level, c.ends[stage]

        def eps(x: torch.Tensor, v: torch.Tensor, t: float) -> torch.Tensor:
            """-t times the score of x given the stage before, which tells a part of the noise in the block means."""
            x_mean, v_mean = jump.block_mean(x), jump.block_mean(v)
            # along the means, as in any flow, x = (1 - t) clean + t noise and v = noise - clean
            clean, noise = x_mean - t * v_mean, x_mean + (1 - t) * v_mean
            old = (before - (1 - level) * clean) / level
            new = (noise - jump.scale * level / jump.begin * old) / jump.fresh
            # beside them the clean part's share falls from 1 - end to 0, with this slope
            x, v, slope = x - x_mean, v - v_mean, -(1 - end) / width
            clean = (x - t * v) / (-slope * jump.begin)
            return new / jump.fresh + v - slope * clean

        source = Gaussian(jump.scale * before, torch.ones_like(before[..., :1]), jump.noise)
        return dataclasses.replace(flow, source=source, eps=eps)

    def commit(self, state: ECARState, event: torch.Tensor, where: torch.Tensor | None = None) -> None:
        """Fix the next stage's partly denoised map (B, G, C).

        Raises:
            ValueError: for an event of another shape, or if all stages are committed.
        """
        stage = state.group
        if stage >= self.n_groups:
            raise ValueError(f"all {self.n_groups} stages are committed already")
        shape = (len(state.n), self.config.sides[stage] ** 2, self.config.channels)
        if tuple(event.shape) != shape:
            raise ValueError(f"stage {stage} needs an event of shape {shape}, got {tuple(event.shape)}")
        state.events.append(event)
        state.n = [stage + 1] * len(state.n)
        state.ticket += 1

    def crop(self, state: ECARState, n: list[int]) -> None:
        """Forget stages; all rows to one number of stages."""
        if len(n) != len(state.n) or min(n) != max(n) or not 0 <= n[0] <= state.group:
            raise ValueError(f"can't crop rows at {state.n} stages to {n}: all rows to one number")
        del state.events[n[0] :]
        state.n = list(n)
        state.ticket += 1

    def tokens(self, state: ECARState) -> Tokens:
        """The finished map (B, L, C), float32."""
        self.require_complete(state)
        return Tokens(state.events[-1].float(), self.spec)

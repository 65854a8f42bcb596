"""xAR's drawing against the loop that recomputes everything: `genlab bench xar`.

Both draw the same images from the same weights with the same steps and guidance, in turns, in one run on one machine;
nothing is asserted, the figures are printed as a table, or as JSON. What the naive loop does at every evaluation, and
ours doesn't: read all groups so far (no cache), run the unconditional half where guidance is 1, compute adaLN of every
row and group, build the mask.

    genlab bench xar                             # random weights of the tiny size, cells
    genlab bench xar --model xar-cell-emoji64    # a checkpoint
"""

from __future__ import annotations

import platform
import statistics
import time
from typing import Any, Literal

import torch

from genlab.config import config
from genlab.distributions import Flow
from genlab.generators.base import Guidance
from genlab.generators.xar import XAR, Entity, XARConfig, XARState, spread
from genlab.precision import DtypeName, torch_dtype
from samplers.flow import FlowConfig, FlowSampler

from .machine import one_at_a_time


class NaiveXAR(XAR):
    """The same model, drawn without a cache or anything kept."""

    def predict(self, state: XARState, where: torch.Tensor | None = None) -> Flow:
        """The next group's flow; every evaluation is a block-causal forward over the groups so far, in both halves."""
        g, B = state.group, len(state.n)
        stop, size, scale = self.ends[g], self.sizes[g], state.guidance.at(self.progress(g))
        labels = torch.cat([state.labels_B, torch.full_like(state.labels_B, self.num_classes)])

        def velocity(x_BGC: torch.Tensor, t: float) -> torch.Tensor:
            x = torch.cat([state.x_BNC[:, : stop - size], x_BGC], 1).to(self.pred.weight).repeat(2, 1, 1)
            times = torch.zeros(2 * B, g + 1, device=x.device)
            times[:, g] = t
            mods = self.modulation(self.class_emb(labels)[:, None], times)
            group = self.group_of[:stop]
            if not self.equal:
                mods = spread(mods, self.sizes[: g + 1])
            mask = (group[:, None] >= group)[None, None]
            v = self.forward(x, slice(0, stop), mods, mask, outputs=slice(stop - size, stop))
            state.calls += 1
            state.rows_computed += 2 * B
            c, u = v.double().chunk(2)
            return u + scale * (c - u)

        return Flow(velocity, (B, size, self.config.channels), state.x_BNC.device, steps=self.config.steps)


@config
class BenchFlowConfig:
    """Time xAR's drawing, cached against naive, in turns."""

    model: str = ""
    """A checkpoint of an xAR by class; empty: random weights of the sizes below."""
    entities: tuple[Entity, ...] = ("cell",)
    """Without a model: which X."""
    grid: int = 8
    """Without a model: side of the token map."""
    dim: int = 256
    """Without a model: width."""
    depth: int = 6
    """Without a model: blocks, half of them before the middle projection."""
    heads: int = 4
    """Without a model: attention heads."""
    batches: tuple[int, ...] = (1, 8)
    """Images at once."""
    steps: int | None = None
    """Steps a group; None: the model's own."""
    guidance: float = 2.0
    """Guidance scale."""
    schedule: Literal["linear", "constant"] = "linear"
    """Its schedule; linear, as published, leaves the first group unguided."""
    repeats: int = 3
    """Rounds after a first, uncounted one; the median is printed."""
    threads: int = 0
    """CPU threads; 0 takes torch's default."""
    device: str = "cpu"
    """Where to run."""
    dtype: DtypeName = "float32"
    """Arithmetic."""
    json: bool = False
    """Print JSON."""


def random_xar(c: BenchFlowConfig, entity: Entity) -> XAR:
    """An xAR with random weights; a scale's sides halve down to 1 where they can."""
    scales, side = [c.grid], c.grid
    while side % 2 == 0:
        side //= 2
        scales.insert(0, side)
    size = {"cell": c.grid // 2, "subsample": 2}.get(entity, 8)
    torch.manual_seed(0)
    return XAR(
        XARConfig(
            grid=(c.grid, c.grid),
            num_classes=10,
            entity=entity,
            size=size,
            scales=tuple(scales) if entity == "scale" else (),
            dim=c.dim,
            encoder_depth=c.depth - c.depth // 2,
            decoder_depth=c.depth // 2,
            heads=c.heads,
        )
    )


def measure(model: XAR, c: BenchFlowConfig) -> list[dict[str, Any]]:
    """One row a batch size: median seconds a batch, on the clock and of the CPU, ours and naive.

    Raises:
        ValueError: for a generator that isn't an xAR by class.
    """
    if not isinstance(model, XAR) or model.config.condition != "class":
        raise ValueError("this bench takes an xar that draws by class: give --model such a one, or none")
    model = model.to(c.device, torch_dtype(c.dtype, c.device)).eval()
    with torch.device("meta"):
        naive = NaiveXAR(model.config)
    naive.load_state_dict(model.state_dict(), assign=True)
    for name, buffer in model.named_buffers():
        naive.register_buffer(name, buffer, persistent=False)
    sampler = FlowSampler(FlowConfig(steps=c.steps, guidance=Guidance(scale=c.guidance, schedule=c.schedule)))
    ways, rows = {"ours": model, "naive": naive}, []
    for B in c.batches:
        labels, seeds = torch.arange(B) % model.num_classes, torch.arange(B)
        wall: dict[str, list[float]] = {way: [] for way in ways}
        cpu: dict[str, list[float]] = {way: [] for way in ways}
        drawn, computed = {}, {}
        for _ in range(c.repeats + 1):
            for way, generator in ways.items():
                start = time.process_time()
                out = sampler.sample(generator, labels, seeds, batch_size=B)
                cpu[way].append(time.process_time() - start)
                wall[way].append(out.stats.seconds)
                drawn[way], computed[way] = out.tokens.values, out.stats
        ours, theirs = (statistics.median(wall[way][1:]) for way in ways)
        ours_cpu, theirs_cpu = (statistics.median(cpu[way][1:]) for way in ways)
        rows.append(
            {
                "entity": model.config.entity,
                "parameters": model.n_params,
                "groups": model.n_groups,
                "steps": c.steps or model.config.steps,
                "batch": B,
                "calls": computed["ours"].model_calls,
                "ours_s": ours,
                "naive_s": theirs,
                "speedup": theirs / ours,
                "ours_cpu_s": ours_cpu,
                "naive_cpu_s": theirs_cpu,
                "cpu_ratio": theirs_cpu / ours_cpu,  # steadier on a busy machine
                "difference": float((drawn["ours"] - drawn["naive"]).abs().max() / drawn["naive"].abs().max()),
            }
        )
    return rows


def run(c: BenchFlowConfig) -> dict[str, Any]:
    """All rows, and what they were measured on."""
    if c.threads:
        torch.set_num_threads(c.threads)
    if c.model:
        from genlab.hub import from_pretrained

        models = [from_pretrained(c.model)]
    else:
        models = [random_xar(c, entity) for entity in c.entities]
    with one_at_a_time():
        rows = [row for model in models for row in measure(model, c)]
    return {
        "rows": rows,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, {c.device}, "
        f"{str(torch_dtype(c.dtype, c.device)).removeprefix('torch.')}",
        "torch": torch.__version__,
        "guidance": f"{c.guidance:g} {c.schedule}",
    }


def describe(result: dict[str, Any]) -> str:
    """The table."""
    head = f"{'X':<10} {'params':>7} {'steps':>8} {'batch':>5} {'ours':>9} {'naive':>9} {'ratio':>6}"
    lines = [f"{head} {'CPU':>6} {'apart':>8}"]
    for r in result["rows"]:
        lines.append(
            f"{r['entity']:<10} {r['parameters'] / 1e6:>6.1f}M {r['groups']:>3} x {r['steps']:<2} {r['batch']:>5} "
            f"{r['ours_s']:>7.2f} s {r['naive_s']:>7.2f} s {r['speedup']:>5.2f}x {r['cpu_ratio']:>5.2f}x "
            f"{r['difference']:>8.1e}"
        )
    return "\n".join([*lines, f"{result['machine']}, torch {result['torch']}, guidance {result['guidance']}"])

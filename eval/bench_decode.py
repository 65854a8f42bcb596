"""Measure decoding with a cache against recomputing everything: `python -m eval.bench_decode --help`.

Both draw the same images from the same weights with the same sampler, in turns, in one run on one machine;
nothing is asserted, the figures are printed as a table, or as JSON.

    python -m eval.bench_decode                            # random weights: 256 tokens, batch 1 and 16
    python -m eval.bench_decode --model llamagen-emoji64   # a checkpoint
"""

from __future__ import annotations

import json
import platform
import statistics
import time
from typing import Any, Literal

import torch

from genlab.config import config
from genlab.generators.base import Generator, Guidance
from samplers.ancestral import AncestralConfig, AncestralSampler


@config
class BenchDecodeConfig:
    """What is timed."""

    model: str = ""
    """A checkpoint of a llamagen, elm or var by class; empty: random weights of the sizes below."""
    kinds: tuple[Literal["llamagen", "elm", "var"], ...] = ("llamagen", "elm", "var")
    """Without a model: which generators."""
    dim: int = 256
    """Without a model: width."""
    depth: int = 6
    """Without a model: blocks."""
    heads: int = 8
    """Without a model: attention heads."""
    batches: tuple[int, ...] = (1, 16)
    """Images at once."""
    guidance: float = 2.0
    """Classifier-free guidance, constant: twice the rows; 1 leaves it out."""
    naive: bool = True
    """Time the loop without a cache too."""
    repeats: int = 3
    """Rounds after a first, uncounted one; the median is printed."""
    threads: int = 0
    """CPU threads; 0 takes torch's default."""
    device: str = "cpu"
    """Where to run."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Arithmetic."""
    json: bool = False
    """Print JSON."""


def random_generator(kind: str, c: BenchDecodeConfig) -> Generator:
    """A generator of 16x16 tokens with random weights."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"num_classes": 10, "dim": c.dim, "depth": c.depth, "heads": c.heads}
    model: Any
    if kind == "llamagen":
        from genlab.generators.llamagen import LlamaGen, LlamaGenConfig

        model = LlamaGen(LlamaGenConfig(vocab=1024, **sizes))
    elif kind == "elm":
        from genlab.generators.elm import ELM, ELMConfig

        model = ELM(ELMConfig(sub_tokens=2, bits=6, **sizes))
    else:
        from genlab.generators.var import VAR, VARConfig

        model = VAR(VARConfig(vocab=1024, code_dim=16, **sizes))
        torch.nn.init.normal_(model.codes.codebook)
    for head in getattr(model, "output", [model.head] if kind == "var" else []):
        torch.nn.init.normal_(head.weight, std=c.dim**-0.5)
    return model


def measure(generator: Generator, c: BenchDecodeConfig) -> list[dict[str, Any]]:
    """One row a batch size: median seconds a batch, on the clock and of the CPU, cached and naive.

    Raises:
        ValueError: for a generator without a cache that could be left out.
    """
    if not AncestralSampler.supports(generator):
        raise ValueError(
            f"a {generator.kind!r} is not drawn group by group with a cache; choose a llamagen, elm or var"
        )
    generator = generator.to(c.device, getattr(torch, c.dtype)).eval()
    ways = (False, True) if c.naive else (False,)
    out = []
    for B in c.batches:
        labels, seeds = torch.arange(B) % generator.num_classes, torch.arange(B)
        wall: dict[bool, list[float]] = {way: [] for way in ways}
        cpu: dict[bool, list[float]] = {way: [] for way in ways}
        drawn = {}
        for _ in range(c.repeats + 1):
            for way in ways:
                sampler = AncestralSampler(
                    AncestralConfig(guidance=Guidance(scale=c.guidance, schedule="constant"), naive=way)
                )
                start = time.process_time()
                result = sampler.sample(generator, labels, seeds, batch_size=B)
                drawn[way] = result.tokens.values
                wall[way].append(result.stats.seconds)
                cpu[way].append(time.process_time() - start)
        row: dict[str, Any] = {
            "generator": generator.kind,
            "parameters": generator.n_params,
            "tokens": generator.spec.length,
            "calls": generator.n_groups,
            "batch": B,
            "cached_s": statistics.median(wall[False][1:]),
            "cached_cpu_s": statistics.median(cpu[False][1:]),
        }
        if c.naive:
            row["naive_s"] = statistics.median(wall[True][1:])
            row["naive_cpu_s"] = statistics.median(cpu[True][1:])
            row["speedup"] = row["naive_s"] / row["cached_s"]
            row["cpu_ratio"] = row["naive_cpu_s"] / row["cached_cpu_s"]  # steadier on a busy machine
            row["equal_tokens"] = float((drawn[False] == drawn[True]).float().mean())
        out.append(row)
    return out


def bench(c: BenchDecodeConfig) -> dict[str, Any]:
    """All rows, and what they were measured on."""
    if c.threads:
        torch.set_num_threads(c.threads)
    if c.model:
        from genlab.hub import from_pretrained

        generators = [from_pretrained(c.model)]
    else:
        generators = [random_generator(kind, c) for kind in c.kinds]
    return {
        "rows": [row for g in generators for row in measure(g, c)],
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, {c.device}, {c.dtype}",
        "torch": torch.__version__,
        "guidance": c.guidance,
    }


def describe(result: dict[str, Any]) -> str:
    """The table."""
    lines = [
        f"{'generator':<10} {'params':>7} {'batch':>5} {'cached':>9} {'naive':>9} {'ratio':>6} {'CPU':>6} {'equal':>6}"
    ]
    for r in result["rows"]:
        line = f"{r['generator']:<10} {r['parameters'] / 1e6:>6.1f}M {r['batch']:>5} {r['cached_s']:>7.2f} s"
        if "naive_s" in r:
            line += f" {r['naive_s']:>7.2f} s {r['speedup']:>5.1f}x {r['cpu_ratio']:>5.1f}x {r['equal_tokens']:>6.1%}"
        lines.append(line)
    return "\n".join([*lines, f"{result['machine']}, torch {result['torch']}, guidance {result['guidance']}"])


def main() -> None:
    """Command line."""
    import tyro

    c = tyro.cli(BenchDecodeConfig, description=__doc__)
    result = bench(c)
    print(json.dumps(result, indent=2) if c.json else describe(result))


if __name__ == "__main__":
    main()

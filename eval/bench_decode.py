"""Decoding with a cache against recomputing everything, and where the time goes: `genlab bench decode`.

Both ways draw the same images from the same weights with the same sampler, in turns, in one run on one machine;
nothing is asserted, the figures are printed as a table, or as JSON.

    genlab bench decode                                        random weights: LlamaGen, ELM, VAR, batch 1 and 16
    genlab bench decode llamagen-emoji64                       a checkpoint
    genlab bench decode --preset elm-2-6-emoji64 --random-weights
"""

from __future__ import annotations

import inspect
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

import torch
import tyro

from genlab.config import config
from genlab.generators.base import Condition, Generator, Guidance, Text
from genlab.hub import from_pretrained
from genlab.precision import DtypeName, torch_dtype
from genlab.registry import model_class
from samplers.ancestral import AncestralConfig, AncestralSampler
from samplers.base import Sampler, default_sampler
from samplers.timing import Clock

from .machine import BUSY, one_at_a_time

Tokenizer = Any
PARTS = ("backbone", "head", "sampling", "decode")
"""What the time of a drawn batch is said to go to, beside the log of what is committed and the rest."""


@config
class BenchDecodeConfig:
    """Time MODEL's drawing and its tokenizer's decoding, batch by batch, cached against naive, in turns.

    The naive way is the same algorithm without a cache: it reads everything drawn so far at every step. One more round
    says where the time goes: the network, its head, sampling, the tokenizer's decoder.
    """

    model: Annotated[str, tyro.conf.Positional] = ""
    """A shipped name, a checkpoint folder or a Hub id; empty: a preset, or random weights of the sizes below."""
    preset: str = ""
    """A training preset's model and tokenizer, with --random-weights."""
    random_weights: bool = False
    """Say that the preset's weights are to be random: speed doesn't depend on them."""
    kinds: tuple[Literal["llamagen", "elm", "var"], ...] = ("llamagen", "elm", "var")
    """Without model and preset: which generators."""
    dim: int = 256
    """Without model and preset: width."""
    depth: int = 6
    """Without model and preset: blocks."""
    heads: int = 8
    """Without model and preset: attention heads."""
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
    dtype: DtypeName = "float32"
    """Arithmetic."""
    json: bool = False
    """Print JSON."""


def random_generator(kind: str, c: BenchDecodeConfig) -> Generator:
    """A generator of 16x16 tokens with random weights."""
    sizes: dict[str, Any] = {"num_classes": 10, "dim": c.dim, "depth": c.depth, "heads": c.heads}
    sizes |= {"sub_tokens": 2, "bits": 6} if kind == "elm" else {"vocab": 1024}
    sizes |= {"code_dim": 16} if kind == "var" else {}
    cls = model_class(kind)
    return randomised(cls, cls.Config(**sizes))


def randomised(cls: Any, model_config: Any) -> Any:
    """A model with random weights: normal where the start is zero (heads) or missing (codebooks)."""
    torch.manual_seed(0)
    model = cls(model_config)
    with torch.no_grad():
        for name, value in [*model.named_parameters(), *model.named_buffers()]:
            blank = value.is_floating_point() and value.ndim > 1 and bool(value.isnan().any() or not value.any())
            if blank or name.startswith(("output.", "head.weight")):
                value.normal_(std=value.shape[-1] ** -0.5)
    return model


def load(c: BenchDecodeConfig, presets: Mapping[str, Any]) -> list[tuple[str, Generator, Tokenizer | None]]:
    """Name, generator and, where one is named, tokenizer.

    Raises:
        ValueError: for options that don't go together.
        FileNotFoundError: if there is no such model.
    """
    if c.random_weights != bool(c.preset) or (c.model and c.preset):
        raise ValueError(
            "give MODEL, which has weights, or --preset NAME with --random-weights, or neither "
            "(`genlab list` names models and presets)"
        )
    if c.preset:
        run = presets[c.preset]()
        if not run.tokenizer:
            raise ValueError(f"--preset {c.preset} trains a tokenizer, which draws nothing; choose a generator's")
        tokenizer = None
        if run.tokenizer in presets:
            of = presets[run.tokenizer]().model
            tokenizer = randomised(model_class(of.kind), of)
        return [(c.preset, randomised(model_class(run.model.kind), run.model), tokenizer)]
    if not c.model:
        return [(kind, random_generator(kind, c), None) for kind in c.kinds]
    generator = from_pretrained(c.model)
    if not isinstance(generator, Generator):
        raise ValueError(f"{c.model} is a tokenizer, which draws nothing; give a generator (`genlab list`)")
    name = generator.extra.get("tokenizer", "")
    return [(c.model, generator, from_pretrained(name) if name else None)]


def conditions(generator: Generator, B: int) -> Condition:
    """Classes in turn, or captions of random embeddings."""
    size = generator.config
    if getattr(size, "condition", "class") == "text":
        draw = torch.Generator().manual_seed(0)
        return Text(torch.randn(B, size.text_length, size.text_dim, generator=draw))
    return torch.arange(B) % generator.num_classes


def sampler_of(generator: Generator, guidance: float, naive: bool) -> Sampler:
    """The plain sampler; with `naive`, without a cache."""
    g = Guidance(scale=guidance, schedule="constant")
    if AncestralSampler.supports(generator):
        return AncestralSampler(AncestralConfig(guidance=g, naive=naive))
    plain = type(default_sampler(generator))
    return plain(plain.Config(guidance=g))


def head_of(generator: Generator) -> list[tuple[Any, str]]:
    """What turns the network's output into a distribution: owners and names of functions."""
    heads: Any = getattr(generator, "output", None)
    if heads is not None:  # LlamaGen, ELM: K heads behind a norm
        return [(generator, "heads"), *((head, "forward") for head in heads)]
    return [(getattr(generator, name), "forward") for name in ("head", "pred") if hasattr(generator, name)]


def attribute(generator: Generator, sampler: Sampler, draw: Callable[[], Any], decode: Callable[[Any], Any]) -> Any:
    """Seconds by part, of one batch drawn and decoded; `attributed` is the share that `PARTS` cover."""
    clock = Clock()
    heads = [(owner, name, getattr(owner, name)) for owner, name in head_of(generator)]
    begin = time.perf_counter()
    try:
        with clock.watch(generator, sampler):
            for owner, name, plain in heads:  # in place of what `watch` counts as the network
                setattr(owner, name, clock.wrap("head", plain))
            clock.wrap("decode", decode)(draw())
    finally:
        for owner, name, _ in heads:
            vars(owner).pop(name, None)
    total, spent = time.perf_counter() - begin, clock.seconds
    seconds = {
        "backbone": spent.get("network", 0.0),
        "head": spent.get("head", 0.0),
        "sampling": spent.get("noise", 0.0) + spent.get("distribution", 0.0),
        "decode": spent.get("decode", 0.0),
        "log": spent.get("state", 0.0),
    }
    seconds["rest"] = total - sum(seconds.values())
    return {"seconds": seconds, "total": total, "attributed": sum(seconds[p] for p in PARTS) / total}


def measure(name: str, generator: Generator, tokenizer: Tokenizer | None, c: BenchDecodeConfig) -> list[dict[str, Any]]:
    """One row a batch size: median seconds a batch, on the clock and of the CPU, cached and naive."""
    generator = generator.to(c.device, torch_dtype(c.dtype, c.device)).eval()
    tokenizer = None if tokenizer is None else tokenizer.to(c.device).eval()
    can = "cached" in inspect.signature(generator.start).parameters
    ways = (False, True) if c.naive and can else (False,)
    out = []

    @torch.inference_mode()
    def decode(tokens: Any) -> Any:
        return tokens if tokenizer is None else tokenizer.decode(tokens)

    for B in c.batches:
        condition, seeds = conditions(generator, B), torch.arange(B)
        wall: dict[bool, list[float]] = {way: [] for way in ways}
        cpu: dict[bool, list[float]] = {way: [] for way in ways}
        decoding, drawn, stats = [], {}, None
        for _ in range(c.repeats + 1):
            for way in ways:
                start = time.process_time()
                result = sampler_of(generator, c.guidance, way).sample(generator, condition, seeds, batch_size=B)
                cpu[way].append(time.process_time() - start)
                wall[way].append(result.stats.seconds)
                drawn[way], stats = result.tokens, result.stats
            start = time.perf_counter()
            decode(drawn[False])
            decoding.append(time.perf_counter() - start)
        assert stats is not None
        sampler = sampler_of(generator, c.guidance, False)

        def draw() -> Any:
            return sampler.sample(generator, condition, seeds, B).tokens

        row: dict[str, Any] = {
            "model": name,
            "generator": generator.kind,
            "sampler": sampler.name,
            "parameters": generator.n_params,
            "tokens": generator.spec.length,
            "calls": stats.model_calls,
            "batch": B,
            "cached_s": statistics.median(wall[False][1:]),
            "cached_cpu_s": statistics.median(cpu[False][1:]),
            "decode_s": statistics.median(decoding[1:]) if tokenizer is not None else None,
            "where": attribute(generator, sampler, draw, decode),
        }
        if True in ways:
            row["naive_s"] = statistics.median(wall[True][1:])
            row["naive_cpu_s"] = statistics.median(cpu[True][1:])
            row["speedup"] = row["naive_s"] / row["cached_s"]
            row["cpu_ratio"] = row["naive_cpu_s"] / row["cached_cpu_s"]  # steadier on a busy machine
            row["equal_tokens"] = float((drawn[False].values == drawn[True].values).float().mean())
        out.append(row)
    return out


def run(c: BenchDecodeConfig, presets: Mapping[str, Any]) -> dict[str, Any]:
    """All rows, and what they were measured on; one bench at a time.

    Raises:
        ValueError: for options that don't go together.
    """
    if min((*c.batches, c.repeats)) < 1:
        raise ValueError("--batches and --repeats must be at least 1")
    if c.threads:
        torch.set_num_threads(c.threads)
    models = load(c, presets)
    with one_at_a_time() as before:
        rows = [row for model in models for row in measure(*model, c)]
    return {
        "rows": rows,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, {c.device}, "
        f"{str(torch_dtype(c.dtype, c.device)).removeprefix('torch.')}",
        "busy": {"before": before, "load": os.getloadavg() if hasattr(os, "getloadavg") else None},
        "torch": torch.__version__,
        "guidance": c.guidance,
    }


def describe(result: dict[str, Any]) -> str:
    """The table."""
    width = max(len(r["model"]) for r in result["rows"])
    head = (
        f"{'model':<{width}} {'params':>7} {'batch':>5} {'cached':>9} {'naive':>9} {'ratio':>6} {'CPU':>6} {'equal':>6}"
    )
    lines = [head + "   where the cached time goes"]
    for r in result["rows"]:
        line = f"{r['model']:<{width}} {r['parameters'] / 1e6:>6.1f}M {r['batch']:>5} {r['cached_s']:>7.2f} s"
        if "naive_s" in r:
            line += f" {r['naive_s']:>7.2f} s {r['speedup']:>5.1f}x {r['cpu_ratio']:>5.1f}x {r['equal_tokens']:>6.1%}"
        else:
            line += f" {'-':>9} {'-':>6} {'-':>6} {'-':>6}"
        where = r["where"]
        shares = [
            f"{part} {share:.0%}"
            for part, spent in where["seconds"].items()
            if (share := spent / where["total"]) >= 0.005
        ]
        lines.append(f"{line}   {', '.join(shares)}")
    busy_note = f"; {result['busy']['before']:.0%} of the machine was busy" if result["busy"]["before"] > BUSY else ""
    lines.append(f"{result['machine']}, torch {result['torch']}, guidance {result['guidance']}{busy_note}")
    return "\n".join(lines)


def main(c: BenchDecodeConfig, presets: Mapping[str, Any]) -> int:
    """The command; presets come from the caller, their package is a sibling of this one."""
    result = run(c, presets)
    print(json.dumps(result, indent=2) if c.json else describe(result))
    return 0

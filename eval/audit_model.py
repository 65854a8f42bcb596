"""Is a sampler's distribution the plain one's, on a real model? `genlab audit MODEL --sampler S`.

Three looks, from sharp to wide. The verifier is replayed on pairs (p, q) recorded while the model was sampled: p is
known exactly, no model is called, and a fault of a few per cent shows. Then many draws of the sampler are held against
as many plain ones: chi-square at every position, and the energy distance of whole images by permutation, which sees
what the positions alone don't. All tests together raise a false alarm with probability `LEVEL`.
"""

from __future__ import annotations

import hashlib
import json
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from genlab.config import to_dict
from genlab.generators.base import Generator
from genlab.noise import Noise
from genlab.tokens import Tokens
from samplers.base import Sampler, default_sampler

from .audit import Broken, Line, Report, Show, broken_rule, recorder_of, replayed, until_sure, uses_rule, with_rule
from .exactness import Check, check_energy, check_same_cells

if TYPE_CHECKING:
    from .audit import AuditConfig

LEVEL = 1e-3
RECORDED = 8  # images drawn to record pairs
BINS = 16  # of a continuous token's projections
ENERGY = 1024  # images a side whose distances are computed


def plain_of(sampler: Sampler, generator: Generator) -> Sampler:
    """The plain sampler of the same target: its own word for it, or the generator's with the options both know."""
    if hasattr(sampler, "plain"):
        return sampler.plain(generator)
    cls = type(default_sampler(generator))
    known: Any = vars(cls.Config)["__dataclass_fields__"]
    return cls(cls.Config(**{k: getattr(sampler.config, k) for k in known if hasattr(sampler.config, k)}))


def draws(
    sampler: Sampler,
    generator: Generator,
    labels: torch.Tensor,
    first_seed: int,
    size: int,
    folder: Path | None,
    bar: Any,
) -> Tokens:
    """Tokens of images with running seeds, a batch at a time; batches that `folder` holds already are read."""
    from safetensors.torch import load, save

    from genlab.hub import write_atomic

    parts = []
    for start in range(0, len(labels), size):
        some = labels[start : start + size]
        file = folder / f"{start:08d}.safetensors" if folder else None
        if file and file.is_file():
            parts.append(load(file.read_bytes())["tokens"])
        else:
            seeds = first_seed + start + torch.arange(len(some))
            parts.append(sampler.sample(generator, some, seeds, batch_size=size).tokens.values.cpu().contiguous())
            if file:
                write_atomic(file, save({"tokens": parts[-1]}))
        bar.update(len(some))
    return Tokens(torch.cat(parts), generator.spec)


def check_positions(a: Tokens, b: Tokens) -> list[Check]:
    """Chi-square at every position: ids, or of vectors two projections cut into bins at their common quantiles."""
    if a.spec.kind != "continuous":
        x, y = (t.values.flatten(1).numpy() for t in (a, b))
        return [check_same_cells(f"place {i}", x[:, i], y[:, i]) for i in range(x.shape[1])]
    C = a.values.shape[-1]
    axes = torch.cat([torch.eye(C)[:1], Noise(torch.tensor([0]), purpose="axes").normal(1, C)[0].float()]).double()
    checks = []
    x, y = ((t.values.flatten(1, -2).double() @ axes.T).numpy() for t in (a, b))
    for i in range(x.shape[1]):
        for k in range(len(axes)):
            cuts = np.quantile(np.concatenate([x[:, i, k], y[:, i, k]]), np.arange(1, BINS) / BINS)
            ours, theirs = (np.searchsorted(cuts, z[:, i, k]) for z in (x, y))
            checks.append(check_same_cells(f"position {i}, projection {k}", ours, theirs))
    return checks


def distances(a: Tokens, b: Tokens) -> torch.Tensor:
    """Of all images from one another, (M, M): the share of ids that differ, or Euclidean over standardised channels."""
    x = torch.cat([t.values.flatten(1) for t in (a, b)])
    if a.spec.kind == "continuous":
        x = ((x - x.mean(0)) / x.std(0).clamp(min=1e-12)).float()
        return torch.cdist(x, x)
    far = torch.zeros(len(x), len(x))
    for column in x.unbind(1):
        far += column[:, None] != column
    return far / x.shape[1]


def audit_model(generator: Generator, sampler: Sampler, labels: torch.Tensor, c: AuditConfig, progress: bool) -> Report:
    """Audit a sampler on a model.

    Args:
        generator: the model.
        sampler: what draws from it.
        labels: classes (N,), one an image and side.
        c: replays, broken control, folder and the like.
        progress: show a bar.

    Raises:
        ValueError: if nothing can be broken that should be, or the folder belongs to other settings.
    """
    from tqdm import tqdm

    clock, cpu = time.perf_counter(), time.process_time()
    if c.broken and not uses_rule(sampler):
        raise ValueError(f"{sampler.name} has no verifier to break with these settings")
    plain, lines = plain_of(sampler, generator), []
    with tqdm(total=2 * len(labels), unit="img", disable=not progress, desc="audit") as bar:
        if uses_rule(sampler):
            recorder, n = recorder_of(sampler), min(RECORDED, len(labels))
            seeds = torch.arange(n) + (c.seed << 40) + (3 << 38)
            with_rule(sampler, recorder).sample(generator, labels[:n], seeds, batch_size=n)
            checks = replayed(sampler.name, recorder, c.replays, c.seed, c.broken, c.pairs)
            if checks:
                lines.append(Line("replay", f"{sampler.name}, recorded pairs", checks, "", sampler.exact))
            how: Broken
            for how in ("acceptance", "residual") if checks and not c.broken else ():
                show: Show = partial(replayed, sampler.name, recorder, pairs=c.pairs)
                found = until_sure(show, min(c.replays, 50_000), how)
                lines.append(Line("replay", f"{sampler.name}, recorded pairs", found, how))
        used = with_rule(sampler, broken_rule(sampler, c.broken)) if c.broken else sampler
        sides = []
        for i, (name, one) in enumerate((("plain", plain), ("sampler", used))):
            folder = _folder(c, name, sampler, plain, labels)
            sides.append(draws(one, generator, labels, (c.seed << 40) + (i << 38), c.batch_size, folder, bar))
    name = f"{sampler.name} against {plain.name}, {len(labels)} images each"
    lines.append(Line("draws", name, check_positions(*sides), "", sampler.exact))
    some = [t[:ENERGY] for t in sides]
    energy = check_energy("energy distance", distances(*some), len(some[0]), seed=c.seed)
    lines.append(Line("draws", f"energy distance, {len(some[0])} images each", [energy], "", sampler.exact))
    return Report(lines, [], time.perf_counter() - clock, time.process_time() - cpu, LEVEL)


def _folder(c: AuditConfig, name: str, sampler: Sampler, plain: Sampler, labels: torch.Tensor) -> Path | None:
    """Where a side's draws are kept: a folder a setting, so that other settings never meet them."""
    if c.out is None:
        return None
    what = {"model": c.target, "seed": c.seed, "size": c.batch_size, "labels": labels.tolist(), "side": name}
    what["plain"] = {"name": plain.name, **to_dict(plain.config)}
    if name == "sampler":
        what |= {"sampler": {"name": sampler.name, **to_dict(sampler.config)}, "broken": c.broken}
    text = json.dumps(what, sort_keys=True)
    folder = c.out / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder

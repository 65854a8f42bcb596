"""`genlab eval --generated X --reference Y`: X may be a MODEL, whose images are then drawn as they are needed."""

from __future__ import annotations

import dataclasses
import json
import sys
from typing import Any

import torch

from genlab.config import to_dict
from genlab.processes import processes

from . import shared

HELP = """
With --model MODEL the images are drawn on the fly (nothing is stored, an interrupted evaluation goes on):
  --model MODEL            a shipped name, folder or Hub id, in place of --generated
  --like SOURCE:SPLIT      draw as many images, of the same classes (or captions), as it has (default emoji:heldout);
                           with --n N its classes in turn, over and over
  --sampler NAME           the sampler (default: the model's plain one); --set name=value for its options
  --guidance-scale S       classifier-free guidance
  --first-seed N           seeds are N, N+1, … (default 0)
  --reference-model MODEL  in place of --reference: what this model's plain sampler draws with other seeds
"""

OTHER_SEEDS = 1_000_000
"""Seeds of the reference model lie so far beyond those of the model."""


def main(argv: list[str]) -> int:
    """Judge images; exit 1 where `--self-test` finds a fault."""
    argv = list(argv)
    configs = shared.load("eval.config")
    if "-h" in argv or "--help" in argv:
        print(HELP, file=sys.stdout)
    model, reference_model, like, sampler_name = (
        shared.take(argv, "--model"),
        shared.take(argv, "--reference-model"),
        shared.take(argv, "--like", "emoji:heldout"),
        shared.take(argv, "--sampler"),
    )
    scale, first_seed = shared.take(argv, "--guidance-scale"), int(shared.take(argv, "--first-seed", "0"))
    guidance = float(scale) if scale else None
    options = []
    while option := shared.take(argv, "--set"):
        options.append(option)
    as_json = "--print-json" in argv
    argv = [a for a in argv if a != "--print-json"]
    c: Any = shared.parse(configs.EvalConfig, argv, prog="genlab eval")
    shared.require_positive(c, "n", "reference_n", "batch_size")
    c = dataclasses.replace(c, device=str(shared.torch_device(c.device)))
    if c.self_test:
        test = shared.load("eval.selftest")
        checks = test.self_test(device=c.device)
        print(test.describe(checks))
        return 0 if all(check.passed for check in checks) else 1
    if c.table:
        result_module = shared.load("eval.result")
        results = [result_module.Result.from_json(path.read_text()) for path in c.table]
        print(result_module.tabulate(results, [path.stem for path in c.table]))
        return 0
    generated = reference = None
    if reference_model:
        if c.reference:
            raise ValueError("give --reference-model or --reference, not both")
        plain = dataclasses.replace(c, n=c.reference_n)
        reference, _ = drawn_source(plain, reference_model, like, "", (), guidance, first_seed + OTHER_SEEDS)
    if model:
        if c.generated:
            raise ValueError("give --model or --generated, not both")
        generated, c = drawn_source(c, model, like, sampler_name, tuple(options), guidance, first_seed)
    elif options or (guidance is not None and not reference_model):
        raise ValueError("--set and --guidance-scale are a sampler's and need --model; --guidance records one")
    else:
        c = dataclasses.replace(c, sampler=sampler_name)  # for the record
    result = configs.run_eval(c, generated=generated, reference=reference, progress=not as_json)
    if processes()[0] == 0:  # one process speaks
        print(result.to_json() if as_json else result.table())
    return 0


def drawn_source(
    c: Any,
    model: str,
    like: str,
    sampler_name: str,
    options: tuple[str, ...],
    guidance: float | None,
    first_seed: int,
) -> tuple[Any, Any]:
    """Images of a model as a source, and the config with the protocol filled in."""
    from genlab.data.images import named_split, open_images

    from .models import load_line
    from .sample import make_sampler

    line = load_line(model, device=c.device)
    sampler = make_sampler(line.generator, sampler_name, options, guidance)
    source, split = named_split(like)
    size = line.tokenizer.spec.image_size
    assert size is not None
    wanted = open_images(source, split=split or "heldout", size=size[-1])  # type: ignore[arg-type]
    n = len(wanted) if c.n is None else c.n
    turns = torch.arange(n) % len(wanted)
    labels, captions = wanted.labels[turns], [wanted.captions[i] for i in turns]
    by_text = line.generator.by_text
    rows: list[Any] = captions if by_text else line.class_of(wanted.classes, labels).tolist()
    if by_text and not all(captions):
        raise ValueError(f"{model} draws by text, and {like} has no captions; name a set that has, with --like")
    seeds = first_seed + torch.arange(n)

    def draw(index: list[int]) -> torch.Tensor:
        return line.draw(sampler, line.condition([rows[i] for i in index]), seeds[index], batch_size=c.batch_size)[0]

    sources = shared.load("eval.sources")
    fingerprint = line.fingerprint(sampler, rows, seeds.tolist())
    name = f"{model} ({sampler.name}, seeds {first_seed}-{first_seed + n - 1})"
    tile = c.batch_size * -(-64 // c.batch_size)  # whole batches are drawn
    images = sources.GeneratedImages(draw, n, fingerprint, name=name, tile=tile)
    images.labels, images.classes, images.captions = labels, wanted.classes, captions
    guidance_used = sampler.config.guidance or line.generator.default_guidance
    c = dataclasses.replace(
        c,
        class_protocol=c.class_protocol or f"{'captions' if by_text else 'classes'} of {like}, in its order",
        seeds=c.seeds or f"{first_seed}-{first_seed + n - 1}",
        sampler=c.sampler
        or f"{sampler.name} {json.dumps({k: v for k, v in to_dict(sampler.config).items() if k != 'guidance'})}",
        guidance=c.guidance or f"{guidance_used.scale} {guidance_used.schedule}",
    )
    return images, c

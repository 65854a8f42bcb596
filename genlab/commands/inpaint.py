"""`genlab inpaint MODEL IMAGE`: draw a part of a picture anew."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import tyro

from genlab.config import config

from . import shared


@config
class InpaintConfig:
    """Keep a part of IMAGE and draw the rest with MODEL: a box, what a mask shows white, or a share at random.

    Models that take their tokens in any order (mar, elm_masked, resgen) fill in any part; those that draw one part
    after the other (llamagen, elm, xar over cells, ...) complete the end: for most, the lower part of the picture.
    The grid shows the picture, what was kept of it, and one image a seed.
    """

    model: Annotated[str, tyro.conf.Positional]
    """A generator: a shipped name (`genlab list`), a checkpoint folder or a Hub id."""
    image: Annotated[Path, tyro.conf.Positional]
    """A picture; it is cropped to a square and resized as for training."""
    box: str = ""
    """Draw this box anew: left,top,right,bottom in pixels of the model's picture, e.g. 0,32,64,64."""
    mask: Path | None = None
    """Draw anew where this picture is brighter than half; it is resized like IMAGE."""
    share: float | None = None
    """Variations: draw this share of the tokens anew, e.g. 0.5: each seed its own choice of them, or the last ones
    where a model draws part after part (of a flextok's, the details)."""
    label: str = ""
    """For a model by class: the class, a number or name; without: no class."""
    prompt: str = ""
    """For a model by text: what to draw."""
    seeds: str = "0-6"
    """One image a seed: 0-6, or 1,5,9."""
    grid: Path = Path("inpainted.png")
    """Write the pictures here."""
    paste: bool = True
    """Outside of --box or --mask, show the picture's own pixels; without, what the tokenizer makes of them."""
    sampler: str = ""
    """One that completes images; the generator's plain one by default."""
    set: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """A sampler option, name=value; may be repeated."""
    guidance: float | None = None
    """Classifier-free guidance; the generator's own default where not given."""
    tokenizer: str = ""
    """Another tokenizer of the same tokens."""
    zoom: int = 2
    """Enlarge the grid's images by this factor."""
    device: str = "auto"
    """auto, cpu, cuda."""


def main(argv: list[str]) -> int:
    """Encode, keep a part, draw the rest, write the grid."""
    c = shared.parse(InpaintConfig, argv, prog="genlab inpaint")
    import torch

    from genlab.data.decode import decode
    from genlab.pictures import grid, save_png, to_float

    from .models import load_line
    from .sample import make_sampler

    if [bool(c.box), c.mask is not None, c.share is not None].count(True) != 1:
        raise ValueError("say what to draw anew: one of --box 0,32,64,64, --mask FILE.png or --share 0.5")
    shared.require_grid(c.grid, c.model, clips=False)
    shared.require_positive(c, "zoom")
    line = load_line(c.model, tokenizer=c.tokenizer, device=shared.torch_device(c.device))
    generator, tokenizer = line.generator, line.tokenizer
    assert tokenizer.spec.image_size is not None
    if len(tokenizer.spec.image_size) == 3:
        raise ValueError(f"{c.model} is a model of clips; parts of pictures are drawn by models of images")
    generator.require_parts()
    side, seeds = tokenizer.spec.image_size[-1], torch.tensor(shared.numbers(c.seeds))

    def read(path: Path) -> torch.Tensor:
        if not path.is_file():
            raise FileNotFoundError(f"no picture at {path}")
        return torch.from_numpy(decode(path.read_bytes(), str(path), side)).permute(2, 0, 1)

    image = to_float(read(c.image))
    if c.share is None:
        anew = box_of(c.box, side) if c.box else read(c.mask).float().mean(0) > 127.5  # type: ignore[arg-type]
        known = ~touched(anew, tokenizer.spec.grid).flatten().expand(len(seeds), -1)
    else:
        known = some(generator, 1 - c.share, seeds)
    if c.label if generator.by_text else c.prompt:
        raise ValueError(f"{c.model} draws by {'text: give --prompt' if generator.by_text else 'class: give --label'}")
    if generator.by_text:
        condition = line.condition([c.prompt])[torch.zeros(len(seeds), dtype=torch.long)]
    else:
        classes = line.class_ids(c.label) if c.label else [generator.num_classes]
        if len(classes) != 1:
            raise ValueError(f"--label takes one class, got {c.label!r}: {len(classes)} of them")
        condition = torch.tensor(classes).expand(len(seeds))
    sampler = make_sampler(generator, c.sampler, c.set, c.guidance)
    with torch.inference_mode():
        tokens = tokenizer.encode(image[None].to(tokenizer.device))
        values = tokens.values.expand(len(seeds), *tokens.values.shape[1:])
        out = sampler.sample(generator, condition, seeds, progress=True, known=(values, known))
        drawn = tokenizer.decode(out.tokens, seeds).cpu()
    kept = torch.where(grow(known[0], tokenizer.spec.grid, side), image, 0.6)
    if c.share is None and c.paste:
        drawn = torch.where(anew, drawn, image)
    save_png(grid(torch.cat([image[None], kept[None], drawn]), columns=len(seeds) + 2, zoom=c.zoom), c.grid)
    held = int(known[0].sum())
    print(f"kept {held} of {known.shape[1]} tokens; {len(seeds)} images in {out.stats.seconds:.1f} s -> {c.grid}")
    return 0


def box_of(text: str, side: int) -> Any:
    """A boolean picture (side, side) that is true inside a box.

    Raises:
        ValueError: for a box that is none, or lies outside.
    """
    import torch

    try:
        left, top, right, bottom = (int(part) for part in text.split(","))
        if not (0 <= left < right <= side and 0 <= top < bottom <= side):
            raise ValueError
    except ValueError:
        raise ValueError(
            f"--box takes left,top,right,bottom within 0 and {side}, the side of this model's pictures; got {text!r}"
        ) from None
    anew = torch.zeros(side, side, dtype=torch.bool)
    anew[top:bottom, left:right] = True
    return anew


def touched(anew: Any, cells: tuple[int, ...]) -> Any:
    """Which cells of a token grid (rows, columns) a boolean picture touches.

    Raises:
        ValueError: for tokens that have no places in the picture.
    """
    import torch.nn.functional as F

    if len(cells) != 2:
        raise ValueError("these tokens have no places in the picture; use --share 0.5 for variations")
    return F.adaptive_max_pool2d(anew[None, None].float(), cells)[0, 0] > 0


def grow(known_L: Any, cells: tuple[int, ...], side: int) -> Any:
    """The pixels (side, side) of known tokens; of tokens without places, all or none."""
    import torch.nn.functional as F

    if len(cells) != 2:
        return known_L.float().mean().expand(side, side) > 0.5
    return F.interpolate(known_L.view(1, 1, *cells).float(), (side, side))[0, 0] > 0


def some(generator: Any, share: float, seeds: Any) -> Any:
    """A share of the tokens a seed, (B, L), as many for each: in any order a random one, otherwise the first groups'.

    Raises:
        ValueError: for a share that is none, or all or nothing of so few parts.
    """
    import torch

    from genlab.noise import Noise

    if not 0 < share < 1:
        raise ValueError(f"--share is a part of the tokens, above 0 and below 1, got {1 - share:g}")
    length, parts = generator.spec.length, generator.n_groups
    n = round(share * parts)
    if not 0 < n < parts:
        raise ValueError(
            f"--share {1 - share:g} is {'none' if n else 'all'} of the {parts} parts that this {generator.kind} "
            f"draws: give {1 / parts:.2g} to {1 - 1 / parts:.2g}"
        )
    if generator.any_order:
        return Noise(seeds).at(purpose="share").uniform(length).argsort(-1).argsort(-1) < n
    known = torch.zeros(len(seeds), length, dtype=torch.bool)
    for group in range(n):
        known[:, generator.positions(group).cpu()] = True
    return known

"""`genlab story PROMPT --out story.html`: a paragraph, a clip, a paragraph, a clip."""

from __future__ import annotations

import base64
import html
import io
import json
from pathlib import Path
from typing import Annotated, Any

import tyro

from genlab.config import config

from . import shared

PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{title}</title>
<style>body{{max-width:36rem;margin:2rem auto;font:1.1rem/1.5 serif;padding:0 1rem}}
figure{{margin:1rem 0}}img{{width:16rem;image-rendering:pixelated;border:1px solid #ddd}}
footer{{color:#777;font-size:.8rem;margin-top:3rem}}</style>
<h1>{title}</h1>
{body}
<footer>{about}</footer>
</html>
"""


@config
class StoryConfig:
    """Tell a story in words and clips, as one HTML file that holds everything."""

    prompt: Annotated[str, tyro.conf.Positional]
    """How it begins."""
    model: str = "divot_lm-emoji64"
    """A model that tells and draws, a MODEL of kind divot_lm."""
    tokenizer: str = ""
    """Another de-tokenizer of the same tokens, e.g. one adapted to drawn tokens."""
    clips: int = 3
    """Clips, each behind its paragraph."""
    out: Path = Path("story.html")
    """The page."""
    seed: int = 0
    """Decides words and clips."""
    variance: float = 0.1
    """Factor of the mixture's variances."""
    temperature: float = 0.7
    """Of the words."""
    top_p: float = 0.5
    """Draw among the likeliest words that hold this much probability."""
    max_new: int = 64
    """Word pieces a paragraph at most."""
    device: str = "auto"
    """auto, cpu, cuda."""
    json: bool = False
    """Print the paragraphs as JSON."""


def main(argv: list[str]) -> int:
    """Tell and write."""
    from .caption import require_words

    c = shared.parse(StoryConfig, argv, prog="genlab story")
    shared.require_positive(c, "clips", "max_new")
    require_words(c)
    import torch

    from genlab.hub import write_atomic
    from genlab.pictures import to_pil, to_uint8
    from genlab.tokens import Tokens

    from .models import load_line

    line = load_line(c.model, tokenizer=c.tokenizer, device=shared.torch_device(c.device))
    model: Any = line.generator
    if model.kind != "divot_lm":
        raise ValueError(f"{c.model} holds a {model.kind}: a story is told by a divot_lm")
    told = model.story(
        c.prompt, clips=c.clips, seed=c.seed, variance=c.variance, temperature=c.temperature, top_p=c.top_p,
        max_new=c.max_new,
    )  # fmt: skip
    tokens = Tokens(torch.stack([clip for _, clip in told]), model.spec)
    with torch.inference_mode():
        clips = to_uint8(line.tokenizer.decode(tokens, torch.arange(len(told)) + c.seed)).cpu()
    fps = line.tokenizer.config.fps
    body = []
    for (text, _), frames in zip(told, clips, strict=True):
        first, *others = [to_pil(frame) for frame in frames]
        first.save(
            buffer := io.BytesIO(), "WEBP", save_all=True, append_images=others, duration=round(1000 / fps), loop=0,
            quality=90,
        )  # fmt: skip
        data = base64.b64encode(buffer.getvalue()).decode()
        words = html.escape(text)
        body.append(f'<p>{words}</p>\n<figure><img alt="{words}" src="data:image/webp;base64,{data}"></figure>')
    about = html.escape(f"genlab story, model {c.model}, seed {c.seed}")
    write_atomic(c.out, PAGE.format(title=html.escape(c.prompt), body="\n".join(body), about=about))
    if c.json:
        print(json.dumps({"out": str(c.out), "paragraphs": [text for text, _ in told]}))
    else:
        print("\n".join([*(text for text, _ in told), f"-> {c.out}"]))
    return 0

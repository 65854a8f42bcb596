"""`genlab app`: a page in the browser to draw from models, on gradio (`pip install 'genlab[app]'`)."""

from __future__ import annotations

import os
import threading
import time
from functools import lru_cache
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from genlab.config import config

from . import shared

if TYPE_CHECKING:
    from PIL.Image import Image

MOST = 64
"""Images a picture."""
AUTO = "the model's plain one"
ONE_AT_A_TIME = threading.RLock()
"""A page asks for several things at once; loading is not made for threads, and drawings would only slow each other."""


@config
class AppConfig:
    """Open a page that draws: model, classes or prompt, sampler, seeds and guidance give a grid and its cost."""

    models: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Generators to offer: shipped names, checkpoint folders, Hub ids; none: every one that ships."""
    host: str = "127.0.0.1"
    """Address to listen on; the default is reached from this machine alone."""
    port: int = 7860
    """Port to listen on."""
    device: str = "auto"
    """auto, cpu, cuda."""
    browser: bool = False
    """Open the page in a browser."""


def main(argv: list[str]) -> int:
    """Serve until interrupted."""
    c = shared.parse(AppConfig, argv, prog="genlab app")
    app = build(c.models or shipped_generators(), c.device)
    print(f"http://{c.host}:{c.port} (Ctrl-C stops it)")
    app.launch(server_name=c.host, server_port=c.port, inbrowser=c.browser, share=False, quiet=True)
    return 0


def shipped_generators() -> tuple[str, ...]:
    """Names of the generators that ship."""
    from genlab.hub import read_description, shipped
    from genlab.registry import GENERATORS

    return tuple(name for name, folder in shipped().items() if read_description(folder)["kind"] in GENERATORS)


@lru_cache(maxsize=2)
def _load(model: str, device: str) -> Any:
    from .models import load_line

    return load_line(model, device=shared.torch_device(device))


def line_of(model: str, device: str) -> Any:
    """A generator with its tokenizer, kept in memory."""
    with ONE_AT_A_TIME:
        return _load(model, device)


def samplers_of(model: str, device: str = "auto") -> list[str]:
    """Names of the samplers that can draw from a model."""
    from genlab.registry import SAMPLERS

    return [name for name in SAMPLERS if SAMPLERS[name].supports(line_of(model, device).generator)]


def draw(
    model: str,
    classes: str,
    prompts: str,
    sampler: str,
    seeds: str,
    guidance: float | None,
    *,
    device: str = "auto",
) -> tuple[Image, str]:
    """One row a class or prompt, one column a seed, and a line on what it cost.

    Args:
        model: a generator, a MODEL.
        classes: for a model by class: `all`, names or numbers.
        prompts: for a model by text: one a line.
        sampler: its name; empty: the generator's plain one.
        seeds: `0-7` or `1,5,9`.
        guidance: scale of classifier-free guidance; None: the generator's own.
        device: auto, cpu, cuda.

    Raises:
        ValueError: for too many images, an unknown class, no prompt, or a sampler that can't draw from this model.
    """
    import torch

    from genlab.pictures import grid

    from .sample import make_sampler

    line = line_of(model, device)
    if line.generator.by_text:
        rows: list[Any] = list(dict.fromkeys(p.strip() for p in prompts.splitlines() if p.strip()))
        if not rows:
            raise ValueError(f"{model} draws by text: write what, one prompt a line")
        words = rows
    else:
        rows = line.class_ids(classes.strip() or "all")
        words = [line.classes[i] if line.classes else f"class {i}" for i in rows]
    if len(line.tokenizer.spec.image_size) == 3:
        raise ValueError(f"{model} draws clips, and this page shows images; `genlab sample {model}` writes films")
    columns = shared.numbers(seeds)
    if len(rows) * len(columns) > MOST:
        raise ValueError(f"{len(rows)} rows of {len(columns)} seeds are more than {MOST} images; choose fewer")
    chosen = make_sampler(line.generator, sampler, guidance=guidance)
    which = torch.arange(len(rows)).repeat_interleave(len(columns))
    with ONE_AT_A_TIME:
        clock = time.perf_counter()
        images, stats = line.draw(chosen, line.condition(rows)[which], torch.tensor(columns).repeat(len(rows)))
        seconds = time.perf_counter() - clock
    drafts = f", {stats.accepted} of {stats.proposed} drafts accepted" if stats.proposed else ""
    cost = (
        f"{len(images)} images in {seconds:.2f} s ({stats.seconds / stats.images:.3f} s an image without the decoder), "
        f"{stats.model_calls} model calls{drafts}; {chosen.name}, {'exact' if chosen.exact else 'approximate'}"
    )
    zoom = max(1, 128 // images.shape[-1])
    return grid(images, columns=len(columns), row_labels=[w[:24] for w in words], zoom=zoom), cost


def build(models: tuple[str, ...], device: str = "auto") -> Any:
    """The page, a `gradio.Blocks` that hasn't been launched.

    Raises:
        ValueError: if gradio is not installed, or there is no model.
    """
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    try:
        import gradio as gr
    except ImportError as error:
        raise ValueError(f"genlab app needs gradio ({error}): pip install 'genlab[app]'") from None
    if not models:
        raise ValueError("no generator ships with this install; name one: genlab app runs/mine/model")

    def offer(model: str) -> tuple[Any, Any, Any]:
        """What a model takes, and the samplers that can draw from it."""
        line = line_of(model, device)
        by_text = line.generator.by_text
        known = "" if by_text else f"`all`, names or numbers: {line.describe_classes()}"
        return (
            gr.update(visible=not by_text, info=known),
            gr.update(visible=by_text),
            gr.update(choices=[AUTO, *samplers_of(model, device)], value=AUTO),
        )

    def show(model: str, classes: str, prompts: str, sampler: str, seeds: str, own: bool, scale: float) -> Any:
        """The grid and its cost; what is wrong with the words given is shown in place of them."""
        if model not in models:
            raise gr.Error(f"{model} is not offered here")
        try:
            name = "" if sampler == AUTO else sampler
            return draw(model, classes, prompts, name, seeds, None if own else scale, device=device)
        except (ValueError, FileNotFoundError) as error:
            raise gr.Error(str(error)) from None

    with gr.Blocks(title="genlab", analytics_enabled=False) as app:
        gr.Markdown("# genlab\nOne row a class or prompt, one column a seed: an image depends on these two alone.")
        model = gr.Dropdown(list(models), value=models[0], label="Model")
        classes = gr.Textbox("0-3", label="Classes")
        prompts = gr.Textbox("a red apple", label="Prompts, one a line", lines=3, visible=False)
        with gr.Row():
            sampler = gr.Dropdown([AUTO], value=AUTO, label="Sampler")
            seeds = gr.Textbox("0-3", label="Seeds", info="0-7, or 1,5,9")
        with gr.Row():
            own = gr.Checkbox(True, label="The model's own guidance")
            scale = gr.Slider(1.0, 10.0, 2.0, step=0.1, label="Guidance scale, where not its own")
        button = gr.Button("Draw", variant="primary")
        cost = gr.Textbox(label="Cost", interactive=False)
        picture = gr.Image(label="Images", type="pil", format="png")
        model.change(offer, model, [classes, prompts, sampler])
        app.load(offer, model, [classes, prompts, sampler])
        button.click(show, [model, classes, prompts, sampler, seeds, own, scale], [picture, cost])
    return app

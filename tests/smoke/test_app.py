"""`genlab app`: the function behind the page, and, where gradio is installed, the page."""

import importlib.util
import sys

import numpy as np
import pytest

from genlab import cli
from genlab.commands import app


def test_draw_gives_a_grid_and_its_cost(tiny_xar):
    picture, cost = app.draw(str(tiny_xar), "all", "", "", "0-2", None, device="cpu")
    again, _ = app.draw(str(tiny_xar), "red", "", "flow", "0-2", None, device="cpu")
    guided, _ = app.draw(str(tiny_xar), "red", "", "", "0-2", 4.0, device="cpu")
    assert cost.startswith("6 images in ")
    assert "flow" in cost
    assert "model calls" in cost
    lower = np.asarray(picture)[-(again.height - 8) :, -300:]
    assert (lower == np.asarray(again)[-(again.height - 8) :, -300:]).all()  # class and seed alone decide an image
    assert not (np.asarray(guided) == np.asarray(again)).all()
    assert "flow" in app.samplers_of(str(tiny_xar), "cpu")
    assert "ancestral" not in app.samplers_of(str(tiny_xar), "cpu")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"classes": "green"}, "no class"),
        ({"seeds": "x"}, "expected e.g. 0-15"),
        ({"seeds": "0-99"}, "more than 64"),
        ({"sampler": "ancestral"}, "these can"),
        ({"sampler": "nonsense"}, "unknown sampler"),
    ],
)
def test_bad_words_are_told(tiny_xar, change, told):
    words = {"classes": "all", "prompts": "", "sampler": "", "seeds": "0", "guidance": None, **change}
    with pytest.raises(ValueError, match=told):
        app.draw(str(tiny_xar), **words, device="cpu")


def test_a_model_is_loaded_once_though_two_ask(tiny_xar, monkeypatch):
    from concurrent.futures import ThreadPoolExecutor

    from genlab.commands import models

    loaded, load = [], models.load_line
    monkeypatch.setattr(models, "load_line", lambda *a, **k: loaded.append(a) or load(*a, **k))
    app._load.cache_clear()
    with ThreadPoolExecutor(4) as pool:
        lines = list(pool.map(lambda _: app.line_of(str(tiny_xar), "cpu"), range(4)))
    assert len(loaded) == 1
    assert all(line is lines[0] for line in lines)


def test_every_shipped_generator_is_offered():
    assert "xar-cell-emoji64" in app.shipped_generators()
    assert "kl_vae-f8c16-emoji64" not in app.shipped_generators()


def test_without_gradio_the_install_command_is_told(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert cli.main(["app"]) == 2
    assert "pip install 'genlab[app]'" in capsys.readouterr().err


@pytest.mark.skipif(importlib.util.find_spec("gradio") is None, reason="no gradio: `pip install '.[app]'` brings it")
def test_the_page_builds(tiny_xar):
    page = app.build((str(tiny_xar),), "cpu")
    labels = {block.label for block in page.blocks.values() if getattr(block, "label", None)}
    assert {"Model", "Classes", "Prompts, one a line", "Sampler", "Seeds", "Draw"} <= labels | {
        block.value for block in page.blocks.values() if isinstance(getattr(block, "value", None), str)
    }
    offer, _, show = (f.fn for f in page.fns.values())
    classes, prompts, sampler = offer(str(tiny_xar))
    assert (classes["visible"], prompts["visible"]) == (True, False)
    assert "0 blue, 1 red" in classes["info"]
    assert "flow" in sampler["choices"]
    picture, cost = show(str(tiny_xar), "all", "", app.AUTO, "0-1", True, 2.0)
    assert picture.size[0] > 64
    assert cost.startswith("4 images")
    import gradio

    with pytest.raises(gradio.Error, match="no class"):
        show(str(tiny_xar), "green", "", app.AUTO, "0", True, 2.0)
    with pytest.raises(gradio.Error, match="not offered"):
        show("another", "all", "", app.AUTO, "0", True, 2.0)

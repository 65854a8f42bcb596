"""The design-space study that ELM is named after (Liu et al., arXiv 2410.16257), at small equal CPU budgets.

    genlab bench elm-study --plan                  what would be trained, and how long it takes
    genlab bench elm-study                         train, measure, judge; the same command goes on where it stopped
    genlab bench elm-study --quick                 the whole path in a minute; its figures mean nothing

Tokenizer (VQ, BAE) x model (AR, MLM) x vocabulary (k sub-tokens of d bits), size, sampling. All vocabularies cut
the codes of one trained BAE, so their likelihoods compare. `elm_measures` measures, `elm_findings` judges.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from genlab.config import config, from_dict, load_json, to_dict
from genlab.data import open_images
from genlab.data.cache import cached_tokens
from genlab.hub import from_pretrained, locate, read_description, write_atomic
from genlab.pictures import grid, save_png

from . import elm_findings, elm_measures
from .harness import METRICS, versions

SIZES = {"xs": (64, 2, 2), "s": (128, 4, 4), "m": (192, 6, 6), "l": (288, 8, 9)}
"""Width, blocks, heads."""
SWEEP_SEED = 1 << 20
"""Settings are chosen on other seeds than rows are judged on."""


@config
class ElmStudyConfig:
    """Train every row for the same CPU time, measure all under one protocol, and judge the paper's findings.

    Each training is a run folder under OUT; what is trained or measured already is kept. Writes result.json,
    table.txt, study.png and a grid of samples a row.
    """

    out: Path = Path("runs/elm-study")
    """Runs, measurements, result."""
    data: str = "emoji"
    """Images with classes, in a training and a held-out split: `emoji`, a folder, …"""
    minutes: float = 5.0
    """CPU-minutes a row, at most 20."""
    tokenizer_minutes: float = 0.0
    """CPU-minutes a tokenizer, at most 20; 0: as a row."""
    vq: str = ""
    """A trained VQ (a MODEL) to use; empty trains one, of as many codes as the BAE has."""
    bae: str = ""
    """A trained BAE to use; empty trains one."""
    vocabularies: tuple[str, ...] = ("1x12", "2x6", "3x4")
    """k x d, each of the BAE's bits in all; sizes and sampling are studied on the second."""
    sizes: tuple[str, ...] = ("xs", "s", "l")
    """Sizes of the AR model beside m."""
    repeats: int = 1
    """Trainings a row, with other seeds; from 2 on, intervals cover training too."""
    n: int = 512
    """Images a row."""
    sweep_n: int = 256
    """Images a sampling setting."""
    metric: str = "fd_efficientnet_lite0"
    """What judges images: a distance of `genlab eval`."""
    probes: int = 256
    """Held-out images for likelihoods; a quarter of them for attention and context."""
    batch_size: int = 64
    """Images a batch while drawing."""
    quick: bool = False
    """Everything tiny: a test that the study works."""
    plan: bool = False
    """Print the rows and how long they take, and stop."""
    page: Path | None = None
    """Fill the figures into this Markdown page, between its markers (docs/elm-study.md)."""
    json: bool = False
    """Print JSON."""

    @property
    def bits(self) -> int:
        """Bits a token.

        Raises:
            ValueError: for vocabularies that are not k x d, or not all of one product.
        """
        try:
            products = {k * d for k, d in map(cut, self.vocabularies)}
        except ValueError:
            products = set()
        if len(products) != 1 or min(products) < 1:
            raise ValueError(f"--vocabularies must be k x d of one product, as 1x12 2x6 3x4; got {self.vocabularies}")
        return products.pop()

    @property
    def main_tokens(self) -> str:
        """What sizes and sampling are studied on."""
        return f"bae-{self.vocabularies[min(1, len(self.vocabularies) - 1)]}"

    def checked(self) -> ElmStudyConfig:
        """This config, made tiny if it is to be quick.

        Raises:
            ValueError: for budgets, numbers or sizes out of range.
        """
        for name, least, most in (
            ("minutes", 0.001, 20), ("tokenizer_minutes", 0, 20), ("repeats", 1, 100), ("n", 8, 1 << 20),
            ("sweep_n", 8, 1 << 20), ("probes", 8, 1 << 20), ("batch_size", 1, 1 << 20),
        ):  # fmt: skip
            if not least <= getattr(self, name) <= most:
                option = "--" + name.replace("_", "-")
                raise ValueError(f"{option} must lie between {least} and {most}, got {getattr(self, name)}")
        if unknown := [s for s in self.sizes if s not in SIZES]:
            raise ValueError(f"unknown sizes {', '.join(unknown)}; known: {', '.join(SIZES)}")
        if self.metric not in METRICS or METRICS[self.metric].better != "lower":
            known = ", ".join(name for name, m in METRICS.items() if m.better == "lower")
            raise ValueError(f"--metric {self.metric} is no distance; known: {known}")
        _ = self.bits
        if not self.quick:
            return self
        return dataclasses.replace(
            self, minutes=0.003, tokenizer_minutes=0.003, vocabularies=("1x6", "2x3"), sizes=("xs",), n=8, sweep_n=8,
            probes=8, metric="kd_efficientnet_lite0",
        )  # fmt: skip


def cut(vocabulary: str) -> tuple[int, int]:
    """`2x6` as (2, 6)."""
    k, d = vocabulary.split("x")
    return int(k), int(d)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One generator, trained once a seed."""

    model: str
    """`ar` or `mlm`."""
    tokens: str
    """`vq`, or `bae-KxD`."""
    size: str = "m"

    @property
    def name(self) -> str:
        """As in tables and folders."""
        return f"{self.model}-{self.tokens}" + (f"-{self.size}" if self.size != "m" else "")


def rows_of(c: ElmStudyConfig) -> list[Row]:
    """Every row, the main ones first."""
    kinds = [f"bae-{v}" for v in c.vocabularies] + ["vq"]
    rows = [Row(model=model, tokens=tokens) for tokens in kinds for model in ("ar", "mlm")]
    return rows + [Row(model="ar", tokens=c.main_tokens, size=s) for s in c.sizes if s != "m"]


class Study:
    """Trains, measures and remembers."""

    def __init__(self, c: ElmStudyConfig, train: Callable[..., Path], presets: Mapping[str, Any]) -> None:
        """Args: c: a checked config. train: `train.loop.train`. presets: `train.presets.PRESETS`."""
        self.c, self.loop, self.presets, self.at = c, train, presets, 0
        self.size = 16 if c.quick else 64
        rows, sweep = rows_of(c), [self.settings(model, 64) for model in ("ar", "mlm")]
        causal = sum(row.model == "ar" for row in rows)
        self.steps = (
            (not c.bae) + (not c.vq) + c.repeats * (3 * len(rows) + causal) + sum(map(len, sweep)) + len(sweep) + 2
        )

    # -- data -----------------------------------------------------------------------------------------------------

    @cached_property
    def images(self) -> Any:
        """The training split."""
        return open_images(self.c.data, split="train", size=self.size)

    @cached_property
    def heldout(self) -> Any:
        """The held-out split.

        Raises:
            ValueError: if it has too few images.
        """
        images = open_images(self.c.data, split="heldout", size=self.size)
        if len(images) < max(self.c.n, self.c.sweep_n, self.c.probes):
            raise ValueError(f"{self.c.data} has {len(images)} held-out images: lower --n, --sweep-n, --probes to that")
        return images

    def picks(self, n: int) -> torch.Tensor:
        """Indices of n held-out images, spread evenly."""
        return torch.linspace(0, len(self.heldout) - 1, n).long()

    def labels(self, index: torch.Tensor) -> torch.Tensor:
        """Classes of held-out images, "no class" where there is none."""
        labels = self.heldout.labels[index]
        return torch.where(labels < 0, len(self.heldout.classes), labels)

    def ids(self, tokens: str, images: Any) -> torch.Tensor:
        """A set's ids under a tokenizer, (N, L, K)."""
        tokenizer = self.tokenizer(tokens)
        return cached_tokens(tokenizer, images).view(len(images), tokenizer.spec.length, tokenizer.spec.depth)

    # -- each step is done once -------------------------------------------------------------------------------------

    def say(self, what: str) -> None:
        """Progress."""
        self.at += 1
        print(f"[{self.at}/{self.steps}] {what}", file=sys.stderr, flush=True)

    def train(self, name: str, base: Any, **changes: Any) -> Path:
        """A run under OUT, unless it is finished; returns the model's folder.

        Raises:
            ValueError: if the folder holds a run of another config.
        """
        c, out = self.c, self.c.out / name
        run = dataclasses.replace(
            base, name=out.name, data=dataclasses.replace(base.data, source=c.data), sample_every=0, save_every=2_000,
            optim=dataclasses.replace(base.optim, warmup=8 if c.quick else 1_000), log_every=8 if c.quick else 500,
            threads=1, batch_size=8 if c.quick else base.batch_size, **changes,
        )  # fmt: skip
        self.say(f"{name}: {run.cpu_minutes:g} CPU-minutes of training")
        if (out / "model").is_dir():  # a run of an older config counts where its new fields are defaults
            path = out / "config.json"
            held = from_dict(type(run), load_json(path), where=str(path))
            # `auto` is settled when a run begins
            if held == dataclasses.replace(run, precision=held.precision if run.precision == "auto" else run.precision):
                return out / "model"
        return self.loop(run, out, device="cpu")

    def measure(
        self, folder: Path, weights: Iterable[str | Path], what: dict[str, Any], compute: Callable[[], Any]
    ) -> Any:
        """A measurement, kept in `folder/measured.json` under what was measured, and on which weights."""
        path = folder / "measured.json"
        known = load_json(path) if path.is_file() else {}
        hashes = [read_description(locate(w)).get("sha256", "") for w in weights]
        key = json.dumps({**what, "data": self.c.data, "pixels": self.size, "weights": hashes}, sort_keys=True)
        self.say(f"{folder.name}: " + ", ".join(f"{k} {v}" for k, v in what.items()))
        if key not in known:
            known[key] = compute()
            write_atomic(path, json.dumps(known) + "\n")
        return known[key]

    # -- models -----------------------------------------------------------------------------------------------------

    @cached_property
    def tokenizers(self) -> dict[str, str]:
        """A MODEL for each kind of tokens; all vocabularies are one BAE, its codes cut in different ways.

        Raises:
            ValueError: for tokenizers given that the study can't use.
        """
        c, found = self.c, {"bae": self.c.bae, "vq": self.c.vq}
        tiny: dict[str, Any] = {"image_size": 16, "channels": (16,), "features": 16, "norm_groups": 4}
        codes: dict[str, dict[str, Any]] = {"bae": {"sub_tokens": 1, "bits": c.bits}, "vq": {"codes": 2**c.bits}}
        for kind, size in codes.items():
            if not found[kind]:
                base = self.presets[f"{kind}-f4-emoji64"]()
                changes: dict[str, Any] = {"model": dataclasses.replace(base.model, **size)}
                if c.quick:  # too small for the perceptual network
                    changes["model"] = dataclasses.replace(changes["model"], **tiny)
                    changes["loss"] = dataclasses.replace(base.loss, perceptual=0.0)
                found[kind] = str(self.train(kind, base, cpu_minutes=c.tokenizer_minutes or c.minutes, **changes))
        bae, vq = from_pretrained(found["bae"]), from_pretrained(found["vq"])
        if bae.kind != "bae" or bae.config.all_bits != c.bits:
            raise ValueError(f"--bae {c.bae} is a {bae.kind}: {bae.spec.describe()}; the study wants {c.bits} bits")
        if vq.spec.kind != "discrete" or vq.spec.order != "raster" or (vq.spec.vocab or 0).bit_count() != 1:
            raise ValueError(f"--vq {c.vq} makes {vq.spec.describe()}; the study wants a discrete raster of 2^d codes")
        source = read_description(locate(found["bae"])).get("sha256", "")
        for vocabulary in c.vocabularies:
            folder = c.out / f"bae-{vocabulary}"
            if not folder.is_dir() or from_pretrained(folder).extra.get("cut_from") != source:
                k, d = cut(vocabulary)
                again = type(bae)(dataclasses.replace(bae.config, sub_tokens=k, bits=d))
                again.load_state_dict(bae.state_dict())
                again.extra = {**bae.extra, "cut_from": source}
                again.save_pretrained(folder)
            found[folder.name] = str(folder)
        return found

    def tokenizer(self, tokens: str) -> Any:
        """A tokenizer, loaded."""
        return from_pretrained(self.tokenizers[tokens])

    def generator(self, row: Row, seed: int) -> Path:
        """A row's model, trained."""
        c, spec = self.c, self.tokenizer(row.tokens).spec
        dim, depth, heads = (max(1, x // 2) for x in SIZES[row.size]) if c.quick else SIZES[row.size]
        base = self.presets["elm-2-6-emoji64" if row.model == "ar" else "elm_masked-2-6-emoji64"]()
        model = dataclasses.replace(
            base.model, grid=spec.grid, num_classes=len(self.images.classes), dim=dim, depth=depth, heads=heads,
            hidden=0, sub_tokens=spec.depth, bits=int(math.log2(spec.vocab or 1)),
            tokens="discrete" if spec.kind == "discrete" else "binary",
        )  # fmt: skip
        name = f"rows/{row.name}" + (f"-seed{seed}" if seed else "")
        return self.train(
            name, base, model=model, tokenizer=self.tokenizers[row.tokens], cpu_minutes=c.minutes, seed=seed
        )

    def settings(self, model: str, vocab: int) -> list[dict[str, Any]]:
        """Sampling settings to sweep, the plain one first."""
        return elm_measures.settings_of(model, vocab)[: 2 if self.c.quick else None]

    # -- measurements -----------------------------------------------------------------------------------------------

    def drawn(self, model: Path, row: Row, settings: dict[str, Any], n: int, first_seed: int = 0) -> dict[str, Any]:
        """Images of the classes of n held-out ones, judged."""

        def compute() -> dict[str, Any]:
            index = self.picks(n)
            images, how = elm_measures.sample(
                from_pretrained(model), self.tokenizer(row.tokens), settings, self.labels(index), index + first_seed,
                self.c.batch_size,
            )  # fmt: skip
            if not first_seed:
                shown = images[torch.linspace(0, n - 1, min(64, n)).long()]
                save_png(grid(shown, columns=16), model.parent / f"samples-guidance{settings['guidance']:g}.png")
            judged = elm_measures.distance(
                images, self.images, self.c.metric, sampler=how["sampler"], guidance=how["guidance"]
            )
            return judged | how

        what = {"draw": settings, "n": n, "first_seed": first_seed, "metric": self.c.metric}
        return self.measure(model.parent, [model, self.tokenizers[row.tokens]], what, compute)

    def trained(self, model: Path, row: Row, settings: dict[str, Any]) -> dict[str, Any]:
        """All about one training."""
        index = self.picks(self.c.probes)
        few = index[: max(2, len(index) // 4)]

        def likelihood() -> dict[str, Any]:
            g = from_pretrained(model)
            lines = [json.loads(line) for line in (model.parent / "metrics.jsonl").read_text().splitlines()]
            return {
                "bits": elm_measures.bits_a_token(
                    g, self.ids(row.tokens, self.heldout)[index], self.labels(index), index
                ),
                "parameters": g.n_params,
                "trained": g.extra.get("trained", {}),
                "curve": [(line["images"], line["loss"] * g.spec.depth / math.log(2)) for line in lines],
            }

        def attention() -> dict[str, Any]:
            ids = self.ids(row.tokens, self.heldout)[few]
            return elm_measures.attention(from_pretrained(model), ids, self.labels(few))

        weights: list[str | Path] = [model, self.tokenizers[row.tokens]]
        out = dict(self.measure(model.parent, weights, {"likelihood of": len(index)}, likelihood))
        if row.model == "ar":
            out["attention"] = self.measure(model.parent, weights, {"attention on": len(few)}, attention)
        return out | {"distance": self.drawn(model, row, settings, self.c.n)}

    def floors(self) -> dict[str, Any]:
        """The held-out images themselves, and through each tokenizer."""
        images = self.heldout.batch(self.picks(self.c.n))
        out: dict[str, Any] = {
            "held-out images": {"distance": elm_measures.distance(images, self.images, self.c.metric)}
        }
        for name in (self.c.main_tokens, "vq"):
            out[name] = elm_measures.reconstruction(
                self.tokenizer(name), images, self.images, self.c.metric, self.c.batch_size
            )
            save_png(grid(out[name].pop("images")[:64], columns=16), self.c.out / f"{name}-reconstructions.png")
        return out

    def randomness(self) -> dict[str, Any]:
        """Image tokens beside captions: the images' own, or where they have none, the emoji's."""
        sides, source = [self.images, self.heldout], self.c.data
        if not all(any(side.captions) for side in sides):
            sides, source = [open_images("emoji", split="train"), open_images("emoji", split="heldout")], "emoji"
        words = elm_measures.caption_words(sides[0]), elm_measures.caption_words(sides[1])
        ids = {
            title: (self.tokenizer(name).spec, self.ids(name, self.images), self.ids(name, self.heldout))
            for title, name in (("BAE tokens", self.c.main_tokens), ("VQ tokens", "vq"))
        }
        return {"captions": source, **elm_measures.randomness(words, ids, self.picks(self.c.probes))}

    def run(self) -> dict[str, Any]:
        """Train and measure everything, and judge."""
        c, rows = self.c, rows_of(self.c)
        models = {(row, seed): self.generator(row, seed) for row in rows for seed in range(c.repeats)}
        vocab = self.tokenizer(c.main_tokens).spec.vocab or 0
        sweep: dict[str, list[dict[str, Any]]] = {}
        plain, best = {}, {}
        for kind in ("ar", "mlm"):
            row, settings = Row(model=kind, tokens=c.main_tokens), self.settings(kind, vocab)
            model = models[row, 0]
            sweep[kind] = [{"settings": s, **self.drawn(model, row, s, c.sweep_n, SWEEP_SEED)} for s in settings]
            best[kind] = min(sweep[kind], key=lambda point: point["value"])["settings"]
            plain[kind] = self.drawn(model, row, settings[0], c.n)
        measured = {
            row.name: {
                **dataclasses.asdict(row),
                "settings": best[row.model],
                "trainings": [self.trained(models[row, seed], row, best[row.model]) for seed in range(c.repeats)],
            }
            for row in rows
        }
        both: list[str | Path] = [self.tokenizers[c.main_tokens], self.tokenizers["vq"]]
        result = {
            "config": to_dict(c),
            "versions": versions(),
            "main": f"ar-{c.main_tokens}",
            "floors": self.measure(c.out, both, {"floors of": c.n, "metric": c.metric}, self.floors),
            "randomness": self.measure(c.out, both, {"randomness, probes": c.probes}, self.randomness),
            "rows": measured,
            "sweep": sweep,
            "plain": plain,
        }
        return result | {"findings": elm_findings.judge(result)}


def describe_plan(c: ElmStudyConfig) -> str:
    """The rows, and an estimate of the time on one core that nothing else uses."""
    rows = rows_of(c)
    training = len(rows) * c.repeats * c.minutes + ((not c.bae) + (not c.vq)) * (c.tokenizer_minutes or c.minutes)
    points = sum(len(elm_measures.settings_of(model, 64)) for model in ("ar", "mlm"))
    images = points * c.sweep_n + (len(rows) * c.repeats + 2) * c.n
    return (
        f"{len(rows)} rows, {c.repeats} training(s) each: {', '.join(row.name for row in rows)}\n"
        f"{training:.0f} CPU-minutes of training; {images:,} images drawn and judged, about "
        f"{images * SECONDS_AN_IMAGE / 60:.0f} minutes; tokens, likelihoods, attention: about 15 minutes"
    )


SECONDS_AN_IMAGE = 0.15
"""Drawing, decoding and judging one image of a row of size m, on one core; an estimate, only --plan reads it."""


def main(c: ElmStudyConfig, train: Callable[..., Path], presets: Mapping[str, Any]) -> int:
    """The command; the training loop and the presets come from the caller, their package is a sibling of this one."""
    c = c.checked()
    if c.plan:
        print(describe_plan(c))
        return 0
    start = time.process_time()
    torch.set_num_threads(1)
    result = Study(c, train, presets).run()
    result["cpu_minutes_of_this_call"] = round((time.process_time() - start) / 60, 2)
    table = elm_findings.describe(result)
    write_atomic(c.out / "result.json", json.dumps(result, indent=1) + "\n")
    write_atomic(c.out / "table.txt", table + "\n")
    elm_findings.draw(result, c.out / "study.png")
    if c.page is not None:
        elm_findings.fill_page(c.page, result)
    print(json.dumps(result, indent=1) if c.json else table)
    return 0

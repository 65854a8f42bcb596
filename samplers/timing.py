"""Where a sampler's time goes, and what a call of so many tokens costs on this machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from genlab.distributions import Categorical
from genlab.generators.base import Condition, Generator, Guidance
from genlab.nn.diffusion_head import DiffusionHead
from genlab.nn.flops import flop_counter
from genlab.noise import Noise

from .base import Sampler
from .continuous_walk import Walk
from .speculative_jacobi import _Gumbel
from .token_tree import _Tree
from .window import JacobiWindow, Window

PREDICT = ("predict", "predict_many", "predict_tree")
KEEP = ("start", "commit", "advance", "crop", "keep_path", "tokens")
OWN = (("verify", "verify"), ("choose", "verify"), ("_walk", "verify"), ("_start", "draft"))
OF_A_WALK = (("_draft", "draft"), ("_target", "path"), ("_test", "verify"), ("_move", "path"), ("_settle", "state"))
MATHS = ("temperature", "top_k", "top_p", "sample", "pick", "log_prob")


def flops(sampler: Sampler, generator: Generator, condition: Condition) -> int:
    """Floating-point operations of drawing one batch by seeds from 0, a multiply-add being two."""
    with torch.no_grad(), flop_counter() as counter:
        sampler.draw(generator, condition, Noise(torch.arange(len(condition))))
    return counter.get_total_flops()


class Clock:
    """Seconds by what they were spent on, each second counted once, for the innermost that is known.

    `network` (predictions, and a diffusion head's or flow's evaluations), `draft` (the drafting model's, and growing a
    tree, a window or a path), `state` (cache and log), `noise`, `distribution` (temperature, top-k, drawing; a head's
    outputs to Gaussians), `verify`, `path` (where rows stand on their chains), `window` (its choice); what is left is
    the sampler's own loop.
    """

    def __init__(self, timer: Callable[[], float] = time.perf_counter) -> None:
        """Args: timer: what is read before and after."""
        self.timer = timer
        self.seconds: dict[str, float] = {}
        self._open: list[list[float]] = []

    def wrap(self, what: str, f: Callable[..., Any], sync: bool = False) -> Callable[..., Any]:
        """The same function, timed."""

        def timed(*args: Any, **options: Any) -> Any:
            begin = self.timer()
            self._open.append([0.0])
            try:
                result = f(*args, **options)
                if sync:
                    torch.cuda.synchronize()
                return result
            finally:
                spent, inner = self.timer() - begin, self._open.pop()[0]
                self.seconds[what] = self.seconds.get(what, 0.0) + spent - inner
                if self._open:
                    self._open[-1][0] += spent

        return timed

    @contextmanager
    def watch(self, generator: Generator, sampler: Any = None) -> Iterator[Clock]:
        """Time what happens to this generator, and in this sampler, inside the block."""
        cuda = generator.device.type == "cuda"
        with ExitStack() as stack:

            def patch(owner: Any, name: str, what: str) -> None:
                own, f = name in vars(owner), getattr(owner, name)
                kept = vars(owner).get(name)
                setattr(owner, name, self.wrap(what, f, cuda and what in ("network", "draft")))
                stack.callback(lambda: setattr(owner, name, kept) if own else delattr(owner, name))

            for model, what in ((generator, "network"), (getattr(sampler, "draft", None), "draft")):
                if not isinstance(model, Generator) or (what == "draft" and model is generator):
                    continue
                for name in PREDICT:
                    patch(model, name, what)
                for name in KEEP:
                    patch(model, name, "state")
                for part in _parts(model):
                    patch(part, "forward", what)
            patch(Noise, "_words", "noise")
            for name in MATHS:
                patch(Categorical, name, "distribution")
            for name, what in OWN:
                if hasattr(sampler, name):
                    patch(sampler, name, what)
            for name, what in OF_A_WALK:
                patch(Walk, name, what)
            patch(DiffusionHead, "reverse", "distribution")
            patch(_Gumbel, "at", "noise")
            patch(_Tree, "grow", "draft")
            for window in (Window, JacobiWindow):
                for name in ("choose", "learn"):
                    if name in vars(window):
                        patch(window, name, "window")
            yield self


def _parts(module: nn.Module) -> list[nn.Module]:
    """The outermost modules that are called."""
    found: list[nn.Module] = []
    for child in module.children():
        found += _parts(child) if isinstance(child, (nn.ModuleList, nn.ModuleDict)) else [child]
    return found


def call_costs(
    generator: Generator,
    labels: Condition,
    guidance: Guidance | None = None,
    tokens: tuple[int, ...] = (1, 2, 4, 8, 16, 32),
    repeats: int = 7,
) -> tuple[tuple[int, float], ...]:
    """c(W): seconds of a call that reads W tokens, half an image standing before them; the fastest of some repeats.

    Args:
        generator: over ids, one position after the other.
        labels: a batch.
        guidance: guided calls have twice the rows.
        tokens: W, those that the image has room for.
        repeats: rounds, all W in turn.
    """
    L, V = generator.n_groups, generator.spec.vocab or 1
    ids = Noise.from_seeds(range(len(labels))).uniform(L, generator.spec.depth)
    ids = (ids * V).long().to(generator.device)
    best = {w: float("inf") for w in tokens if w == 1 or w <= L - L // 2}
    with torch.inference_mode():
        state = generator.start(labels, guidance)
        half = L // 2
        while min(state.n) < half:  # in pieces: a state may have room for what comes next only
            take = min(16, half - min(state.n))
            generator.predict_many(state, list(ids[:, state.n[0] : state.n[0] + take].split(1, 1)))
            generator.advance(state, ids[:, state.n[0] : state.n[0] + take], [take] * len(labels))
        for _ in range(repeats):
            for w in best:
                drafts = list(ids[:, half : half + w - 1].split(1, 1)) if w > 1 else []
                begin, worked = time.perf_counter(), time.process_time()
                generator.predict_many(state, drafts)
                if generator.device.type == "cuda":
                    torch.cuda.synchronize()
                spent, worked = time.perf_counter() - begin, time.process_time() - worked
                # where others took the core away meanwhile, what this process computed is the better measure
                best[w] = min(best[w], spent if generator.device.type == "cuda" else min(spent, worked))
    return tuple(best.items())


def own_cost(sampler: Any, generator: Generator, labels: Condition) -> float:
    """Seconds a call that a sampler takes beside the network, over one batch."""
    clock, seeds = Clock(), torch.arange(len(labels), device=generator.device)
    with torch.inference_mode(), clock.watch(generator, sampler):
        begin = time.perf_counter()
        _, stats = sampler.draw(generator, labels, Noise(seeds))
        spent = time.perf_counter() - begin
    return (spent - clock.seconds.get("network", 0.0)) / max(1, stats.model_calls)

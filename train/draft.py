"""Distilling a draft from the target it drafts for: its head learns the target's steps, on the target's own paths.

    genlab train mar-draft-distilled-emoji64

What speculation loses at a step hangs on one number: the distance of the two means in standard deviations, D. Of
drafts with the target's spread a share 2 Phi(D / 2) - 1 is refused. Data alone makes two models alike only as far as
either is right; so the draft is shown what the target does. Prefixes are tokens of the data; at some positions the
target's guided chain is walked from noise to the end, and at every point of that path the draft's guided step is held
against the target's: log(1 + KL) of the two Gaussians, so that the noisiest steps, where an untrained head is off by
thousands, don't drown the others.
"""

from __future__ import annotations

from typing import Any

import torch

from genlab.data.images import ImageSet
from genlab.generators.mar import MAR
from genlab.hub import from_pretrained
from genlab.nn.diffusion_head import process
from genlab.noise import Noise

from .config import TrainConfig
from .tasks import Batch, GeneratorTask

PATHS = 4
"""Positions an image whose chains are walked."""


def steps_of(
    model: MAR, z_2NG: torch.Tensor, x: torch.Tensor, step: torch.Tensor, scale_NG: torch.Tensor, steps: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Guided mean and log-variance of steps, float64, like x (S, N, G, C).

    Args:
        model: whose head it is.
        z_2NG: conditions (2, N, G, D), the unconditional ones second.
        x: where the steps begin.
        step: of the thinned process, 0 the least noisy, (S,).
        scale_NG: guidance.
        steps: of the thinned process.
    """
    p = process(steps, x.device)
    at = step[:, None, None, None]
    embedded = model.head.cond_embed(z_2NG)[:, None]
    eps, fraction = model.head(x.expand(2, *x.shape), p.t[at][..., 0], embedded)
    cond, free = eps.double().unbind(0)
    return model.head.reverse(x, free + scale_NG[..., None] * (cond - free), fraction[0], at, p)


class DraftTask(GeneratorTask):
    """Train a MAR to draft for another, the `teacher`, of the same tokens and order."""

    teacher: MAR

    def __init__(self, config: TrainConfig, model: Any, images: ImageSet) -> None:
        """As `GeneratorTask`.

        Raises:
            ValueError: if the teacher is no such MAR.
        """
        teacher = from_pretrained(config.teacher)
        same = ("grid", "channels", "num_classes", "order", "condition", "mask_ratio")
        for name, one in (("this run's model", model), (f"--teacher {config.teacher}", teacher)):
            if not isinstance(one, MAR):
                raise ValueError(f"drafts are distilled from one mar into another; {name} is a {one.kind}")
        wrong = [k for k in same if getattr(teacher.config, k) != getattr(model.config, k)]
        if wrong:
            theirs = ", ".join(f"{k} {getattr(teacher.config, k)}" for k in wrong)
            raise ValueError(f"--teacher {config.teacher} has {theirs}: set --model.* to the same")
        super().__init__(config, model, images)
        object.__setattr__(self, "teacher", teacher.eval().requires_grad_(False))  # not trained, not saved

    def forward(self, batch: Batch, images_seen: int) -> dict[str, torch.Tensor]:
        """`loss`, and `refused`: the share of steps that would be, were the spreads equal."""
        return distil(self.model, self.teacher.to(batch.x.device), batch.x, batch.labels, batch.noise)


def distil(model: MAR, teacher: MAR, tokens: torch.Tensor, labels: Any, noise: Noise) -> dict[str, torch.Tensor]:
    """The loss of a draft `model` on its teacher's paths: see the module."""
    S, C = teacher.config.head_steps, teacher.config.channels
    here = noise.at(purpose="draft")
    picks_BG = here.uniform(teacher.L).argsort(-1)[:, :PATHS].to(tokens.device)  # numbers in `hidden`'s list

    def conditions(one: MAR) -> tuple[torch.Tensor, torch.Tensor]:
        parts = []
        for condition in (one.check_condition(labels), one.no_condition(one.check_condition(labels))):
            z, index, known = one.hidden(tokens, one.buffer(condition), noise)
            pick = picks_BG % z.shape[1]
            parts.append(z.gather(1, pick[..., None].expand(-1, -1, z.shape[-1])))
        r = known + (pick if one.config.order == "raster" else torch.zeros_like(pick))
        scale = [[one.default_guidance.at(one.progress(g)) for g in row] for row in r.tolist()]
        return torch.stack(parts), torch.tensor(scale, dtype=torch.float64, device=tokens.device)

    step = torch.arange(S - 1, -1, -1, device=tokens.device)
    with torch.no_grad():
        z, scale_BG = conditions(teacher)
        x = here.at(purpose="draft start").normal(PATHS, C)
        points: list[torch.Tensor] = []
        means: list[torch.Tensor] = []
        logvars: list[torch.Tensor] = []
        for i in step:
            mean, logvar = steps_of(teacher, z, x[None], i[None], scale_BG, S)
            for log, what in ((points, x), (means, mean[0]), (logvars, logvar[0])):
                log.append(what)
            fresh = here.at(step=int(i), purpose="draft step").normal(PATHS, C)
            x = mean[0] + (0.5 * logvar[0]).exp() * fresh
        path, p_mean, p_logvar = torch.stack(points), torch.stack(means), torch.stack(logvars)
    z, _ = conditions(model)
    q_mean, q_logvar = steps_of(model, z, path, step, scale_BG, S)
    far = (q_mean - p_mean) ** 2
    kl = 0.5 * (q_logvar - p_logvar + (p_logvar - q_logvar).exp() - 1 + far / q_logvar.exp()).sum(-1)
    refused = torch.erf((far / p_logvar.exp()).sum(-1).sqrt() / 8**0.5)
    return {"loss": kl.log1p().mean().float(), "refused": refused.mean().float().detach()}

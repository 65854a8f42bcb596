"""What the ELM study measures on a model, a tokenizer or a set of captions; `elm_study` decides on which."""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from typing import Any

import torch
import torch.nn.functional as F

from genlab.generators.base import Guidance
from genlab.noise import Noise, permutation
from genlab.pictures import to_float, to_uint8
from genlab.tokens import TokenSpec
from tokenizers_img.usage import codebook_usage, whole_codes

from . import locality, ngrams
from .harness import evaluate
from .reconstruction import psnr


def settings_of(model: str, vocab: int) -> list[dict[str, Any]]:
    """Sampling settings swept for `ar` or `mlm`, the first one plain: no guidance, nothing cut off."""
    plain: dict[str, Any] = {"guidance": 1.0, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    if model == "mlm":
        plain |= {"steps": 10, "confidence_temperature": 1.0}
    guided = plain | {"guidance": 2.0}
    changes: list[dict[str, Any]] = [{"guidance": 1.5}, {}, {"guidance": 4.0}, {"temperature": 0.85}]
    if model == "mlm":
        changes += [{"steps": 5}, {"steps": 20}, {"confidence_temperature": 4.0}]
    else:
        changes += [{"top_k": max(1, vocab // 4)}, {"top_p": 0.9}, {"temperature": 1.1}]
    return [plain, *(guided | change for change in changes)]


def distance(
    images: torch.Tensor, reference: Any, metric: str, *, sampler: str = "none", guidance: str = "none"
) -> dict[str, Any]:
    """Distance of uint8 images to the reference, which is taken as the population: value, se, metric, n."""
    n = len(images)
    figure = evaluate(
        images, reference, metrics=(metric,), class_protocol=f"classes of {n} held-out images", seeds=f"{n} of its own",
        sampler=sampler, guidance=guidance, reference_is_sample=False,
    ).figures[0]  # fmt: skip
    return {"metric": figure.name, "value": figure.value, "se": figure.standard_error, "n": n}


def reconstruction(
    tokenizer: Any, images: torch.Tensor, reference: Any, metric: str, batch_size: int
) -> dict[str, Any]:
    """Images (uint8) through a tokenizer: distance, PSNR in dB, usage of the codes, and the `images` that come out."""
    with torch.inference_mode():
        tokens = [tokenizer.encode(to_float(x)) for x in images.split(batch_size)]
        again = torch.cat([to_uint8(tokenizer.decode(t)) for t in tokens])
    return {
        "distance": distance(again, reference, metric),
        "psnr": float(psnr(images, again).mean()),
        "usage": codebook_usage(tokens),
        "parameters": tokenizer.n_params,
        "trained": tokenizer.extra.get("trained", {}),
        "images": again,
    }


@torch.inference_mode()
def bits_a_token(model: Any, ids_NLK: torch.Tensor, labels_N: torch.Tensor, seeds_N: torch.Tensor) -> list[float]:
    """Bits a token of each image: exact for causal models, the any-order bound for masked ones."""
    parts = []
    for ids, labels, seeds in zip(ids_NLK.split(16), labels_N.split(16), seeds_N.split(16), strict=True):
        if model.any_order:
            parts.append(any_order_nats(model, ids, labels, Noise(seeds)))
        else:
            parts.append(locality.nats(model, ids, labels).mean(1))
    return (torch.cat(parts) / math.log(2)).tolist()


def any_order_nats(model: Any, ids_BLK: torch.Tensor, labels_B: torch.Tensor, noise: Noise) -> torch.Tensor:
    """A bound from above on the nats a token, (B,), averaged over orders (Uria et al., arXiv 1310.1757).

    It is the cost of a masked place where the number of masked places is uniform in 1 … L; eight numbers an image,
    one from each eighth of the range.
    """
    B, L, K = ids_BLK.shape
    where, total = torch.arange(L).expand(B, L), torch.zeros(B)
    for i in range(8):
        here = noise.at(step=i)
        masked_B1 = ((i + here.at(purpose="count").uniform(1)) / 8 * L).floor() + 1
        mask_BL = here.at(purpose="places").uniform(L).argsort(-1).argsort(-1) < masked_B1
        logits = model.logits(torch.where(mask_BL[..., None], model.V, ids_BLK), labels_B, where)
        cost = F.cross_entropy(logits.flatten(0, 2), ids_BLK.flatten(), reduction="none").view(B, L, K).sum(-1)
        total += (cost * mask_BL).sum(1) / mask_BL.sum(1) / 8
    return total


def attention(model: Any, ids_NLK: torch.Tensor, labels_N: torch.Tensor) -> dict[str, Any]:
    """Attention by layer, on 16 images, and what near and far context save, in bits a token and image."""
    gain = locality.context_gain(model, ids_NLK, labels_N)
    return {
        "layers": locality.attention_locality(model, ids_NLK[:16], labels_N[:16]),
        "gain": {which: (nats / math.log(2)).tolist() for which, nats in gain.items()},
    }


def sample(
    model: Any, tokenizer: Any, settings: dict[str, Any], labels: torch.Tensor, seeds: torch.Tensor, batch_size: int
) -> tuple[torch.Tensor, dict[str, Any]]:
    """Images (uint8), and how they were drawn: sampler, guidance, seconds an image, model calls."""
    from samplers.ancestral import AncestralConfig, AncestralSampler
    from samplers.masked import MaskedConfig, MaskedSampler

    scale, rest = settings["guidance"], {k: v for k, v in settings.items() if k != "guidance"}
    sampler: Any
    guidance = Guidance(scale=scale, schedule="constant" if model.any_order else "linear")
    if model.any_order:
        sampler = MaskedSampler(MaskedConfig(guidance=guidance, **rest))
    else:
        sampler = AncestralSampler(AncestralConfig(guidance=guidance, **rest))
    out = sampler.sample(model, labels, seeds, batch_size, progress=True)
    with torch.inference_mode():
        starts = range(0, len(labels), batch_size)
        images = torch.cat([to_uint8(tokenizer.decode(out.tokens[i : i + batch_size])) for i in starts])
    return images, {
        "sampler": f"{sampler.name}, " + ", ".join(f"{k} {v}" for k, v in rest.items()),
        "guidance": f"{scale}, {guidance.schedule}",
        "seconds_an_image": out.stats.seconds / len(labels),
        "calls": out.stats.model_calls,
    }


def caption_words(images: Any) -> list[list[str]]:
    """Words of an image set's captions, one a subject (vendors and skin tones share one), in an order of their own."""
    kept: dict[str, str] = {}
    for caption, meta in zip(images.captions, images.meta, strict=True):
        if caption:
            kept.setdefault(str(meta.get("group") or caption), caption)
    texts = [re.findall(r"\w+", caption.lower()) for caption in kept.values()]  # commas only join the tags
    return [texts[i] for i in permutation(len(texts), 0).tolist()] if texts else []


def randomness(
    words: tuple[list[list[str]], list[list[str]]],
    ids: dict[str, tuple[TokenSpec, torch.Tensor, torch.Tensor]],
    probes: torch.Tensor,
) -> dict[str, Any]:
    """Randomness of captions and of image tokens on equally many tokens; n-grams of all image tokens on `probes`.

    Drawings have a plain background, which photographs don't: image tokens stand once more without the commonest.

    Args:
        words: the captions of the training split, and those of the held-out split.
        ids: by name, a spec and its ids (N, L, K) of the training and of the held-out images.
        probes: which held-out images `all_image_tokens` is given for.
    """
    letters = tuple([list(" ".join(text)) for text in side] for side in words)
    streams: dict[str, tuple[list[list[ngrams.Document]], int]] = {}
    for name, sides in (("caption words", words), ("caption letters", letters)):
        number = {w: i for i, w in enumerate(sorted({w for side in sides for text in side for w in text}))}
        documents = [[ngrams.text_document([number[w] for w in text]) for text in side] for side in sides]
        streams[name] = documents, len(number)
    everything = {}
    for name, (spec, *both) in ids.items():
        codes = [whole_codes(x, spec.vocab or 0).view(-1, *spec.grid) for x in both]
        documents = [[ngrams.raster_document(x) for x in side[permutation(len(side), 0)].numpy()] for side in codes]
        vocab = (spec.vocab or 0) ** spec.depth
        streams[name] = documents, vocab
        background = Counter(w for x, _ in documents[0] for w in x).most_common(1)[0][0]
        rest = [[x for d in side if (x := ngrams.without(d, background))[0]] for side in documents]
        if all(rest):
            streams[f"{name}, no background"] = rest, vocab
        grams, chosen = (
            ngrams.NGrams(documents[0], vocab),
            [ngrams.raster_document(x) for x in codes[1][probes].numpy()],
        )
        everything[name] = [(grams.bits(chosen, j) / spec.length).tolist() for j in range(grams.order + 1)]
    # the same number of tokens for all: entropies of more tokens come closer to their limits
    counts = [min(sum(len(x) for x, _ in sides[i]) for sides, _ in streams.values()) for i in (0, 1)]
    equal = {}
    for name, (documents, vocab) in streams.items():
        train, heldout = (ngrams.take(side, n) for side, n in zip(documents, counts, strict=True))
        equal[name] = dataclasses.asdict(ngrams.randomness(train, heldout, vocab))
    return {"equal": equal, "all_image_tokens": everything}

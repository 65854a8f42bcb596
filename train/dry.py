"""A training step counted without a GPU and without weights: the network on torch's meta device, its inputs real.

Batch, noise and masks are computed as ever, since a loss may look at them; whatever a parameter has touched has a shape
and no numbers. Only the forward pass runs. What the backward pass keeps is counted where autograd saves it, and its
arithmetic follows from which factors of each product want a gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import timm
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from genlab.generators.base import Generator
from genlab.generators.divot_lm import QUERY, Documents
from genlab.noise import Noise
from genlab.registry import model_class
from genlab.text import Text
from tokenizers_img.base import Tokenizer
from tokenizers_img.losses import AutoencoderLoss

from .config import TrainConfig
from .divot import ENCODER
from .scale import blocks
from .tasks import freeze

IN_BF16 = {
    F.linear, F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d, torch.bmm,
    F.scaled_dot_product_attention, torch.matmul, torch.mm, torch.addmm, torch.baddbmm, torch.einsum,
    torch.Tensor.matmul, torch.Tensor.__matmul__, torch.Tensor.__rmatmul__, torch.Tensor.mm, torch.Tensor.bmm,
}  # fmt: skip
"""What autocast does in bfloat16 on a GPU."""
IN_FP32 = {
    F.layer_norm, F.group_norm, F.softmax, F.log_softmax, F.cross_entropy, F.nll_loss, F.mse_loss, F.l1_loss,
    F.smooth_l1_loss, F.kl_div, F.softplus, F.normalize, F.cosine_similarity, torch.softmax, torch.log_softmax,
    torch.Tensor.softmax, torch.Tensor.log_softmax, torch.exp, torch.Tensor.exp, torch.log, torch.Tensor.log, torch.pow,
    torch.Tensor.pow, torch.Tensor.__pow__, torch.rsqrt, torch.Tensor.rsqrt, torch.sum, torch.Tensor.sum, torch.norm,
    torch.cumsum, torch.Tensor.cumsum, torch.Tensor.norm, torch.Tensor.prod,
}  # fmt: skip
"""What autocast does in float32 on a GPU."""
PATCH = 14
"""Side of a patch of SEED's image encoder."""
FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
STATISTICS: dict[Any, Callable[..., Any]] = {
    torch.ops.aten.bincount.default: lambda x, weights=None, minlength=0: x.new_empty(minlength),
    torch.ops.aten._unique2.default: lambda x, *_, **__: (x.flatten(), x.flatten(), x.flatten()),
}
"""Of codes in use: their shapes would depend on numbers, and nothing is trained by them."""


@dataclass(frozen=True)
class Cost:
    """A training step of some images."""

    forward: int
    """FLOPs (a multiplication and an addition are two)."""
    backward: int
    """FLOPs."""
    in_blocks: int
    """FLOPs of the forward pass in the blocks: what `--recompute` does twice."""
    kept: int
    """Bytes that autograd keeps from forward to backward."""
    kept_recomputing: int
    """The same with `--recompute`: outside of the blocks, their inputs, and one block's own."""


class Counter(TorchDispatchMode):
    """Runs meta and real tensors together, and counts products."""

    def __init__(self) -> None:
        super().__init__()
        self.forward = self.backward = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        meta = [t.is_meta for t in tensors]
        if func is torch.ops.aten._local_scalar_dense.default and meta[0]:
            return 0  # a number of the network's that decides something
        if func is torch.ops.aten.index.Tensor:  # by a real mask: its places are known
            args = (args[0], [at for i in args[1] for at in places_of(i)], *args[2:])
        if any(meta) and not all(meta):
            args, kwargs = tree_map_only(torch.Tensor, lambda t: t if t.is_meta else t.to("meta"), (args, kwargs))
        elif not any(meta) and torch.device(kwargs.get("device") or "cpu").type == "meta":
            kwargs = {**kwargs, "device": torch.device("cpu")}  # inputs on their way to the network stay real
        out = STATISTICS.get(func, func)(*args, **kwargs) if any(meta) else func(*args, **kwargs)
        wanted = sum(t.requires_grad for t in tensors) if torch.is_grad_enabled() else 0
        if func is FLASH.default:
            shapes = [t.shape for t in args[:3]]
            self.forward += sdpa_flop_count(*shapes)
            self.backward += sdpa_backward_flop_count(out[0].shape, *shapes) if wanted else 0
        elif func._overloadpacket in flop_registry:
            flops = flop_registry[func._overloadpacket](*args, **kwargs, out_val=out)
            factors = [t for t in tensors if t.ndim > 1][-2:]  # a bias makes none
            self.forward += flops
            self.backward += flops * sum(t.requires_grad for t in factors) if wanted else 0
        return out


def places_of(index: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    """An index of numbers for a real mask."""
    if index is None or index.is_meta or index.dtype != torch.bool:
        return (index,)
    return index.nonzero(as_tuple=True)


class Autocast(TorchFunctionMode):
    """A GPU's autocast, which the meta device lacks; and its fused attention, in place of separate products."""

    def __init__(self, bf16: bool) -> None:
        super().__init__()
        self.bf16 = bf16
        self.casts: dict[int, torch.Tensor] = {}

    def cast(self, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Weights are cast once a step, and kept."""
        if not tensor.is_floating_point() or tensor.dtype in (dtype, torch.float64):
            return tensor
        if not (tensor.is_leaf and tensor.requires_grad):
            return tensor.to(dtype)
        if id(tensor) not in self.casts:
            self.casts[id(tensor)] = tensor.to(dtype)
        return self.casts[id(tensor)]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.bf16 and (func in IN_BF16 or func in IN_FP32):
            dtype = torch.bfloat16 if func in IN_BF16 else torch.float32
            args, kwargs = tree_map_only(torch.Tensor, lambda t: self.cast(t, dtype), (args, kwargs))
        return fused(*args, **kwargs) if func is F.scaled_dot_product_attention else func(*args, **kwargs)

    @contextmanager
    def region(self, device_type: str, dtype: Any = None, enabled: bool = True, **_: Any) -> Iterator[None]:
        """`torch.autocast` while this mode runs: a model may turn it off in places."""
        before, self.bf16 = self.bf16, self.bf16 and enabled
        try:
            yield
        finally:
            self.bf16 = before


def fused(q: Any, k: Any, v: Any, attn_mask: Any = None, dropout_p: float = 0.0, is_causal: bool = False,
          scale: Any = None, enable_gqa: bool = False) -> Any:  # fmt: skip
    """Attention that keeps its inputs, its output and a number a query."""
    if q.ndim == 3:
        return fused(q[None], k[None], v[None], attn_mask, dropout_p, is_causal, scale)[0]
    if k.shape[1] != q.shape[1]:
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = attn_mask.to(q.dtype)
    return FLASH(q, k, v, 0.0, is_causal, attn_mask=attn_mask, scale=scale)[0]


class Kept:
    """What autograd saves, each memory once, apart for each block; parameters and buffers stand elsewhere."""

    def __init__(self, standing: nn.Module) -> None:
        tensors = [*standing.parameters(), *standing.buffers()]
        self.seen = {t.untyped_storage()._cdata for t in tensors}
        self.alive: list[Any] = []  # so that no memory's number is given twice
        self.outside = self.inside = self.inputs = self.largest = 0
        self.block = False

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        """Counts a tensor that autograd saves."""
        if self.block:
            self.inside += self.once(tensor)
        else:
            self.outside += self.once(tensor)
        return tensor

    def once(self, tensor: torch.Tensor) -> int:
        """Its bytes, the first time."""
        storage = tensor.untyped_storage()
        if storage._cdata in self.seen:
            return 0
        self.seen.add(storage._cdata)
        self.alive.append(storage)
        return storage.nbytes()


def count(config: TrainConfig, network: Network, n: int) -> Cost:
    """What a training step of n images costs.

    Args:
        config: the run.
        network: its networks.
        n: images.

    Raises:
        ValueError: for a kind of model whose training isn't known here.
    """
    counter, kept, autocast = Counter(), Kept(network), Autocast(config.precision != "fp32")
    in_blocks, known = 0, dict[Any, Any]()

    def measured(block: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        """The first two blocks of a shape run; others cost what the second did."""
        layout = (type(block), *((p.shape, p.requires_grad) for p in block.parameters()))

        def run(*args: Any, **kwargs: Any) -> Any:
            nonlocal in_blocks
            tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
            if kept.block or not torch.is_grad_enabled():
                return forward(*args, **kwargs)
            kept.inputs += sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())
            key = (layout, *((t.shape, t.dtype, t.requires_grad) for t in tensors))
            times, out, flops, more = known.get(key, (0, None, (0, 0), 0))
            if times < 2:
                before, inside = (counter.forward, counter.backward), kept.inside
                kept.block = True
                out = forward(*args, **kwargs)
                kept.block = False
                flops = (counter.forward - before[0], counter.backward - before[1])
                more = kept.inside - inside
                known[key] = times + 1, out, flops, more
            else:
                counter.forward, counter.backward = counter.forward + flops[0], counter.backward + flops[1]
                kept.inside += more
                out = tree_map(again, out)
            in_blocks += flops[0]
            kept.largest = max(kept.largest, more)
            return out

        return run

    def again(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return torch.empty_like(value).requires_grad_(value.requires_grad)

    found = blocks(network.model)
    for block in found:
        block.forward = measured(block, block.forward)
    try:
        patched = mock.patch("torch.autocast", autocast.region), mock.patch("timm.create_model", without_weights)
        with patched[0], patched[1], saved_tensors_hooks(kept.pack, lambda t: t), counter, autocast:
            step(config, network, n)
    finally:
        for block in found:
            del block.forward
    recomputing = kept.outside + kept.inputs + kept.largest
    whole = kept.outside + kept.inside
    return Cost(counter.forward, counter.backward, in_blocks, whole, min(whole, recomputing))


def without_weights(*args: Any, create: Any = timm.create_model, pretrained: bool = False, **options: Any) -> Any:
    """`timm.create_model` on the meta device: no weights are fetched."""
    with torch.device("meta"):
        return create(*args, pretrained=False, **options)


class Network(nn.Module):
    """What a run holds on its device: the model, and the networks of an autoencoder's loss; here on the meta device."""

    def __init__(self, config: TrainConfig) -> None:
        """Args: config: the run."""
        super().__init__()
        c, kind = config.model, model_class(config.model.kind)
        with torch.device("meta"), mock.patch("timm.create_model", without_weights):
            self.model: Any = kind(c)
        autoencoder = kind.reconstruct is not Tokenizer.reconstruct if issubclass(kind, Tokenizer) else False
        self.criterion = AutoencoderLoss(config.loss).to("meta") if autoencoder else None
        if hasattr(self.model, "freeze_others"):  # a seed's stages
            self.model.freeze_others()
        freeze(self.model, (*config.freeze, *(ENCODER if c.kind == "divot" and c.stage != "joint" else ())))


def step(config: TrainConfig, network: Network, n: int) -> torch.Tensor:
    """The loss of n images, late in the run; of documents, n of an image and its caption."""
    model, c, noise = network.model, config.model, Noise(torch.arange(n))
    if network.criterion is not None:
        return network.criterion(model, torch.zeros(n, 3, c.image_size, c.image_size), noise, config.images)["loss"]
    if c.kind == "flextok":
        return model.loss(torch.zeros(n, *model.vae.spec.shape), noise)["loss"]
    if c.kind == "divot":
        seen = torch.zeros(n, c.read, c.places**2, c.channels)
        return model.loss(torch.zeros(n, c.frames, *model.vae.spec.shape), seen, noise)["loss"]
    if c.kind == "seed":
        places = (c.encoder_size // PATCH) ** 2 + 1
        features, text = torch.zeros(n, places, c.encoder_dim), Text(torch.zeros(n, c.text_length, c.text_dim))
        if c.stage == "contrastive":
            return model.contrastive_loss(features, text)["loss"]
        words = (c.target_tokens,) if c.target == "sd_text77" else ()
        return model.codes_loss(features, torch.zeros(n, *words, c.target_dim), text=text)["loss"]
    if c.kind in ("seed_llama", "divot_lm"):
        length = c.text_length + math.prod(c.grid) + 2
        ids, learn = torch.zeros(n, length, dtype=torch.long), torch.ones(n, length, dtype=torch.bool)
        if c.kind == "seed_llama":
            return model.document_loss(ids, learn)["loss"]
        what = torch.zeros_like(ids)
        what[:, -1 - c.vocab : -1] = QUERY
        documents = Documents(ids, what, torch.zeros(n, length, c.dim), learn, torch.full((n,), length))
        return model.multimodal_loss(documents, noise)["loss"]
    if not isinstance(model, Generator) or c.kind == "distilled":
        raise ValueError(f"no plan for a {c.kind}: {config.name} is trained in its own way")
    spec = model.spec
    tokens = torch.zeros(n, *spec.shape, dtype=torch.float32 if spec.kind == "continuous" else torch.long)
    if model.by_text:
        labels: Any = Text(torch.zeros(n, model.text_length, c.text_dim))
    else:
        labels = torch.zeros(n, dtype=torch.long)
    return model.loss(tokens, labels, noise)["loss"]

"""Feature extractors behind one interface: uint8 images in, named layers of float32 features out.

An extractor fixes its own resize, so that a figure's name, weights' hash and resize say all there is to say
about how an image became a vector. Only Inception-2015 may give a figure called FID.
"""

from __future__ import annotations

import abc
import functools
import hashlib
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .resize import resize_images

if TYPE_CHECKING:
    import torch


class Extractor(abc.ABC):
    """A frozen network and its preprocessing.

    Attributes:
        name: as in `EXTRACTORS`.
        layers: width of each layer it can give, the first being the default for distances.
        resize: how images reach the input size (`eval.resize.RESIZES`).
        size: input height and width in pixels.
        weights_hash: sha256 of the weights file.
        device: where it runs.
    """

    name: str
    layers: dict[str, int]
    resize: str
    size: int
    weights_hash: str
    device: str = "cpu"

    @property
    def key(self) -> str:
        """Everything that features depend on besides the images."""
        return f"{self.name}/{self.weights_hash[:16]}/{self.resize}-{self.size}"

    def prepare(self, images_B3HW: torch.Tensor) -> torch.Tensor:
        """Resize uint8 images to the float32 input (B, 3, size, size), 0..255; runs in decoding workers."""
        return resize_images(images_B3HW, self.size, self.resize)

    @abc.abstractmethod
    def forward(self, x_B3SS: torch.Tensor, layers: Sequence[str]) -> dict[str, torch.Tensor]:
        """Features (B, D) of prepared images, one entry a layer asked for."""

    def __call__(self, images_B3HW: torch.Tensor, layers: Sequence[str] = ()) -> dict[str, np.ndarray]:
        """Features of uint8 images (B, 3, H, W) as float32 arrays, (B, D) a layer.

        Raises:
            ValueError: a layer this extractor lacks, or images that are not uint8 (B, 3, H, W).
        """
        layers = tuple(layers) or (next(iter(self.layers)),)
        missing = [layer for layer in layers if layer not in self.layers]
        if missing:
            raise ValueError(f"{self.name} has no layer {missing[0]!r}; it has {', '.join(self.layers)}")
        return self.features(self.prepare(images_B3HW.to(self.device)), layers)

    def features(self, x_B3SS: torch.Tensor, layers: Sequence[str]) -> dict[str, np.ndarray]:
        """The same from images that `prepare` has brought to float32 (B, 3, size, size)."""
        import torch

        with torch.inference_mode(), _full_precision():
            out = self.forward(x_B3SS.to(self.device), layers)
        return {layer: value.float().cpu().numpy() for layer, value in out.items()}


class _full_precision:
    """TF32 off for the time of a forward: it moves Inception features by 1e-3."""

    def __enter__(self) -> None:
        import torch

        self.before = (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False

    def __exit__(self, *_: object) -> None:
        import torch

        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = self.before


@functools.lru_cache(maxsize=32)
def _hash_file(path: str, size: int, mtime_ns: int) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def file_hash(path: str | Path) -> str:
    """sha256 of a file's bytes."""
    stat = os.stat(path)
    return _hash_file(str(path), stat.st_size, stat.st_mtime_ns)


class EfficientNetLite0(Extractor):
    """ImageNet EfficientNet-Lite0 (arXiv 1905.11946) out of its own small package: works without network.

    Distances on its 1280 pooled features are named `fd_efficientnet_lite0`; they are not FID.
    """

    name = "efficientnet-lite0"
    resize, size = "torch-bicubic", 224

    def __init__(self, weights: str | Path | None = None, device: str = "cpu"):
        import torch

        from genlab.nn.lite0 import load_lite0, packaged_lite0

        path = Path(weights) if weights else packaged_lite0()
        network = load_lite0(path)
        network.reset_classifier(0)
        _fold_batch_norms(network)
        self.network = network.to(device).to(memory_format=torch.channels_last)
        self.layers = {"pool": 1280}
        self.weights_hash = file_hash(path)
        self.device = device

    def forward(self, x_B3SS: torch.Tensor, layers: Sequence[str]) -> dict[str, torch.Tensor]:
        """Pooled features (B, 1280); inputs are normalised with mean and deviation 0.5."""
        import torch

        x = (x_B3SS / 127.5 - 1.0).contiguous(memory_format=torch.channels_last)
        return {"pool": self.network(x)}


def _fold_batch_norms(module: torch.nn.Module) -> None:
    """Fold each inference-mode batch norm into the convolution registered just before it (2x on CPU)."""
    import torch
    from torch.nn.utils.fusion import fuse_conv_bn_weights

    previous: torch.nn.Conv2d | None = None
    for name, child in list(module.named_children()):
        if isinstance(child, torch.nn.BatchNorm2d) and previous is not None:
            n: Any = child
            previous.weight, previous.bias = fuse_conv_bn_weights(
                previous.weight, previous.bias, n.running_mean, n.running_var, n.eps, n.weight, n.bias
            )
            setattr(module, name, getattr(child, "act", torch.nn.Identity()))  # timm's norm carries its act
            previous = None
        elif isinstance(child, torch.nn.Conv2d):
            previous = child
        else:
            _fold_batch_norms(child)


class Inception2015(Extractor):
    """The Inception-v3 of 5 December 2015, through torch-fidelity's port: the one network of FID.

    Layers: `pool` (2048, FID), `logits` (1008 without bias, Inception score), `spatial` (2023: the first 7
    channels of `mixed_6/conv` over 17x17 places, in ADM's order height, width, channel; sFID).
    """

    name = "inception-2015"
    size = 299

    def __init__(self, weights: str | Path | None = None, device: str = "cpu", *, resize: str = "tf1-bilinear"):
        import torch
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        path = _inception_weights(weights)
        state = torch.load(path, map_location="cpu", weights_only=True)
        # torch-fidelity unpickles whatever the path holds; hand it the checked tensors instead.
        checked = io.BytesIO()
        torch.save(state, checked)
        checked.seek(0)
        try:
            network = FeatureExtractorInceptionV3(
                "inception-v3-compat", ["2048"], feature_extractor_weights_path=checked
            )
        except RuntimeError as error:
            raise ValueError(f"{path} does not hold torch-fidelity's Inception-2015 weights: {error}") from None
        # Not channels last: faster on a CPU, but other rounding. It moves KID's last digits, and FID is to be theirs.
        self.network = network.eval().requires_grad_(False).to(device)
        self.layers = {"pool": 2048, "spatial": 2023, "logits": 1008}
        self.resize = resize
        self.weights_hash = file_hash(path)
        self.device = device

    def features(self, x_B3SS: torch.Tensor, layers: Sequence[str]) -> dict[str, np.ndarray]:
        """As of any extractor; on a CPU 16 images at a time: less memory to walk through, the same bits."""
        if self.device != "cpu" or len(x_B3SS) <= 16:
            return super().features(x_B3SS, layers)
        parts = [super(Inception2015, self).features(part, layers) for part in x_B3SS.split(16)]
        return {layer: np.concatenate([part[layer] for part in parts]) for layer in layers}

    def forward(self, x_B3SS: torch.Tensor, layers: Sequence[str]) -> dict[str, torch.Tensor]:
        """Features of images already resized to 299 pixels, in 0..255."""
        out: dict[str, torch.Tensor] = {}
        # pytorch-fid scales its own way; the others as the TensorFlow graph does
        x = x_B3SS / 127.5 - 1.0 if self.resize == "torch-bilinear" else (x_B3SS - 128.0) / 128.0
        # Registration order is forward order in torch-fidelity's class, up to the classifier.
        for name, module in self.network.named_children():
            if name == "Mixed_6d" and "spatial" in layers:  # TensorFlow's mixed_6; its conv is the 1x1 branch
                spatial = module.branch1x1(x)[:, :7]
                out["spatial"] = spatial.permute(0, 2, 3, 1).flatten(1)
                if set(layers) == {"spatial"}:
                    return out
            if name == "fc":
                break
            x = module(x)
        x = x.flatten(1)
        if "pool" in layers:
            out["pool"] = x
        if "logits" in layers:
            out["logits"] = x.mm(self.network.fc.weight.T)
        return out


def _inception_weights(weights: str | Path | None) -> Path:
    import torch
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    if weights is not None:
        path = Path(weights)
        if path.is_file():
            return path
        raise FileNotFoundError(f"no Inception weights at {path}")
    path = Path(torch.hub.get_dir()) / "checkpoints" / URL_INCEPTION_V3.rsplit("/", 1)[-1]
    if path.is_file():
        return path
    command = f"curl -L --create-dirs -o {path} {URL_INCEPTION_V3}"
    problem = "offline mode is set (HF_HUB_OFFLINE)"
    if os.environ.get("HF_HUB_OFFLINE", "0") in ("", "0"):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(URL_INCEPTION_V3, str(path), hash_prefix="6726825d", progress=False)
            return path
        except (OSError, RuntimeError) as error:
            problem = f"the download failed ({error})"
    raise FileNotFoundError(
        f"the weights of inception-2015 are not at {path}, and {problem}. Fetch them with\n  {command}\n"
        "or name a copy (`--weights inception-2015 FILE`). Without them there is fd_efficientnet_lite0, which is not "
        "FID."
    )


class DINOv2(Extractor):
    """DINOv2's ViT-L/14 through timm, class token (1024): FD-DINOv2 (arXiv 2306.04675).

    Images are brought to 224 pixels with clean-fid's resize, as dgm-eval's clean mode does.
    """

    name = "dinov2-vit-l14"
    model = "vit_large_patch14_dinov2.lvd142m"
    resize, size = "pil-bicubic", 224

    def __init__(self, weights: str | Path | None = None, device: str = "cpu"):
        import timm
        import torch

        options: dict[str, Any] = {"num_classes": 0, "img_size": self.size}
        network: Any
        if weights is not None:
            if not Path(weights).is_file():
                raise FileNotFoundError(f"no DINOv2 weights at {weights}")
            network = timm.create_model(self.model, pretrained=False, checkpoint_path=str(weights), **options)
        else:
            try:
                network = timm.create_model(self.model, pretrained=True, **options)
            except (OSError, RuntimeError) as error:
                raise FileNotFoundError(
                    f"the weights of {self.name} are not in the cache, and the download failed "
                    f"({str(error).splitlines()[0]}). Fetch them with\n  hf download timm/{self.model}\n"
                    f"or name a copy of its model.safetensors (`--weights {self.name} FILE`)"
                ) from error
        self.network = network.eval().requires_grad_(False).to(device)
        self.layers = {"pool": int(network.num_features)}
        self.weights_hash = file_hash(weights) if weights else _state_hash(network)
        self.device = device
        scale = 255.0 * torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]], device=device)
        self._mean, self._std = scale[:, :, None, None]

    def forward(self, x_B3SS: torch.Tensor, layers: Sequence[str]) -> dict[str, torch.Tensor]:
        """Class token after the last norm."""
        x = (x_B3SS.clamp(0.0, 255.0) - self._mean) / self._std
        return {"pool": self.network.forward_features(x)[:, 0]}


class CLIPImage(Extractor):
    """OpenAI's CLIP ViT-L/14 at 336 pixels through transformers, unit-length embeddings: CMMD."""

    name = "clip-vit-l14-336"
    model = "openai/clip-vit-large-patch14-336"
    resize, size = "pil-bicubic-8bit", 336

    def __init__(self, weights: str | Path | None = None, device: str = "cpu"):
        import torch

        from .text import load_clip

        network = load_clip(weights or self.model, device)
        self.network, self.device = network, device
        self.size = int(network.config.vision_config.image_size)
        self.layers = {"pool": int(network.config.projection_dim)}
        self.weights_hash = _state_hash(network)
        scale = 255.0 * torch.tensor(
            [[0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]], device=device
        )
        self._mean, self._std = scale[:, :, None, None]

    def forward(self, x_B3SS: torch.Tensor, layers: Sequence[str]) -> dict[str, torch.Tensor]:
        """Embeddings of unit length."""
        import torch

        pooled = self.network.vision_model(pixel_values=(x_B3SS - self._mean) / self._std).pooler_output
        embeds = self.network.visual_projection(pooled)
        return {"pool": torch.nn.functional.normalize(embeds, dim=-1)}


def _state_hash(network: Any) -> str:
    """sha256 over a network's tensors, for weights that came through a library's own cache."""
    digest = hashlib.sha256()
    for key, value in sorted(network.state_dict().items()):
        digest.update(key.encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


EXTRACTORS: dict[str, type[Extractor]] = {
    "efficientnet-lite0": EfficientNetLite0,
    "inception-2015": Inception2015,
    "dinov2-vit-l14": DINOv2,
    "clip-vit-l14-336": CLIPImage,
}


def padded(images_B3HW: torch.Tensor, batch_size: int) -> torch.Tensor:
    """Fill a batch up to one shape by repeating its last image.

    Convolution kernels differ with the batch shape, so an odd last batch would move features by about 1e-5.
    """
    import torch

    lack = batch_size - len(images_B3HW)
    return images_B3HW if lack <= 0 else torch.cat([images_B3HW, images_B3HW[-1:].expand(lack, -1, -1, -1)])

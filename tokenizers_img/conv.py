"""The convolutional autoencoder around VQ, BAE and multi-scale VQ (VQGAN's, Esser et al., arXiv 2012.09841).

diffusers' encoder and decoder, as in `kl_vae`, between pixels and a map of `dim` channels that a subclass
quantises. Also here is the linear shortcut of `kl_vae`, in a form that fits quantised maps: patches go to
their principal components beside the encoder, and the quantised map goes back to patches, fitted by
least squares, beside the decoder; codes start from training images too. The networks then only learn what is
not linear (our choice, for small machines; the published sizes leave it out).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from genlab.config import config

from .base import Tokenizer


@config
class ConvConfig:
    """Sizes of encoder and decoder."""

    image_size: int = 256
    """Side of the square image, in pixels."""
    patch: int = 1
    """Pixels folded into channels before the first layer (space to depth): cheaper, for small machines."""
    channels: tuple[int, ...] = (128, 128, 256, 256, 512)
    """Width of each level; each but the last halves the resolution."""
    layers: int = 2
    """Residual blocks a level of the encoder."""
    decoder_layers: int = 3
    """Residual blocks a level of the decoder."""
    features: int = 256
    """Channels between the networks and the quantiser's own convolutions."""
    norm_groups: int = 32
    """Groups of the normalisations."""
    attention_levels: tuple[int, ...] = (4,)
    """Levels with self-attention, in encoder and decoder; the middle block always has it."""
    shortcut: bool = False
    """Add linear maps of patches beside encoder and decoder."""
    refine: int = 0
    """Width of a small residual network over the decoded pixels; 0: none."""

    @property
    def downsampling(self) -> int:
        """Pixels a token covers, each way."""
        return self.patch * 2 ** (len(self.channels) - 1)

    @property
    def side(self) -> int:
        """Side of the token map."""
        return self.image_size // self.downsampling


class Refine(nn.Module):
    """Pixels to better pixels: two residual blocks over 2x2 patches, which start at zero."""

    def __init__(self, width: int) -> None:
        """Args: width: channels, a multiple of 8."""
        super().__init__()
        self.enter = nn.Conv2d(12, width, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1),
                nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1),
            ) for _ in range(2)
        )  # fmt: skip
        self.leave = nn.Conv2d(width, 12, 3, padding=1)
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)  # type: ignore[arg-type]

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, H, W), even H and W."""
        x = self.enter(F.pixel_unshuffle(x_BCHW, 2).contiguous(memory_format=torch.channels_last))
        for block in self.blocks:
            x = x + block(x)
        return x_BCHW + F.pixel_shuffle(self.leave(x), 2)


def check_refine(width: int, side: int) -> None:
    """Refuse to refine (a width above 0) images of an odd side.

    Raises:
        ValueError: for such a side.
    """
    if width and side % 2:
        raise ValueError(f"refine works on 2x2 pixels: images of {side}x{side} can't be cut into these")


class ConvTokenizer(Tokenizer):
    """Images to a map (B, dim, h, w), and back; a subclass quantises the map in between."""

    config: ConvConfig
    constant = 0.0
    """What the shortcut's last channel starts as, where it isn't to start as a principal component."""

    def __init__(self, config: ConvConfig, dim: int, pre: nn.Module, post: nn.Module) -> None:
        """Args: config: sizes. dim: channels of the map. pre: features to the map. post: the map to features.

        Raises:
            ValueError: if the image size isn't a multiple of the downsampling, or odd where there is `refine`; or if a
                level doesn't exist.
        """
        from diffusers.models.autoencoders.vae import Decoder, Encoder

        super().__init__(config)
        c, n = config, len(config.channels)
        if c.image_size % c.downsampling:
            raise ValueError(f"image_size {c.image_size} is not a multiple of the downsampling {c.downsampling}")
        check_refine(c.refine, c.image_size)
        if bad := [i for i in c.attention_levels if not 0 <= i < n]:
            raise ValueError(f"attention_levels {bad} don't exist: there are {n} levels, 0 … {n - 1}")
        attention = ["Attn" * (i in c.attention_levels) for i in range(n)]
        self.encoder = Encoder(
            in_channels=3 * c.patch**2,
            out_channels=c.features,
            down_block_types=tuple(f"{a}DownEncoderBlock2D" for a in attention),
            block_out_channels=c.channels,
            layers_per_block=c.layers,
            norm_num_groups=c.norm_groups,
            double_z=False,
        )
        self.decoder = Decoder(
            in_channels=c.features,
            out_channels=3 * c.patch**2,
            up_block_types=tuple(f"{a}UpDecoderBlock2D" for a in reversed(attention)),
            block_out_channels=c.channels,
            layers_per_block=c.decoder_layers - 1,  # diffusers adds one
            norm_num_groups=c.norm_groups,
        )
        self.pre, self.post = pre, post
        if c.shortcut:
            self.to_map = nn.Conv2d(3, dim, c.downsampling, c.downsampling)
            self.to_pixels = nn.ConvTranspose2d(dim, 3, c.downsampling, c.downsampling)
        if c.refine:
            self.refine = Refine(c.refine)
        self.to(memory_format=torch.channels_last)

    def analyse(self, images: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, H, W) to the map before quantisation, (B, dim, h, w)."""
        images = images.to(self.encoder.conv_in.weight.dtype)
        x = F.pixel_unshuffle(images, self.config.patch).contiguous(memory_format=torch.channels_last)
        z = self.pre(self.encoder(x))
        return (z + self.to_map(images) if self.config.shortcut else z).float()

    def synthesise(self, z_BChw: torch.Tensor) -> torch.Tensor:
        """A quantised map to images, not clamped; any resolution."""
        z = z_BChw.contiguous(memory_format=torch.channels_last)
        x = F.pixel_shuffle(self.decoder(self.post(z)), self.config.patch)
        x = x + self.to_pixels(z) if self.config.shortcut else x
        return (self.refine(x) if self.config.refine else x).float()

    @torch.no_grad()
    def start_map(self, patches_ND: torch.Tensor) -> None:
        """Start the shortcut's way in, from patches of training images: principal components, on one scale."""
        x = patches_ND.double()
        mean = x.mean(0)
        values, vectors = torch.linalg.eigh((x - mean).T @ (x - mean) / len(x))
        n = self.to_map.out_channels
        basis = vectors.T.flip(0)[torch.arange(n) % len(values)] / values[-1].clamp_min(1e-6).sqrt()
        if self.constant:
            basis[-1] = 0
        bias = -(basis @ mean)
        bias[-1] += self.constant
        self.to_map.weight.copy_(basis.view_as(self.to_map.weight))
        self.to_map.bias.copy_(bias)  # type: ignore[union-attr]

    def start_codes(self, z_BChw: torch.Tensor) -> torch.Tensor:
        """Choose first codes for maps of training images, and give the maps quantised."""
        raise NotImplementedError

    @torch.no_grad()
    def before_training(self, images: torch.Tensor) -> None:
        """With a shortcut: start it, and the codes, from training images (N, 3, H, W) in [-1, 1]."""
        if not self.config.shortcut:
            return
        f = self.config.downsampling
        y = F.unfold(images, f, stride=f).transpose(1, 2).flatten(0, 1)
        self.start_map(y)
        for last in (self.pre, self.decoder.conv_out):
            for value in last.parameters():
                nn.init.zeros_(value)
        z = self.start_codes(self.to_map(images)).permute(0, 2, 3, 1).flatten(0, 2).double()
        z_mean, y_mean = z.mean(0), y.double().mean(0)
        ridge = 1e-6 * len(z) * torch.eye(z.shape[1]).to(z)
        weight = torch.linalg.solve((z - z_mean).T @ (z - z_mean) + ridge, (z - z_mean).T @ (y - y_mean))
        self.to_pixels.weight.copy_(weight.view_as(self.to_pixels.weight))
        # one bias a channel: the mean patch's average; what varies inside a patch is left to the network
        self.to_pixels.bias.copy_((y_mean - z_mean @ weight).view(3, -1).mean(1))  # type: ignore[union-attr]

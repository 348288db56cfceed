"""The VAE of FLUX.1: pictures to latents and back.

Weights come from the `vae.` part of a checkpoint (or `ae.safetensors`); called by the VAE nodes. The
network is the autoencoder of latent diffusion (Rombach et al. 2022, arXiv:2112.10752) as published with
FLUX.1, without quantisation convolutions; parameter names equal the keys of that file.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from usoflow.errors import UsoflowError
from usoflow.models.checkpoint import Component
from usoflow.models.finite import require_finite
from usoflow.models.tiling import Grid, tiled
from usoflow.models.weights import Conv2d, GroupNorm
from usoflow.settings import size_in_words

logger = logging.getLogger(__name__)

OFFICIAL_GROUPS = 32
OFFICIAL_EPS = 1e-6
LEAST_TILE = 16  # latents; what is smaller sees too little of the picture
GOOD_TILE = 64  # latents, as the tiled nodes have by default; where one fits, nothing has to make room
INDEXED = 2**31 - 1  # numbers of a map that CUDA's kernel of enlarging takes
OVERLAP = 8  # part of a tile that its neighbour works on too: 1 / 8


@dataclass(frozen=True, slots=True)
class VaeConfig:
    """What the network is built from.

    Attributes:
        widths: channels per resolution, finest first; each step down halves the picture.
        blocks: residual blocks per resolution of the encoder; the decoder has one more.
        latent_channels: channels of z.
        groups: groups of every GroupNorm; must divide every width.
        eps: epsilon of every GroupNorm.
    """

    widths: tuple[int, ...] = (128, 256, 512, 512)
    blocks: int = 2
    latent_channels: int = 16
    groups: int = OFFICIAL_GROUPS
    eps: float = OFFICIAL_EPS

    @property
    def factor(self) -> int:
        """Pixels per latent along one side."""
        return int(2 ** (len(self.widths) - 1))

    @classmethod
    def from_component(cls, component: Component) -> VaeConfig:
        """Widths and depths from the shapes; `groups` and `eps` declared, else official.

        Raises:
            UsoflowError: "model_damaged", "tensor_missing" if a tensor that tells a size is not there,
                "tensor_shape" if it tells none, "block_gap" if the levels or blocks are not numbered without
                a gap, "model_unsupported" if the groups do not divide a width.
        """
        levels = range(max(component.count("encoder.down.{}."), 1))
        widths = tuple(component.shape(f"encoder.down.{n}.block.0.conv1.weight", 4)[0] for n in levels)
        groups = component.setting("groups", OFFICIAL_GROUPS)
        if groups < 1 or any(width % groups for width in widths):
            raise UsoflowError(
                "model_unsupported",
                f"{component.file.path.name}: {groups} groups do not divide the VAE's widths {widths}.",
            )
        return cls(
            widths=widths,
            blocks=component.count("encoder.down.0.block.{}."),
            latent_channels=component.shape("decoder.conv_in.weight", 4)[1],
            groups=groups,
            eps=component.setting("eps", OFFICIAL_EPS),
        )


class ResBlock(nn.Module):
    """Two convolutions, each after GroupNorm and SiLU, added to the input."""

    def __init__(self, width_in: int, width_out: int, config: VaeConfig) -> None:
        super().__init__()
        self.norm1 = GroupNorm(config.groups, width_in, eps=config.eps)
        self.conv1 = Conv2d(width_in, width_out, 3, padding=1)
        self.norm2 = GroupNorm(config.groups, width_out, eps=config.eps)
        self.conv2 = Conv2d(width_out, width_out, 3, padding=1)
        self.nin_shortcut = Conv2d(width_in, width_out, 1) if width_in != width_out else None

    def forward(self, x: Tensor) -> Tensor:
        """[B, width_in, H, W] -> [B, width_out, H, W]."""
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        out: Tensor = h + (x if self.nin_shortcut is None else self.nin_shortcut(x))
        return out


class AttnBlock(nn.Module):
    """Self-attention with one head over all positions, added to the input."""

    def __init__(self, width: int, config: VaeConfig) -> None:
        super().__init__()
        self.norm = GroupNorm(config.groups, width, eps=config.eps)
        self.q = Conv2d(width, width, 1)
        self.k = Conv2d(width, width, 1)
        self.v = Conv2d(width, width, 1)
        self.proj_out = Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> same."""
        h = self.norm(x)
        q, k, v = (self._tokens(layer(h)) for layer in (self.q, self.k, self.v))
        h = F.scaled_dot_product_attention(q, k, v)  # [B, 1, H*W, C]
        h = h.squeeze(1).transpose(1, 2).reshape(x.shape)
        out: Tensor = x + self.proj_out(h)
        return out

    @staticmethod
    def _tokens(x: Tensor) -> Tensor:
        return x.flatten(2).transpose(1, 2).unsqueeze(1).contiguous()  # [B, 1, H*W, C]


class Middle(nn.Module):
    """The coarsest level: block, attention, block."""

    def __init__(self, width: int, config: VaeConfig) -> None:
        super().__init__()
        self.block_1 = ResBlock(width, width, config)
        self.attn_1 = AttnBlock(width, config)
        self.block_2 = ResBlock(width, width, config)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> same."""
        out: Tensor = self.block_2(self.attn_1(self.block_1(x)))
        return out


class Downsample(nn.Module):
    """Halves the picture."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = Conv2d(width, width, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H/2, W/2]; padded at the right and the bottom only."""
        out: Tensor = self.conv(F.pad(x, (0, 1, 0, 1)))
        return out


class Upsample(nn.Module):
    """Doubles the picture."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, 2H, 2W]."""
        out: Tensor = self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return out


class Level(nn.Module):
    """The residual blocks of one resolution and, but for the finest one, its change of resolution."""

    def __init__(self, width_in: int, width_out: int, blocks: int, config: VaeConfig) -> None:
        super().__init__()
        first = ResBlock(width_in, width_out, config)
        rest = (ResBlock(width_out, width_out, config) for _ in range(blocks - 1))
        self.block = nn.ModuleList([first, *rest])
        self.downsample: Downsample | None = None
        self.upsample: Upsample | None = None

    def forward(self, x: Tensor) -> Tensor:
        """[B, width_in, H, W] -> [B, width_out, H', W']."""
        for block in self.block:
            x = block(x)
        resample = self.downsample or self.upsample
        return x if resample is None else resample(x)


class Encoder(nn.Module):
    """Pictures to the mean and log-variance of the posterior."""

    def __init__(self, config: VaeConfig) -> None:
        super().__init__()
        widths = config.widths
        self.conv_in = Conv2d(3, widths[0], 3, padding=1)
        pairs = zip((widths[0], *widths[:-1]), widths, strict=True)
        self.down = nn.ModuleList([Level(a, b, config.blocks, config) for a, b in pairs])
        for level, width in zip(self.down[:-1], widths[:-1], strict=True):
            level.downsample = Downsample(width)
        self.mid = Middle(widths[-1], config)
        self.norm_out = GroupNorm(config.groups, widths[-1], eps=config.eps)
        self.conv_out = Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 3, H, W] in -1..1 -> [B, 2 * latent_channels, h, w]: mean, then log-variance."""
        h = self.conv_in(x)
        for level in self.down:
            h = level(h)
        h = self.mid(h)
        out: Tensor = self.conv_out(F.silu(self.norm_out(h)))
        return out


class Decoder(nn.Module):
    """Latents to pictures."""

    def __init__(self, config: VaeConfig) -> None:
        super().__init__()
        widths = config.widths
        self.conv_in = Conv2d(config.latent_channels, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1], config)
        pairs = zip((*widths[1:], widths[-1]), widths, strict=True)
        self.up = nn.ModuleList([Level(a, b, config.blocks + 1, config) for a, b in pairs])
        for level, width in zip(self.up[1:], widths[1:], strict=True):
            level.upsample = Upsample(width)
        self.norm_out = GroupNorm(config.groups, widths[0], eps=config.eps)
        self.conv_out = Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        """[B, latent_channels, h, w] -> [B, 3, H, W], about -1..1."""
        h = self.mid(self.conv_in(z))
        for level in reversed(self.up):  # up.0 is the finest: the file numbers them as the encoder's
            h = level(h)
        out: Tensor = self.conv_out(F.silu(self.norm_out(h)))
        return out


class AutoEncoder(nn.Module):
    """Encoder and decoder, with the conventions of the IMAGE and LATENT types around them.

    Pictures are worked on one at a time, so memory does not grow with the batch, and in overlapping tiles
    where a whole one would need more memory than there is `room` for (bytes; None: there is enough). Tiles
    are normalised each for itself, so colours may differ a little between them. Results lie on the
    device of the input, as float32.
    """

    def __init__(self, config: VaeConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

    @torch.no_grad()
    def encode(
        self,
        images: Tensor,
        *,
        dtype: torch.dtype = torch.float32,
        room: int | None = None,
        between: Callable[[], None] = lambda: None,
    ) -> Tensor:
        """The posterior's mean: no noise is drawn and no latent format applied.

        Args:
            images: [B, H, W, C] in 0..1, C >= 3; only the first three channels count, and the sides are
                cropped about the centre to multiples of `config.factor`.
            dtype: the dtype to compute in.
            room: bytes for the computation.
            between: called before each picture or tile; what it raises ends the computation.

        Returns:
            [B, latent_channels, H // factor, W // factor] float32.

        Raises:
            UsoflowError: "picture_size" if a side is shorter than one latent; "non_finite".
        """
        pixels = centre_crop(images, self.config.factor)[..., :3].movedim(-1, 1)  # [B, 3, H, W]
        needed = self.encoding_bytes(images, dtype)
        grid = self._grid(pixels, needed, room, before=self.config.factor)

        def means(x: Tensor) -> Tensor:
            return self.encoder(x).chunk(2, dim=1)[0]

        return require_finite(self._each(means, pixels * 2 - 1, dtype, grid, between), "VAE encoding")

    def encoding_bytes(self, images: Tensor, dtype: torch.dtype) -> int:
        """What encoding one of these pictures, [B, H, W, C], takes: five maps of the finest level."""
        return 5 * self.config.widths[0] * dtype.itemsize * images.shape[1] * images.shape[2]

    @torch.no_grad()
    def decode(
        self,
        latent: Tensor,
        *,
        dtype: torch.dtype = torch.float32,
        room: int | None = None,
        between: Callable[[], None] = lambda: None,
    ) -> Tensor:
        """Latents, without latent format, to pictures.

        Args:
            latent: [B, latent_channels, h, w].
            dtype: the dtype to compute in.
            room: bytes for the computation.
            between: called before each picture or tile; what it raises ends the computation.

        Returns:
            [B, h * factor, w * factor, 3] float32, clamped to 0..1.

        Raises:
            UsoflowError: "latent_channels", "non_finite".
        """
        channels = self.config.latent_channels
        if latent.shape[1] != channels:
            raise UsoflowError(
                "latent_channels",
                f"The latent has {latent.shape[1]} channels, the VAE takes {channels}.",
                remedy="Sample the latent first, or make it with EmptySD3LatentImage.",
            )
        room = _within_kernels(room, dtype) if self._on_cuda else room
        grid = self._grid(latent, self.decoding_bytes(latent, dtype), room, after=self.config.factor)
        pixels = require_finite(self._each(self.decoder, latent, dtype, grid, between), "VAE decoding")
        return ((pixels + 1) / 2).clamp_(0, 1).movedim(1, -1).contiguous()

    def decoding_bytes(self, latent: Tensor, dtype: torch.dtype) -> int:
        """What decoding one of these latents, [B, C, h, w], takes.

        At its peak four maps are held, enlarged to the finest level and as wide as the next.
        """
        wide = self.config.widths[min(1, len(self.config.widths) - 1)]
        return 4 * wide * dtype.itemsize * self.config.factor**2 * latent.shape[-2] * latent.shape[-1]

    @property
    def _on_cuda(self) -> bool:
        return self.decoder.conv_in.weight.device.type == "cuda"

    def _grid(
        self, batch: Tensor, needed: int, room: int | None, *, before: int = 1, after: int = 1
    ) -> Grid | None:
        """The tiles for pictures or latents [..., H, W] that need so many bytes each; None if they fit."""
        if room is None or needed <= room:
            return None
        factor = self.config.factor
        height, width = (factor * side // before for side in batch.shape[-2:])  # in pixels
        side = max(LEAST_TILE, int((room * height * width / needed) ** 0.5) // factor)
        logger.info(
            "The VAE works in tiles of %d pixels: %dx%d at once would need %s, and %s may be taken.",
            side * factor, width, height, size_in_words(needed), size_in_words(room),
        )  # fmt: skip
        return Grid(side, side // OVERLAP, before, after)

    def _each(
        self,
        network: Callable[[Tensor], Tensor],
        batch: Tensor,
        dtype: torch.dtype,
        grid: Grid | None,
        between: Callable[[], None],
    ) -> Tensor:
        device = self.encoder.conv_in.weight.device

        def compute(item: Tensor) -> Tensor:
            between()
            return network(item.to(device, dtype)).to(batch.device).float()

        items = torch.split(batch, 1)
        return torch.cat([tiled(compute, item, grid) for item in items])


def _within_kernels(room: int | None, dtype: torch.dtype) -> int:
    """Bytes for decoding, of whose four maps CUDA's kernel of enlarging takes no larger ones.

    https://github.com/huggingface/diffusers/issues/3643
    """
    most = 4 * dtype.itemsize * INDEXED
    return most if room is None else min(room, most)


def centre_crop(images: Tensor, multiple: int) -> Tensor:
    """[B, H, W, C] cropped about its centre so that H and W are multiples of `multiple`.

    Raises:
        UsoflowError: "picture_size" if nothing would be left.
    """
    height, width = images.shape[1:3]
    if min(height, width) < multiple:
        raise UsoflowError(
            "picture_size",
            f"A picture of {width}x{height} cannot be encoded: {multiple}x{multiple} is the least.",
        )
    top, left = height % multiple // 2, width % multiple // 2
    return images[:, top : top + height - height % multiple, left : left + width - width % multiple]

"""Stage `vae`: train the pocket autoencoder on rendered scenes.

Reads scenes (`scenes`), trains `models.vae.AutoEncoder`, writes its state, sheets and PSNR. Loss: squared
and absolute error of pixels, absolute error of their differences to the right and below, and the KL term of a
variational autoencoder (arXiv:2112.10752, appendix G) with a small weight. `folded` turns the
trained network into one whose latents have the mean and deviation that FLUX's scale and shift expect.
"""

from __future__ import annotations

import copy
import json
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from usoflow.models.latent_format import LatentFormat
from usoflow.models.vae import AutoEncoder, VaeConfig
from usoflow.training.drawings import Sprites
from usoflow.training.initial import initialise
from usoflow.training.loop import LossFunction, Recipe, Training, trained
from usoflow.training.scenes import Picture, compose, draw_scene, generator, held_out_scene
from usoflow.training.sheets import contact_sheet, loss_curve

VALIDATION_SEED = 7_000_001
SCALES = 4  # of pictures in the network: latents are an eighth of them, as FLUX's are


@dataclass(frozen=True, slots=True)
class VaeStage:
    """What the `vae` section of a training file says.

    Attributes:
        recipe: length and speed.
        widths: channels per resolution.
        blocks: residual blocks per resolution.
        groups: of GroupNorm.
        side: of the training pictures; half of them are cut out of pictures twice as large.
        kl: weight of the KL term, per latent number.
        squared, absolute: weights of the errors of pixels in -1..1.
        differences: weight of the absolute error of differences.
    """

    recipe: Recipe
    widths: tuple[int, ...]
    blocks: int = 1
    groups: int = 1
    side: int = 64
    kl: float = 3e-4
    squared: float = 5.0
    absolute: float = 0.3
    differences: float = 0.2

    def __post_init__(self) -> None:
        """Raises ValueError for a network that there cannot be, or one of other latents than FLUX's."""
        if len(self.widths) != SCALES or min(self.widths) < 1 or self.blocks < 1:
            raise ValueError(f"a VAE has {SCALES} widths and at least a block of each")
        if self.groups < 1 or any(width % self.groups for width in self.widths):
            raise ValueError("widths must be multiples of groups")
        if self.side < 1 or self.side % 2 ** (SCALES - 1):
            raise ValueError(f"side must be a multiple of {2 ** (SCALES - 1)}")

    @property
    def config(self) -> VaeConfig:
        return VaeConfig(widths=self.widths, blocks=self.blocks, groups=self.groups)


def training_picture(sprites: Sprites, stage: VaeStage, index: int) -> Picture:
    """Picture number `index` of the stage: a small scene, or a cut of a large one."""
    scene = draw_scene(sprites.world, stage.recipe.seed, index)
    if index % 2:
        return compose(scene, sprites, side=stage.side)
    x, y = generator(stage.recipe.seed + 1, index).integers(stage.side, size=2)
    large = compose(scene, sprites, side=2 * stage.side)
    return large[y : y + stage.side, x : x + stage.side]


def to_tensor(pictures: list[Picture]) -> Tensor:
    """Pictures [S, S, 3] in 0..1 -> [B, 3, S, S] in -1..1."""
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous() * 2 - 1


def reconstruction_loss(wanted: Tensor, got: Tensor, stage: VaeStage) -> Tensor:
    """Weighted errors of pixels and of horizontal and vertical differences; [B, 3, S, S] each."""
    error = got - wanted
    loss = stage.squared * error.pow(2).mean() + stage.absolute * error.abs().mean()
    for axis in (2, 3):
        loss = loss + stage.differences * error.diff(dim=axis).abs().mean()
    return loss


def kl_term(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL of the posterior from the unit normal, per latent number."""
    return 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).mean()


def loss_function(module: AutoEncoder, sprites: Sprites, stage: VaeStage, dtype: torch.dtype) -> LossFunction:
    """The loss of the batch that begins at a sample number."""

    def loss_of(done: int) -> Tensor:
        indices = range(done, done + stage.recipe.batch)
        pixels = to_tensor([training_picture(sprites, stage, i) for i in indices])
        mean, log_variance = module.encoder(pixels.to(dtype)).float().chunk(2, dim=1)
        log_variance = log_variance.clamp(-20, 5)
        noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(stage.recipe.seed + done))
        latent = mean + (log_variance / 2).exp() * noise
        got = module.decoder(latent.to(dtype)).float()
        loss = reconstruction_loss(pixels, got, stage)
        return loss + stage.kl * kl_term(mean, log_variance)

    return loss_of


def new_autoencoder(stage: VaeStage) -> AutoEncoder:
    """The network with its first weights."""
    module = AutoEncoder(stage.config)
    initialise(module, torch.Generator().manual_seed(stage.recipe.seed), zero=("conv2", "proj_out"))
    return module


def train(
    sprites: Sprites, stage: VaeStage, folder: Path, *, dtype: torch.dtype = torch.bfloat16
) -> AutoEncoder:
    """Run the stage to its end from wherever its folder is, and write `folded.pt`, sheets and PSNR."""
    module = new_autoencoder(stage)

    def report(training: Training) -> None:
        loss_curve(folder / "loss.png", *zip(*training.log, strict=True), title="VAE")
        with training.averaged():
            numbers = evaluate(module, sprites, side=stage.side, count=64, sheet=folder / "sheet.png")
        with (folder / "psnr.jsonl").open("a") as file:
            file.write(json.dumps({"done": training.done, "psnr": numbers}) + "\n")

    loss_of = loss_function(module, sprites, stage, dtype)
    return trained(module, stage.recipe, folder, lambda: nullcontext(loss_of), report)


@torch.no_grad()
def evaluate(module: AutoEncoder, sprites: Sprites, *, side: int, count: int, sheet: Path | None) -> float:
    """Mean PSNR in dB over held-out scenes (held-out subjects, all styles), decoded from the mean latent."""
    scenes = [held_out_scene(sprites.world, VALIDATION_SEED, i) for i in range(count)]
    pictures = [compose(scene, sprites, side=side) for scene in scenes]
    images = torch.from_numpy(np.stack(pictures))
    decoded = decode(module, encode(module, images))
    error = ((decoded - images) ** 2).mean(dim=(1, 2, 3))
    if sheet is not None:
        pairs = [p for pair in zip(pictures, decoded.numpy(), strict=True) for p in pair]
        contact_sheet(sheet, pairs[:64], columns=16)
    return round(float((-10 * error.clamp_min(1e-10).log10()).mean()), 3)


@torch.no_grad()
def encode(module: AutoEncoder, images: Tensor, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """[B, S, S, 3] in 0..1 -> mean latents [B, 16, S/8, S/8] float32, the whole batch at once."""
    pixels = images.permute(0, 3, 1, 2).contiguous() * 2 - 1
    device = module.encoder.conv_in.weight.device
    mean: Tensor = module.encoder(pixels.to(device, dtype)).chunk(2, dim=1)[0]
    return mean.float().to(images.device)


@torch.no_grad()
def decode(module: AutoEncoder, latents: Tensor) -> Tensor:
    """Latents [B, 16, h, w] -> pictures [B, 8h, 8w, 3] in 0..1, the whole batch at once."""
    pixels = module.decoder(latents.to(module.decoder.conv_in.weight.device)).to(latents.device)
    return ((pixels + 1) / 2).clamp(0, 1).permute(0, 2, 3, 1).contiguous()


@torch.no_grad()
def folded(module: AutoEncoder, latents: Tensor) -> AutoEncoder:
    """A copy whose latents have, per channel, the statistics that FLUX's scale and shift expect.

    The last encoder and the first decoder convolution take up the change: z' = a z + b with a and b such
    that (z' - shift) * scale has mean 0 and deviation 1. Pictures stay what they were, but for the
    decoder's padding, which sees b where it saw 0; `conv_in` pads with zeros, so a narrow rim may change.

    Args:
        module: the trained autoencoder.
        latents: [N, 16, h, w] mean latents of many training pictures.
    """
    form, result = LatentFormat(), copy.deepcopy(module)
    mean, deviation = latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3))
    a = 1 / (form.scale * deviation)
    b = form.shift - a * mean
    last, first = result.encoder.conv_out, result.decoder.conv_in
    channels = len(a)
    last.weight[:channels] *= a[:, None, None, None]
    last.bias[:channels] = last.bias[:channels] * a + b
    last.bias[channels:] += 2 * a.log()
    first.bias.sub_(torch.einsum("oikl,i->o", first.weight, b / a))
    first.weight.div_(a[None, :, None, None])
    return result

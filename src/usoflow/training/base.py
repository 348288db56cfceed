"""Stages `base`, `large` and `guided`: train the pocket text encoders and transformer on cached latents.

`base`: flow matching (arXiv:2210.02747) as FLUX does it: x_s = (1 - s) x + s n, target n - x, s from a
logit-normal (arXiv:2403.03206); captions are dropped for some samples; both encoders learn with the
transformer. The guidance embedding is fed the constant `GUIDANCE` and means nothing yet.

`large`: the same with larger pictures, for which every subject has more tokens.

`guided`: guidance distillation (arXiv:2210.03142): the frozen base, asked with and without the caption, gives
u + g (c - u), which the student must answer in one evaluation when g is its guidance. As with FLUX.1 [dev],
pictures are then made with cfg 1.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from usoflow.models.clip import ClipText, ClipTextConfig
from usoflow.models.flux import Flux, FluxInputs
from usoflow.models.flux_config import FluxConfig
from usoflow.models.t5 import T5Config, T5Encoder
from usoflow.training.captions import CaptionTokenizer, Ids, Vocabulary, end_positions, silenced
from usoflow.training.initial import initialise
from usoflow.training.latents import LatentSet
from usoflow.training.loop import LossFunction, Recipe

GUIDANCE = 3.5  # FLUX's default: what a graph without FluxGuidance asks for
PREFIXES: Mapping[str, str] = {
    "flux": "model.diffusion_model.",
    "t5": "text_encoders.t5xxl.transformer.",
    "clip": "text_encoders.clip_l.transformer.",
}
METHOD = "uxo"  # where reference tokens lie: USO's
MANY = 16  # samples of a batch for which compiling is worth its time
ZERO = ("_mod.lin", "modulation.lin", "adaLN_modulation.1", "final_layer.linear")


@dataclass(frozen=True, slots=True)
class BaseStage:
    """What the `base` section of a training file says.

    Attributes:
        recipe: length and speed of flow matching.
        large: the same, of its continuation with larger pictures.
        guided: length and speed of guidance distillation.
        side: of the pictures of `base`.
        large_side: of the pictures of `large` and of everything after it.
        cached, large_cached: number of scenes whose latents are cached at each size.
        hidden, double, single: width and depth of the transformer.
        text_dim, text_layers: width and depth of T5.
        clip_dim, clip_layers: width and depth of CLIP-L.
        t5_length: T5's declared minimum length.
        clip_length: CLIP's number of positions.
        dropped: chance that a sample's caption is empty.
        noise_mean, noise_deviation: of the logit of the noise level.
        guidance_most: guidance strengths from 1 to this are distilled.
    """

    recipe: Recipe
    large: Recipe
    guided: Recipe
    side: int = 64
    large_side: int = 128
    cached: int = 48_000
    large_cached: int = 32_000
    hidden: int = 256
    double: int = 2
    single: int = 4
    text_dim: int = 64
    text_layers: int = 2
    clip_dim: int = 48
    clip_layers: int = 1
    t5_length: int = 24
    clip_length: int = 32
    dropped: float = 0.1
    noise_mean: float = 0.4
    noise_deviation: float = 1.2
    guidance_most: float = 5.0

    def __post_init__(self) -> None:
        """Raises ValueError for sizes that the architecture does not have."""
        sixteens = (self.side, self.large_side, self.text_dim, self.clip_dim)
        if any(size % 16 for size in sixteens) or self.hidden % 64:
            raise ValueError(
                "sides, text_dim and clip_dim must be multiples of 16, hidden one of 64 (the size of a head)"
            )
        if min(self.side, self.large_side, self.hidden, self.cached, self.large_cached) < 1:
            raise ValueError("sides, hidden, cached and large_cached must be at least 1")
        if not 0 <= self.dropped <= 1 or self.noise_deviation <= 0 or self.guidance_most < 1:
            raise ValueError("dropped is a share, noise_deviation above 0 and guidance_most at least 1")

    @property
    def tokenizer(self) -> CaptionTokenizer:
        return CaptionTokenizer(self.t5_length, self.clip_length)

    @property
    def flux(self) -> FluxConfig:
        return FluxConfig(
            hidden=self.hidden,
            text_dim=self.text_dim,
            pooled_dim=self.clip_dim,
            mlp_dim=4 * self.hidden,
            channels=16,
            double_blocks=self.double,
            single_blocks=self.single,
            guidance=True,
            head_dim=64,
            axes=(8, 28, 28),
        )

    def t5(self, vocabulary: int) -> T5Config:
        return T5Config(
            dim=self.text_dim,
            inner_dim=self.text_dim,
            mlp_dim=2 * self.text_dim,
            layers=self.text_layers,
            heads=self.text_dim // 16,
            min_length=self.t5_length,
            vocabulary=vocabulary,
        )

    def clip(self, vocabulary: int) -> ClipTextConfig:
        return ClipTextConfig(
            dim=self.clip_dim,
            mlp_dim=2 * self.clip_dim,
            layers=self.clip_layers,
            positions=self.clip_length,
            heads=self.clip_dim // 16,
            vocabulary=vocabulary,
        )


class Base(ABC):
    """A transformer with its text encoders, as training asks it: the pocket, or FLUX.1 (`full_size`)."""

    flux: Flux
    stage: BaseStage

    @abstractmethod
    def encode(self, t5_ids: Ids, clip_ids: Ids) -> tuple[Tensor, Tensor]:
        """Official ids -> context [B, T, text_dim] and pooled [B, clip_dim]."""

    @abstractmethod
    def step(self, x: Tensor, sigma: Tensor, inputs: FluxInputs) -> Tensor:
        """The transformer's answer to prepared inputs."""

    def velocity(
        self,
        x: Tensor,
        sigma: Tensor,
        text: tuple[Tensor, Tensor],
        *,
        guidance: float,
        dtype: torch.dtype,
        references: Sequence[Tensor] = (),
        method: str = METHOD,
        style: Tensor | None = None,
    ) -> Tensor:
        """The transformer's answer, [B, 16, h, w], where `x` is; it computes where the text is.

        References, their method and style as `Flux.prepare` takes them.
        """
        device = text[0].device
        inputs = self.flux.prepare(
            *text, (x.shape[-2], x.shape[-1]), batch=len(x), guidance=guidance,
            references=[latent.to(device) for latent in references], method=method,
            style=None if style is None else style.to(device), dtype=dtype,
        )  # fmt: skip
        return self.step(x.to(device), sigma.to(device), inputs).to(x.device)


class Pocket(nn.Module, Base):
    """Both text encoders, with small vocabularies, and the transformer.

    Args:
        stage: the sizes.
        t5_words, clip_words: the token rows that occur.
    """

    def __init__(self, stage: BaseStage, t5_words: Vocabulary, clip_words: Vocabulary) -> None:
        super().__init__()
        self.stage, self.t5_words, self.clip_words = stage, t5_words, clip_words
        self.flux = Flux(stage.flux)
        self.t5 = T5Encoder(stage.t5(len(t5_words.rows)))
        self.clip = ClipText(stage.clip(len(clip_words.rows)))
        self._step_of_many: Callable[..., Tensor] = self.flux.forward
        generator = torch.Generator().manual_seed(stage.recipe.seed)
        initialise(self, generator, zero=ZERO)

    def compiled(self) -> Pocket:
        """Compute the transformer's steps compiled, about twice as fast on a CPU; the same weights.

        Only for batches of training: each size is compiled for itself, which takes a minute.
        """
        self._step_of_many = torch.compile(self.flux.forward, dynamic=False)
        return self

    def encode(self, t5_ids: Ids, clip_ids: Ids) -> tuple[Tensor, Tensor]:
        device = self.t5.shared.weight.device
        context = self.t5(self.t5_words.compact(t5_ids).to(device))
        ends = end_positions(clip_ids).to(device)
        return context, self.clip(self.clip_words.compact(clip_ids).to(device), ends)

    def encode_texts(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """Captions -> what `encode` gives."""
        return self.encode(*self.stage.tokenizer(texts))

    def step(self, x: Tensor, sigma: Tensor, inputs: FluxInputs) -> Tensor:
        """The transformer's answer to prepared inputs; compiled, if it was asked for, for many samples."""
        step = self._step_of_many if len(x) >= MANY else self.flux.forward
        with short_attention() if x.device.type == "cpu" else contextlib.nullcontext():
            return step(x, sigma, inputs)


@contextlib.contextmanager
def short_attention() -> Iterator[None]:
    """Attention as plain products in the inputs' dtype: for a few dozen tokens on a CPU the quickest.

    The fused kernels are slower at these lengths, and the plain one would compute bf16 in fp32.
    """
    before = torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(before)


@dataclass(frozen=True)
class Batches:
    """Batches of latents and ids by sample number, with captions dropped at random."""

    latents: LatentSet
    t5_ids: Ids
    clip_ids: Ids
    empty: tuple[Ids, Ids]
    dropped: float

    @classmethod
    def of(cls, latents: LatentSet, stage: BaseStage) -> Batches:
        """Tokenise the captions of a latent set."""
        return cls(latents, *latents.ids(stage.tokenizer), stage.tokenizer([""]), stage.dropped)

    def vocabularies(self) -> tuple[Vocabulary, Vocabulary]:
        """The rows that occur for T5 and CLIP."""
        pairs = zip((self.t5_ids, self.clip_ids), self.empty, strict=True)
        t5, clip = (Vocabulary.of(np.concatenate(pair)) for pair in pairs)
        return t5, clip

    def get(self, done: int, count: int) -> tuple[Tensor, Ids, Ids]:
        """Latents [B, 16, h, w], T5 ids [B, T], CLIP ids [B, T]."""
        indices = self.latents.indices(done, count)
        drop = np.random.default_rng((self.latents.seed, done, 1)).random(count) < self.dropped
        t5, clip = silenced((self.t5_ids[indices], self.clip_ids[indices]), self.empty, drop)
        return self.latents.batch(indices), t5, clip


def random_numbers(device: torch.device, seed: int, done: int) -> torch.Generator:
    """Those of the batch that begins at sample `done`.

    Hashed to 32 bits: of a larger number torch's generator for the CPU looks at no more than these.
    """
    (hashed,) = np.random.SeedSequence((seed, done)).generate_state(1)
    return torch.Generator(device).manual_seed(int(hashed))


def noised(x: Tensor, stage: BaseStage, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Draw noise levels and noise: (sigma [B], x_s, noise)."""
    logit = torch.randn(len(x), generator=generator, device=x.device)
    sigma = torch.sigmoid(logit * stage.noise_deviation + stage.noise_mean)
    noise = torch.randn(x.shape, generator=generator, device=x.device)
    part = sigma[:, None, None, None]
    return sigma, (1 - part) * x + part * noise, noise


def at_rest(straight: Tensor, got: Tensor, away: Tensor, strength: float) -> Tensor:
    """The target that teaches an answer guidance, as model guidance does (arXiv 2502.12154).

    With `straight` the velocity v, `got` the answer and `away` an unconditional answer u, the answer to
    v + (1 - 1/s) (got - u) comes to rest at u + s (E[v] - u): guidance of strength s, without a teacher.
    """
    return straight + (1 - 1 / strength) * (got - away)


def flow_loss(pocket: Pocket, recipe: Recipe, batches: Batches, *, dtype: torch.dtype) -> LossFunction:
    """Flow matching: squared error of the velocity n - x."""
    stage = pocket.stage

    def loss_of(done: int) -> Tensor:
        x, t5_ids, clip_ids = batches.get(done, recipe.batch)
        sigma, x_s, noise = noised(x, stage, random_numbers(x.device, recipe.seed, done))
        text = pocket.encode(t5_ids, clip_ids)
        got = pocket.velocity(x_s, sigma, text, guidance=GUIDANCE, dtype=dtype)
        return (got.float() - (noise - x)).pow(2).mean()

    return loss_of


def guided_loss(pocket: Pocket, teacher: Pocket, batches: Batches, *, dtype: torch.dtype) -> LossFunction:
    """Guidance distillation: squared error to the teacher's guided velocity, one strength per batch."""
    stage = pocket.stage

    def loss_of(done: int) -> Tensor:
        x, t5_ids, clip_ids = batches.get(done, stage.guided.batch)
        generator = random_numbers(x.device, stage.guided.seed, done)
        sigma, x_s, _ = noised(x, stage, generator)
        guidance = 1 + (stage.guidance_most - 1) * float(torch.rand((), generator=generator, device=x.device))
        with torch.no_grad():
            told, blank = teacher.encode(t5_ids, clip_ids), teacher.encode(*batches.empty)
            c = teacher.velocity(x_s, sigma, told, guidance=GUIDANCE, dtype=dtype).float()
            u = teacher.velocity(x_s, sigma, blank, guidance=GUIDANCE, dtype=dtype).float()
        got = pocket.velocity(x_s, sigma, pocket.encode(t5_ids, clip_ids), guidance=guidance, dtype=dtype)
        return (got.float() - (u + guidance * (c - u))).pow(2).mean()

    return loss_of

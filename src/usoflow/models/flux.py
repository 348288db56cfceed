"""The FLUX.1 transformer: latent, text, references and style in; velocity out.

Architecture: black-forest-labs/flux, src/flux/model.py and modules/layers.py (Apache-2.0), whose parameter
names are the file's key names. What of a run does not change from step to step (projected text, style and
reference tokens, guidance, rotary tables) is computed once by `Flux.prepare`; `Flux.forward` is one step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from usoflow.models.embeddings import (
    TIME_DIM,
    Rope,
    patchify,
    rotary_table,
    rotate,
    timestep_embedding,
    unpatchify,
)
from usoflow.models.flux_config import PATCH, FluxConfig
from usoflow.models.kernels import attention
from usoflow.models.references import DEFAULT_METHOD, position_ids
from usoflow.models.weights import LayerNorm, Linear, RMSNorm

NORM_EPS = 1e-6
FP16_MAX = torch.finfo(torch.float16).max
TOKENS_AT_ONCE = 64  # of a batch, whose queries and keys are turned at once: 1.5 MB in fp32 at full width


@dataclass(frozen=True, slots=True)
class FluxInputs:
    """What of a run does not change from step to step.

    Attributes:
        text: [B, T, hidden] projected text tokens, style tokens before them.
        vector: [B, hidden] embedding of pooled text and guidance.
        references: [B, R, hidden] embedded reference tokens, or None.
        rope: rotary tables of text, image and reference tokens, in this order.
    """

    text: Tensor
    vector: Tensor
    references: Tensor | None
    rope: Rope


class Flux(nn.Module):
    """FLUX.1, by its published parameter names."""

    def __init__(self, config: FluxConfig) -> None:
        super().__init__()
        self.config = config
        hidden, patch_dim = config.hidden, config.channels * PATCH**2
        self.img_in = Linear(patch_dim, hidden)
        self.time_in = Embedder(TIME_DIM, hidden)
        self.vector_in = Embedder(config.pooled_dim, hidden)
        self.guidance_in = Embedder(TIME_DIM, hidden) if config.guidance else None
        self.txt_in = Linear(config.text_dim, hidden)
        self.double_blocks = nn.ModuleList(DoubleBlock(config) for _ in range(config.double_blocks))
        self.single_blocks = nn.ModuleList(SingleBlock(config) for _ in range(config.single_blocks))
        self.final_layer = FinalLayer(hidden, patch_dim)

    @property
    def blocks(self) -> list[Block]:
        """All blocks, in the order in which they are passed."""
        return cast(list[Block], [*self.double_blocks, *self.single_blocks])

    def prepare(
        self,
        text: Tensor,
        pooled: Tensor,
        size: tuple[int, int],
        *,
        batch: int = 1,
        guidance: float | None = 3.5,
        references: Sequence[Tensor] = (),
        method: str = DEFAULT_METHOD,
        style: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> FluxInputs:
        """Everything that the steps of a run share.

        Args:
            text: [B or 1, T, text_dim] T5 hidden states.
            pooled: [B or 1, pooled_dim] CLIP's pooled state.
            size: height and width of the latent to be denoised.
            batch: number of latents denoised together.
            guidance: embedded guidance strength; None adds no guidance embedding at all.
            references: latents [B or 1, C, h, w], already in the model's scale.
            method: where reference tokens lie, see `references.position_ids`.
            style: [B or 1, S, hidden] style tokens; they precede the text and share its position.
            dtype: in which the transformer computes.
        """
        tokens = self.txt_in(text.to(dtype))  # [B, T, hidden]
        if style is not None:
            style = _repeat(style.to(tokens), len(tokens))  # it may come from elsewhere
            tokens = torch.cat([style, _repeat(tokens, len(style))], dim=1)
        vector = self.vector_in(pooled.to(dtype))
        if self.guidance_in is not None and guidance is not None:
            strength = torch.tensor([guidance], device=pooled.device, dtype=torch.float32)
            vector = vector + self.guidance_in(timestep_embedding(strength).to(dtype))
        embedded = [_repeat(self.img_in(patchify(latent.to(dtype))), batch) for latent in references]
        sizes = [(latent.shape[-2], latent.shape[-1]) for latent in references]
        ids = position_ids(size, sizes, method)
        ids = torch.cat([ids.new_zeros(tokens.shape[1], 3), ids])  # [T + I + R, 3]
        cos, sin = rotary_table(ids, self.config.axes, self.config.theta)
        return FluxInputs(
            text=_repeat(tokens, batch),
            vector=_repeat(vector, batch),
            references=torch.cat(embedded, dim=1) if embedded else None,
            rope=(cos.to(text.device), sin.to(text.device)),
        )

    def forward(self, latent: Tensor, sigma: Tensor, inputs: FluxInputs) -> Tensor:
        """One step: the velocity at `latent`.

        Args:
            latent: [B, C, H, W].
            sigma: [] or [B], noise level from 0 (picture) to 1 (noise).
            inputs: of `prepare`, for this batch and size.

        Returns:
            [B, C, H, W] in the dtype of the latent.
        """
        dtype = inputs.text.dtype
        time = timestep_embedding(sigma.float().reshape(-1)).to(dtype)
        vector = F.silu(self.time_in(time) + inputs.vector)  # every modulation begins with it
        image = self.img_in(patchify(latent.to(dtype)))  # [B, I, hidden]
        count = image.shape[1]
        if inputs.references is not None:
            image = torch.cat([image, inputs.references], dim=1)
        text = inputs.text
        for block in self.double_blocks:
            text, image = block(text, image, vector, inputs.rope)
        tokens = torch.cat([text, image], dim=1)  # [B, T + I + R, hidden]
        for block in self.single_blocks:
            tokens = block(tokens, vector, inputs.rope)
        image = tokens[:, text.shape[1] : text.shape[1] + count]
        return unpatchify(self.final_layer(image, vector), latent.shape).to(latent.dtype)


class Embedder(nn.Module):
    """Two linear layers around a SiLU: timestep, guidance and pooled text to the modulation vector."""

    def __init__(self, in_dim: int, hidden: int) -> None:
        super().__init__()
        self.in_layer = Linear(in_dim, hidden)
        self.out_layer = Linear(hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, in_dim] -> [B, hidden]."""
        out: Tensor = self.out_layer(F.silu(self.in_layer(x)))
        return out


class Modulation(nn.Module):
    """Shift, scale and gate for each of a block's sublayers, from the conditioning vector."""

    def __init__(self, hidden: int, sublayers: int) -> None:
        super().__init__()
        self.lin = Linear(hidden, 3 * sublayers * hidden)
        self.sublayers = sublayers

    def forward(self, vector: Tensor) -> tuple[Tensor, ...]:
        """vector: [B, hidden], after SiLU -> 3 * sublayers tensors [B, 1, hidden]."""
        return tuple(self.lin(vector)[:, None].chunk(3 * self.sublayers, dim=-1))


class QKNorm(nn.Module):
    """RMS norm of queries and keys, per head, then their rotation."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.query_norm = RMSNorm(dim, NORM_EPS, name="scale")
        self.key_norm = RMSNorm(dim, NORM_EPS, name="scale")

    def forward(
        self, qkv: Tensor, heads: int, rope: Rope, *, exact: bool = True
    ) -> tuple[Tensor, Tensor, Tensor]:
        """qkv: [B, L, 3 * heads * D] -> q, k, v: each [B, L, heads, D]; q, k in fp32 on a CPU if `exact`."""
        parts = qkv.view(*qkv.shape[:2], 3, heads, -1)
        if qkv.device.type == "cpu" and not torch.compiler.is_compiling():
            q, k = self._on_cpu(parts[:, :, :2], rope, torch.float32 if exact else qkv.dtype)
        else:
            q, k = rotate(self.query_norm(parts[:, :, 0]), rope), rotate(self.key_norm(parts[:, :, 1]), rope)
        return q, k, parts[:, :, 2]

    def _on_cpu(self, x: Tensor, rope: Rope, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The same for q and k together, [B, L, 2, heads, D], in fp32 until the end and in the cache.

        The results lie head by head, as attention reads them.
        """
        scales = torch.stack([scale.float() for scale in self.parameters()])[:, None]  # [2, 1, D]
        batch, length, _, heads, dim = x.shape
        at_once = length if torch.is_grad_enabled() else max(1, TOKENS_AT_ONCE // batch)
        out = x.new_empty(2, batch, heads, length, dim, dtype=dtype)
        for first in range(0, length, at_once):
            some = slice(first, first + at_once)
            wide = x[:, some].float()
            power = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square() / dim
            turned = rotate(wide * (power + NORM_EPS).rsqrt() * scales, (rope[0][some], rope[1][some]))
            out[:, :, :, some] = turned.permute(2, 0, 3, 1, 4)
        q, k = out.transpose(2, 3)
        return q, k


class StreamAttention(nn.Module):
    """One stream's half of a double block's joint attention: its q, k, v and its output projection."""

    def __init__(self, config: FluxConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = Linear(config.hidden, 3 * config.hidden)
        self.norm = QKNorm(config.head_dim)
        self.proj = Linear(config.hidden, config.hidden)

    def forward(self, x: Tensor, rope: Rope) -> tuple[Tensor, Tensor, Tensor]:
        """x: [B, L, hidden] -> normalised and turned q and k, and v: each [B, L, heads, head_dim]."""
        return self.norm(self.qkv(x), self.heads, rope, exact=not self.qkv.in_int8)


class Block(nn.Module):
    """A block: `compute`, or the `way` that is set in its place (`regions`). Hooks are around either."""

    def __init__(self) -> None:
        super().__init__()
        self.way: Callable[..., Any] | None = None

    def forward(self, *inputs: Any) -> Any:
        """The inputs of `compute`."""
        return self.compute(*inputs) if self.way is None else self.way(self, *inputs)

    def compute(self, *inputs: Any) -> Any:
        """What the block does."""
        raise NotImplementedError


class DoubleBlock(Block):
    """Text and image keep their own weights and attend to each other."""

    def __init__(self, config: FluxConfig) -> None:
        super().__init__()
        self.norm = LayerNorm(config.hidden, NORM_EPS, affine=False)
        self.img_mod, self.txt_mod = Modulation(config.hidden, 2), Modulation(config.hidden, 2)
        self.img_attn, self.txt_attn = StreamAttention(config), StreamAttention(config)
        self.img_mlp, self.txt_mlp = Mlp(config), Mlp(config)

    def compute(self, text: Tensor, image: Tensor, vector: Tensor, rope: Rope) -> tuple[Tensor, Tensor]:
        """text: [B, T, hidden], image: [B, I, hidden] -> the same."""
        text_mod, image_mod = self.txt_mod(vector), self.img_mod(vector)
        lengths = [text.shape[1], image.shape[1]]
        text_rope, image_rope = zip(*(table.split(lengths) for table in rope), strict=True)
        text_qkv = self.txt_attn(modulate(self.norm(text), *text_mod[:2]), text_rope)
        image_qkv = self.img_attn(modulate(self.norm(image), *image_mod[:2]), image_rope)
        text_part, image_part = attention(text_qkv, image_qkv).split(lengths, dim=1)
        text = self._finish(text, self.txt_attn.proj(text_part), text_mod, self.txt_mlp)
        image = self._finish(image, self.img_attn.proj(image_part), image_mod, self.img_mlp)
        return text, image

    def _finish(self, x: Tensor, attended: Tensor, mod: tuple[Tensor, ...], mlp: nn.Module) -> Tensor:
        """Gated residuals: the attention's, then the MLP's."""
        x = torch.addcmul(x, mod[2], attended)
        return _bounded(torch.addcmul(x, mod[5], mlp(modulate(self.norm(x), *mod[3:5]))))


class Mlp(nn.ModuleDict):
    """Two linear layers around a GELU; the file numbers them 0 and 2."""

    def __init__(self, config: FluxConfig) -> None:
        up, down = Linear(config.hidden, config.mlp_dim), Linear(config.mlp_dim, config.hidden)
        super().__init__({"0": up, "2": down})

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, L, hidden] -> the same."""
        return self["2"](self["0"](x, gelu=True))


class SingleBlock(Block):
    """Attention and MLP in parallel on all tokens, sharing their two linear layers."""

    def __init__(self, config: FluxConfig) -> None:
        super().__init__()
        self.heads, self.hidden = config.heads, config.hidden
        self.norm_in = LayerNorm(config.hidden, NORM_EPS, affine=False)
        self.linear1 = Linear(config.hidden, 3 * config.hidden + config.mlp_dim)
        self.linear2 = Linear(config.hidden + config.mlp_dim, config.hidden)
        self.norm = QKNorm(config.head_dim)
        self.modulation = Modulation(config.hidden, 1)

    def compute(self, x: Tensor, vector: Tensor, rope: Rope) -> Tensor:
        """x: [B, L, hidden] -> the same."""
        shift, scale, gate = self.modulation(vector)
        projected = self.linear1(modulate(self.norm_in(x), shift, scale))
        qkv, mlp = projected.split([3 * self.hidden, projected.shape[-1] - 3 * self.hidden], dim=-1)
        attended = attention(self.norm(qkv, self.heads, rope, exact=not self.linear1.in_int8))
        joined = torch.cat([attended, F.gelu(mlp, approximate="tanh")], dim=-1)
        return _bounded(torch.addcmul(x, gate, self.linear2(joined)))


def _bounded(x: Tensor) -> Tensor:
    """Within the range of fp16, which FLUX.1's residual streams leave (as diffusers clips them, #9097)."""
    return x.clip(-FP16_MAX, FP16_MAX) if x.dtype == torch.float16 else x


class FinalLayer(nn.Module):
    """Modulated norm and projection of the image tokens to patches."""

    def __init__(self, hidden: int, patch_dim: int) -> None:
        super().__init__()
        self.norm_final = LayerNorm(hidden, NORM_EPS, affine=False)
        self.linear = Linear(hidden, patch_dim)
        self.adaLN_modulation = nn.Sequential(
            nn.Identity(), Linear(hidden, 2 * hidden)
        )  # its SiLU is `Flux.forward`'s

    def forward(self, x: Tensor, vector: Tensor) -> Tensor:
        """x: [B, I, hidden] -> [B, I, patch_dim]."""
        shift, scale = self.adaLN_modulation(vector)[:, None].chunk(2, dim=-1)
        out: Tensor = self.linear(modulate(self.norm_final(x), shift, scale))
        return out


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x * (1 + scale) + shift: adaptive layer norm of DiT (arXiv 2212.09748)."""
    return torch.addcmul(shift, x, 1 + scale)


def _repeat(x: Tensor, batch: int) -> Tensor:
    """A batch of one as a batch of many; another batch as it is."""
    return x.expand(batch, *x.shape[1:]) if x.shape[0] == 1 else x

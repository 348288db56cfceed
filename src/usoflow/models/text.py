"""A prompt to what the transformer is given of it: T5's states, and CLIP-L's pooled vector.

Token ids and weights come from `tokens`; the encoders are in `t5` and `clip`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from usoflow.models.clip import ClipText
from usoflow.models.finite import require_finite
from usoflow.models.t5 import T5Encoder
from usoflow.models.tokens import CLIP_END, T5_END, T5_PAD, Tokenizers, TokenSequence


@dataclass(frozen=True, slots=True, eq=False)
class TextEncoding:
    """An encoded prompt.

    Attributes:
        context: float32 [1, T, t5 width], T >= 256 with official weights; padding is part of it.
        pooled: float32 [1, clip width].
    """

    context: Tensor
    pooled: Tensor


def encode_prompt(
    text: str, clip: ClipText, t5: T5Encoder, tokenizers: Tokenizers, *, clip_text: str | None = None
) -> TextEncoding:
    """Encode a prompt with ComfyUI's weight syntax.

    Weights act on the T5 states: z' = (z - z_empty) * w + z_empty per token, where z_empty are the states of
    an empty prompt of the same length. They do not act on the pooled vector, which is that of the first 77
    CLIP tokens. CLIP gets `clip_text`, if that is given.

    Returns:
        The encoding, on the CPU.

    Raises:
        UsoflowError: `non_finite`.
    """
    context = _context(tokenizers.t5(text), t5)
    pooled = _pooled(tokenizers.clip(text if clip_text is None else clip_text)[0], clip)
    return TextEncoding(
        require_finite(context, "The T5 text encoder").cpu(),
        require_finite(pooled, "The CLIP-L text encoder").cpu(),
    )


def _context(sequence: TokenSequence, t5: T5Encoder) -> Tensor:
    device = t5.shared.weight.device
    ids = torch.tensor([sequence.ids], device=device)  # [1, T]
    if not sequence.weighted:
        return t5(ids)
    empty_ids = torch.full_like(ids, T5_PAD)
    empty_ids[:, 0] = T5_END
    states, empty = t5(torch.cat([ids, empty_ids])).chunk(2)  # [1, T, D] each
    weights = torch.tensor(sequence.weights, dtype=torch.float32, device=device)[:, None]  # [T, 1]
    return (states - empty) * weights + empty


def _pooled(sequence: TokenSequence, clip: ClipText) -> Tensor:
    end = sequence.ids.index(CLIP_END)
    device = clip.text_model.embeddings.token_embedding.weight.device
    ids = torch.tensor([sequence.ids[: end + 1]], device=device)  # no token sees what comes after it
    return clip(ids, torch.tensor([end], device=device))

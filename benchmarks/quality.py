"""How far two pictures are apart."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from PIL.Image import Image
from torch import Tensor

WINDOW, SPREAD = 11, 1.5  # of SSIM, as published
K1, K2 = 0.01, 0.03


def psnr(a: Image, b: Image) -> float:
    """Peak signal to noise ratio of 8-bit pictures, in dB; infinite where they are equal."""
    error = float((_pixels(a) - _pixels(b)).square().mean())
    return math.inf if error == 0 else -10 * math.log10(error)


def ssim(a: Image, b: Image) -> float:
    """Structural similarity (Wang et al. 2004) with a Gaussian window, mean over channels; 1 is equal."""
    x, y = _pixels(a), _pixels(b)
    mean_x, mean_y = _blurred(x), _blurred(y)
    var_x, var_y = _blurred(x * x) - mean_x**2, _blurred(y * y) - mean_y**2
    covariance = _blurred(x * y) - mean_x * mean_y
    c1, c2 = K1**2, K2**2
    numerator = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    return float((numerator / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))).mean())


def _pixels(picture: Image) -> Tensor:
    """float64 [3, 1, H, W] in 0..1."""
    array = np.asarray(picture.convert("RGB"), dtype=np.float64) / 255
    return torch.from_numpy(array).permute(2, 0, 1)[:, None]


def _blurred(x: Tensor) -> Tensor:
    places = torch.arange(WINDOW, dtype=torch.float64) - WINDOW // 2
    line = torch.exp(-(places**2) / (2 * SPREAD**2))
    line = line / line.sum()
    return F.conv2d(x, torch.outer(line, line)[None, None])

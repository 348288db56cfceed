"""usoflow: ByteDance USO on FLUX.1, natively. Importing the package imports no torch."""

from __future__ import annotations

__version__ = "0.1.0"

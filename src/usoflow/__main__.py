"""`python -m usoflow` is `usoflow`."""

from __future__ import annotations

from usoflow.cli.main import main

main()

"""The four variations of the official USO template on a photo, with small models of the true layout.

Run by `make demo`. Each variation is one `usoflow run`, printed so that it can be repeated by hand.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

HERE = Path(os.path.relpath(Path(__file__).parent))  # so that the printed commands are short
OUT = Path("out") / "demo"
SIZE = 256

PHOTO, STYLE = HERE / "astronaut.jpg", HERE / "stained_glass.png"
# What each workflow needs beside the file: pictures by LoadImage node, and the latent node whose size is set.
VARIATIONS: dict[str, tuple[dict[str, Path], str]] = {
    "text": ({}, "EmptyLatentImage"),
    "subject": ({"47": PHOTO}, "EmptySD3LatentImage"),
    "style": ({"88": STYLE, "91": STYLE}, "EmptyLatentImage"),
    "both": ({"47": PHOTO, "112:46": STYLE, "112:53": STYLE}, "EmptySD3LatentImage"),
}


def main() -> None:
    models = OUT / "models"
    if not models.exists():
        from usoflow.pocket.untrained import write_untrained

        write_untrained(models)
    print(f"Small models with the official layout: {models} (untrained, so the pictures are noise:")
    print("they show that the official workflows run, not what USO can do).\n")
    for name, (pictures, latent) in VARIATIONS.items():
        arguments = ["run", str(HERE / f"{name}.json"), "--models", str(models), "--output", str(OUT)]
        arguments += [f"--set={latent}.{side}={SIZE}" for side in ("width", "height")]
        arguments += [f"--set=SaveImage.filename_prefix={name}"]
        arguments += [f"--image={node}={path}" for node, path in pictures.items()]
        run(name, arguments)
    print(f"\nThe pictures are in {OUT.resolve()}. Each carries its workflow: drag one into ComfyUI.")


def run(name: str, arguments: list[str]) -> None:
    """One variation: the command, then file, time and memory."""
    print(f"{name}\n  usoflow {shlex.join(arguments)}")
    done = subprocess.run(
        [sys.executable, "-m", "usoflow", *arguments, "--json"], capture_output=True, text=True, check=False
    )
    record = json.loads(done.stdout) if done.stdout else {"error": {"detail": done.stderr}}
    if "error" in record:
        sys.exit(f"  failed: {record['error']['detail']}")
    peak = max(node["peak_bytes"] for node in record["nodes"]) / 1e9
    steps = next(node["seconds"] for node in record["nodes"] if node["class_type"] == "KSampler")
    print(f"  {record['images'][0]}  {record['seconds']:.1f} s (sampling {steps:.1f} s), peak {peak:.2f} GB")


if __name__ == "__main__":
    main()

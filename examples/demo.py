"""What `make demo` runs: pictures by the pocket model, then the official template's variations on a photo.

The pocket model (`usoflow.pocket`) is small and trained; docs/pocket.md says what it can and cannot do. There
is no trained pocket USO yet: the four variations run on untrained models of the true layout and give noise.
They show that the official workflows run. Each command is printed, so that it can be repeated by hand.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import usoflow
from usoflow.api.sheet import contact_sheet

HERE = Path(os.path.relpath(Path(__file__).parent))  # so that the printed commands are short
OUT = Path("out") / "demo"
SIZE = 256
POCKET = Path(usoflow.__file__).parent / "pocket" / "models"
PROMPTS = (
    "a light bulb on a pink background, flat style",
    "a watermelon on a chessboard, flat style",
    "a sunflower in a meadow, flat style",
    "a rocket in the night sky, flat style",
    "a carrot on a wooden floor, flat style",
    "a pear in front of a brick wall, flat style",
    "a fox in a forest, emojione style",
    "a laptop in a city at night, flat style",
)

PHOTO, STYLE = HERE / "astronaut.jpg", HERE / "stained_glass.png"
# What each workflow needs beside the file: pictures by LoadImage node, and the latent node whose size is set.
VARIATIONS: dict[str, tuple[dict[str, Path], str]] = {
    "text": ({}, "EmptyLatentImage"),
    "subject": ({"47": PHOTO}, "EmptySD3LatentImage"),
    "style": ({"88": STYLE, "91": STYLE}, "EmptyLatentImage"),
    "both": ({"47": PHOTO, "112:46": STYLE, "112:53": STYLE}, "EmptySD3LatentImage"),
}


def main() -> None:
    pocket()
    variations()
    print(f"\nThe pictures are in {OUT.resolve()}. Each carries its workflow: drag one into ComfyUI.")


def pocket() -> None:
    """Text to image with the trained pocket model, all prompts on models that are loaded once."""
    workflow = usoflow.Workflow.load(HERE / "pocket.json")
    print(
        f"Text to image with the pocket model ({HERE / 'pocket.json'}, 128x128, 20 steps; docs/pocket.md says"
    )
    print("what it can and cannot do):")
    pictures = []
    with usoflow.Engine(models=POCKET, output=OUT) as engine:
        for prompt in PROMPTS:
            result = engine.run(workflow.set("text.text", prompt))
            print(f"  {result.paths[0]}  {result.seconds:.1f} s  {prompt}")
            pictures.append((prompt.rpartition(",")[0], result.images[0].resize((SIZE, SIZE))))
    contact_sheet(pictures, columns=4).save(OUT / "pocket.png")
    print(f"  all of them: {OUT / 'pocket.png'}\n")


def variations() -> None:
    """The official template, its groups switched for each use."""
    models = OUT / "models"
    if not models.exists():
        from usoflow.pocket.untrained import write_untrained

        write_untrained(models)
    print(f"The official template's four variations with untrained models ({models}), so they show noise:")
    for name, (pictures, latent) in VARIATIONS.items():
        arguments = ["run", str(HERE / f"{name}.json"), "--models", str(models), "--output", str(OUT)]
        arguments += [f"--set={latent}.{side}={SIZE}" for side in ("width", "height")]
        arguments += [f"--set=SaveImage.filename_prefix={name}"]
        arguments += [f"--image={node}={path}" for node, path in pictures.items()]
        run(name, arguments)


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

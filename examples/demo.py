"""What `make demo` runs: pictures by the pocket model, then the official template's variations.

The pocket models (`usoflow.pocket`) are small and trained; docs/pocket.md says what they can and cannot do.
Each command is printed, so that it can be repeated by hand.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from PIL import Image

import usoflow
from usoflow.api.sheet import contact_sheet
from usoflow.settings import POCKET_MODELS

HERE = Path(os.path.relpath(Path(__file__).parent))  # so that the printed commands are short
OUT = Path("out") / "demo"
SIZE = 256
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

SUBJECT, STYLES = HERE / "robot.png", (HERE / "pixels.png", HERE / "blueprint.png")
# For each variation its pictures by LoadImage node, and its prompt.
VARIATIONS: dict[str, tuple[dict[str, Path], str]] = {
    "text": ({}, "CLIPTextEncode.text=a rocket in the night sky, flat style"),
    "subject": ({"47": SUBJECT}, "CLIPTextEncode.text=a robot on the left in a forest"),
    "style": ({"88": STYLES[1], "91": STYLES[1]}, "CLIPTextEncode.text=a rocket in a meadow"),
    "both": (
        {"47": SUBJECT, "112:46": STYLES[0], "112:53": STYLES[0]},
        "CLIPTextEncode.text=a robot on a pink background",
    ),
    "two-styles": ({"88": STYLES[0], "91": STYLES[1]}, "CLIPTextEncode.text=a rocket in a meadow"),
}


def main() -> None:
    # Before torch is imported: beside another program its threads would mostly wait (docs/performance.md).
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    pocket()
    variations()
    print(f"\nThe pictures are in {OUT.resolve()}.")
    print("Each carries its workflow: drag one into the editor of `usoflow serve`.")


def pocket() -> None:
    """Text to image with the trained pocket model, all prompts on models that are loaded once."""
    workflow = usoflow.Workflow.load(HERE / "pocket.json")
    print(
        f"Text to image with the pocket model ({HERE / 'pocket.json'}, 128x128, 20 steps; docs/pocket.md says"
    )
    print("what it can and cannot do):")
    pictures = []
    with usoflow.Engine(models=POCKET_MODELS, output=OUT) as engine:
        for prompt in PROMPTS:
            result = engine.run(workflow.set("text.text", prompt))
            print(f"  {result.paths[0]}  {result.seconds:.1f} s  {prompt}")
            pictures.append((prompt.rpartition(",")[0], result.images[0].resize((SIZE, SIZE))))
    contact_sheet(pictures, columns=4).save(OUT / "pocket.png")
    print(f"  all of them: {OUT / 'pocket.png'}\n")


def variations() -> None:
    """The official template, its groups switched for each use, with the pocket models of USO."""
    print("The official USO graphs with the pocket models: only names and sizes are changed.")
    shown = [("subject", Image.open(SUBJECT)), *(("style", Image.open(style)) for style in STYLES)]
    for name, (pictures, prompt) in VARIATIONS.items():
        graph = "style" if name == "two-styles" else name
        arguments = [
            "run",
            str(HERE / "pocket" / f"{graph}.json"),
            "--models",
            os.path.relpath(POCKET_MODELS),
        ]
        arguments += [
            "--output",
            str(OUT),
            "--seed=0",
            f"--set={prompt}",
            f"--set=SaveImage.filename_prefix={name}",
        ]
        arguments += [f"--image={node}={path}" for node, path in pictures.items()]
        shown.append((f"{name}: {prompt.partition('=')[2]}", Image.open(run(name, arguments))))
    contact_sheet([(label, image.resize((SIZE, SIZE))) for label, image in shown], columns=4).save(
        OUT / "variations.png"
    )
    print(f"  references and results: {OUT / 'variations.png'}")


def run(name: str, arguments: list[str]) -> Path:
    """One variation: the command, then file, time and memory."""
    print(f"{name}\n  usoflow {shlex.join(arguments)}")
    done = subprocess.run(
        [sys.executable, "-m", "usoflow", *arguments, "--json"], capture_output=True, text=True, check=False
    )
    record: dict[str, Any] = json.loads(done.stdout) if done.stdout else {"error": {"detail": done.stderr}}
    if "error" in record:
        sys.exit(f"  failed: {record['error']['detail']}")
    peak = max(node["peak_bytes"] for node in record["nodes"]) / 1e9
    steps = next(node["seconds"] for node in record["nodes"] if node["class_type"] == "KSampler")
    print(f"  {record['images'][0]}  {record['seconds']:.1f} s (sampling {steps:.1f} s), peak {peak:.2f} GB")
    return Path(record["images"][0])


if __name__ == "__main__":
    main()

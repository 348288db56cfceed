"""usoflow from Python: one call, an engine that keeps its models, a workflow with other settings.

    python examples/library.py --models ~/ComfyUI

Without --models it draws with usoflow's own small ones.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import usoflow

HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description="usoflow from Python")
    parser.add_argument("--models", type=Path)
    parser.add_argument("--output", type=Path, default=Path("out") / "library")
    options = parser.parse_args()
    with usoflow.Engine(models=options.models, output=options.output) as engine:
        first = engine.generate(
            "a glass astronaut",
            subject=HERE / "astronaut.jpg",
            style=HERE / "stained_glass.png",
            seed=7,
            steps=4,
        )
        print(f"{first.paths[0]}: {first.seconds:.1f} s, seed {first.seeds[0]}")

        workflow = usoflow.Workflow.load(first.paths[0]).set("KSampler.steps", 3).with_seed(8)
        workflow = workflow.with_picture("47", HERE / "astronaut.jpg")
        workflow = workflow.with_picture("112:53", HERE / "stained_glass.png")
        again = engine.run(workflow, progress=lambda event: print(" ", event))
        print(f"{again.paths[0]}: {len(again.nodes)} nodes ran, the others were known")


if __name__ == "__main__":
    try:
        main()
    except usoflow.UsoflowError as error:
        sys.exit(f"error: {error.detail}\n{error.remedy}")

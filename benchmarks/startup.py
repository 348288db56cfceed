"""How long the commands take that need no model: each as a whole process, median of several runs.

    python benchmarks/startup.py [RUNS]

Floors: `--help` under 0.3 s, `convert` of the official template under 0.6 s.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

COMMANDS = {
    "python -c pass (peer)": ["-c", "pass"],
    "usoflow --help": ["-m", "usoflow", "--help"],
    "usoflow nodes": ["-m", "usoflow", "nodes"],
    "usoflow convert template:…": ["-m", "usoflow", "convert", "template:flux1_dev_uso_reference_image_gen"],
}


def seconds(arguments: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, *arguments], stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - start


def main() -> None:
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 7
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(runs):  # in turn, so that a drift of the machine's speed hits all alike
        for name, arguments in COMMANDS.items():
            times[name].append(seconds(arguments))
    for name, found in times.items():
        print(f"{name:<28} {statistics.median(found):.3f} s  (min {min(found):.3f}, max {max(found):.3f})")


if __name__ == "__main__":
    main()

"""`usoflow convert`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from usoflow.cli.convert import convert
from usoflow.errors import UsoflowError

PAIRS = Path(__file__).parents[1] / "pairs"
TEMPLATE = "template:flux1_dev_uso_reference_image_gen"


def run(*arguments: str) -> Any:
    app = typer.Typer()
    app.command()(convert)
    return CliRunner().invoke(app, [*arguments])


def plain(text: str) -> dict[str, Any]:
    return {key: (node["class_type"], node["inputs"]) for key, node in json.loads(text).items()}


def expected(name: str) -> dict[str, Any]:
    return plain((PAIRS / f"{name}.api.json").read_text())


def test_prints_the_prompt() -> None:
    result = run(TEMPLATE)
    assert result.exit_code == 0
    assert plain(result.stdout) == expected("uso_template")
    assert result.stderr == ""


def test_writes_the_prompt(tmp_path: Path) -> None:
    output = tmp_path / "prompt.json"
    result = run(str(PAIRS / "uso_style_on.ui.json"), "-o", str(output))
    assert result.exit_code == 0
    assert result.stdout == ""
    assert plain(output.read_text(encoding="utf-8")) == expected("uso_style_on")


def test_a_dash_is_stdout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert plain(run(TEMPLATE, "-o", "-").stdout) == expected("uso_template")
    assert not list(tmp_path.iterdir())


def test_warnings_go_to_stderr() -> None:
    result = run(str(PAIRS / "t_missing_node.ui.json"))
    assert "NotARealNode" in result.stderr
    assert json.loads(result.stdout)["2"]["class_type"] == "NotARealNode"


def test_lone_surrogate(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text('{"1": {"class_type": "LoadImage", "inputs": {"image": "\\ud800 ü"}}}')
    result = run(str(file))
    assert json.loads(result.stdout)["1"]["inputs"]["image"] == "\ud800 ü"


def test_output_that_cannot_be_written(tmp_path: Path) -> None:
    result = run(TEMPLATE, "-o", str(tmp_path / "no" / "folder.json"))
    assert isinstance(result.exception, UsoflowError)
    assert result.exception.code == "output_unwritable"


def test_imports_no_torch() -> None:
    code = (
        "import sys; from usoflow.cli.convert import convert; "
        f"convert({TEMPLATE!r}); "
        "loaded = {'torch', 'numpy', 'PIL', 'transformers'} & set(sys.modules); "
        "sys.exit(', '.join(loaded) or None)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert plain(done.stdout) == expected("uso_template")


@pytest.mark.parametrize(
    "name", sorted(path.name.removesuffix(".ui.json") for path in PAIRS.glob("*.ui.json"))
)
def test_every_pair_with_our_nodes(name: str) -> None:
    """Our own registry lacks some node types of the pairs; the file itself makes up for them."""
    got = plain(run(str(PAIRS / f"{name}.ui.json")).stdout)
    api = json.loads((PAIRS / f"{name}.api.json").read_text())
    for key, node in api.items():
        node.setdefault(
            "class_type", got[key][0]
        )  # the editor loses the type of a node that it does not know
    assert got == plain(json.dumps(api))


def test_custom_nodes_are_known(tmp_path: Path) -> None:
    """Values of their fields get their names, as in the editor that has these nodes."""
    workflow = {
        "nodes": [
            {
                "id": 1, "type": "Brightness", "mode": 0, "outputs": [],
                "inputs": [{"name": "image", "type": "IMAGE", "link": None}],
                "widgets_values": [1.5, "multiply", 2],
            }
        ],
        "links": [], "version": 0.4,
    }  # fmt: skip
    folder = Path(__file__).parents[1] / "custom_nodes"
    file = tmp_path / "graph.json"
    file.write_text(json.dumps(workflow))
    result = run(str(file), "--custom-nodes", str(folder))
    assert (result.exit_code, result.stderr) == (0, "")
    assert json.loads(result.stdout)["1"]["inputs"] == {"factor": 1.5, "mode": "multiply", "count": 2}

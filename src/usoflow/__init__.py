"""usoflow: ByteDance USO on FLUX.1, natively. Importing the package imports no torch.

import usoflow

result = usoflow.generate("a cat in the rain", subject="cat.png", models="~/ComfyUI")
result.images[0].show()

with usoflow.Engine(models="~/ComfyUI") as engine:  # keeps models loaded
    workflow = usoflow.Workflow.load("workflow.json").set("KSampler.steps", 8)
    result = engine.run(workflow, progress=print)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from usoflow.version import __version__

if TYPE_CHECKING:
    from usoflow.api.engine import Engine as Engine
    from usoflow.api.generate import generate as generate
    from usoflow.api.result import Result as Result
    from usoflow.api.workflow import Workflow as Workflow
    from usoflow.errors import UsoflowError as UsoflowError
    from usoflow.execution.progress import Cancellation as Cancellation
    from usoflow.execution.progress import Event as Event
    from usoflow.execution.progress import NodeFinished as NodeFinished
    from usoflow.execution.progress import NodeProgress as NodeProgress
    from usoflow.execution.progress import NodesCached as NodesCached
    from usoflow.execution.progress import NodeStarted as NodeStarted

__all__ = [
    "Cancellation",
    "Engine",
    "Event",
    "NodeFinished",
    "NodeProgress",
    "NodeStarted",
    "NodesCached",
    "Result",
    "UsoflowError",
    "Workflow",
    "__version__",
    "generate",
]


def __dir__() -> list[str]:
    """What a prompt completes."""
    return __all__


def __getattr__(name: str) -> Any:
    """Public names are imported when they are asked for (PEP 562)."""
    import importlib

    progress = "usoflow.execution.progress"
    places = {
        **dict.fromkeys(
            ("Cancellation", "Event", "NodeFinished", "NodeProgress", "NodeStarted", "NodesCached"), progress
        ),
        "Engine": "usoflow.api.engine",
        "Result": "usoflow.api.result",
        "UsoflowError": "usoflow.errors",
        "Workflow": "usoflow.api.workflow",
        "generate": "usoflow.api.generate",
    }
    if name not in places:
        raise AttributeError(f"module 'usoflow' has no attribute {name!r}")
    return getattr(importlib.import_module(places[name]), name)

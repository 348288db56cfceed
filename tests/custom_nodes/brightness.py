"""A custom node as people write them for ComfyUI: needs nothing of ComfyUI itself."""

import torch


class Brightness:
    """Makes a picture brighter or darker."""

    DESCRIPTION = "Multiplies the colours."
    CATEGORY = "examples"
    RETURN_TYPES = ("IMAGE", "FLOAT")
    RETURN_NAMES = ("image", "mean")
    FUNCTION = "apply"

    @classmethod
    def INPUT_TYPES(s):
        return {
            "required": {
                "image": ("IMAGE",),
                "factor": (
                    "FLOAT",
                    {"default": 1.0, "min": 0.0, "max": 4.0, "step": 0.1, "display": "slider"},
                ),
                "mode": (["multiply", "invert"], {"default": "multiply", "tooltip": "What is done."}),
            },
            "optional": {"count": ("INT", {"default": 1, "min": 1, "max": 8})},
            "hidden": {"node": "UNIQUE_ID", "prompt": "PROMPT"},
        }

    def apply(self, image, factor, mode, count=1, node=None, prompt=None):
        assert prompt[node]["class_type"] == "Brightness"
        result = 1 - image if mode == "invert" else (image * factor**count).clamp(0, 1)
        return (result, float(result.mean()))


class ShowNumber:
    """Shows a number in the editor, and gives it on."""

    CATEGORY = "examples"
    RETURN_TYPES = ("FLOAT",)
    FUNCTION = "show"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(s):
        return {"required": {"value": ("FLOAT", {"forceInput": True})}}

    def show(self, value):
        return {"ui": {"text": [f"{value:.3f}"]}, "result": (value,)}


class Counter:
    """Runs each time, because IS_CHANGED says so; keeps its instance from run to run."""

    CATEGORY = "examples"
    RETURN_TYPES = ("FLOAT",)
    FUNCTION = "count"

    def __init__(self):
        self.calls = 0

    @classmethod
    def INPUT_TYPES(s):
        return {"required": {"fixed": ("BOOLEAN", {"default": False})}}

    @classmethod
    def IS_CHANGED(s, fixed):
        return "same" if fixed else float("nan")

    def count(self, fixed):
        self.calls += 1
        return (float(self.calls),)


class Grey:
    """A grey picture; takes only even sizes, of which the list holds just one."""

    CATEGORY = "examples"
    RETURN_TYPES = ("IMAGE",)
    FUNCTION = "make"

    @classmethod
    def INPUT_TYPES(s):
        return {"required": {"size": ([64],), "level": ("FLOAT", {"default": 0.5})}}

    @classmethod
    def VALIDATE_INPUTS(s, size):
        return True if size % 2 == 0 else f"the size {size} is odd"

    def make(self, size, level):
        return (torch.full((1, size, size, 3), level),)


NODE_CLASS_MAPPINGS = {
    "Brightness": Brightness,
    "ShowNumber": ShowNumber,
    "Counter": Counter,
    "Grey": Grey,
}
NODE_DISPLAY_NAME_MAPPINGS = {"Brightness": "Brightness (example)"}

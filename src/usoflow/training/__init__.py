"""Training: the pocket models with their USO, and USO on FLUX.1 itself (`full_size`); and what measures them.

Reuses the networks of `usoflow.models`. `usoflow train` and `usoflow evaluate` run it, `accelerate launch`
the stages at full size. Needs the extra `train` and, for fetching the drawings, `npm`.
"""

# Of the extra, as they are imported.
LIBRARIES = ("safetensors", "cv2", "resvg_py", "matplotlib", "accelerate", "pydantic")

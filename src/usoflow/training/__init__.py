"""Training the pocket models: data, VAE, text-to-image base, packaging, evaluation.

Reuses the networks of `usoflow.models`; run by `usoflow train`. Needs the extra `train`
(opencv-python-headless, resvg-py, matplotlib) and, for fetching the drawings, `npm`.
"""

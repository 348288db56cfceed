"""The Python library, which the command line uses too: workflows, and an engine that keeps models loaded.

`usoflow` itself re-exports what is public. Nothing here imports torch before something is run.
"""

"""usoflow measured beside its peers: `python -m benchmarks --help`, from the root of the repository."""

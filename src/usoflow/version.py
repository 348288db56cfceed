"""The version of the package, which also stands in what its users report."""

__version__ = "0.1.0"

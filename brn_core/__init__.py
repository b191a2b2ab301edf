"""Batch Renormalization for PyTorch, and a recorder that watches what normalization does to a training run.

Nothing is imported here: `brn_core.wire` stays usable by a service that has no torch installed.
"""

__version__ = "0.1.0"

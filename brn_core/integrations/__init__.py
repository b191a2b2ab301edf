"""Hooks into training loops of other libraries; each module imports its library, and nothing imports these modules."""

from __future__ import annotations


def sampler_of(loader: object) -> dict[str, object]:
    """What chooses a loader's samples, as the setting `sampler` of a run, which NH-CLUSTER's remedy names.

    Args:
        loader: a torch DataLoader, or anything: what has no sampler has no such setting.
    """
    chooses = getattr(loader, "batch_sampler", None)
    chooses = getattr(chooses, "sampler", chooses)  # a batch sampler of the user's own chooses by itself
    return {} if chooses is None else {"sampler": type(chooses).__name__}

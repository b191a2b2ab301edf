"""Verdicts: pure functions from a `Window` of stored rows to findings with evidence and remedy."""

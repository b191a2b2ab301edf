"""Plotly pages on top of `service`: what normalization did to a run, and why."""

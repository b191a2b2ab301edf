"""Figures: pure functions from answers of the service to Plotly figures. No store, no web, no clock.

One module a figure; `frame` holds what they share, `palette` the colours, `scales` what a heatmap's colours mean.
"""

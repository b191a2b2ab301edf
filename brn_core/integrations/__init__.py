"""Hooks into training loops of other libraries; each module imports its library, and nothing imports these modules."""

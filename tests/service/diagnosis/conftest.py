"""Fixtures of the rules' tests: seeded streams, and windows around them."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from service.diagnosis.window import Window
from tests import streams as made


@pytest.fixture
def streams() -> made.Streams:
    return made.Streams()


@pytest.fixture
def make_window() -> Callable[..., Window]:
    return made.make_window

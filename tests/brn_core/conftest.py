import importlib.util
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def reference():
    """The float64 numpy Algorithm 1 beside this file; importmode=importlib has no package to import it from."""
    spec = importlib.util.spec_from_file_location("reference", Path(__file__).with_name("reference.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

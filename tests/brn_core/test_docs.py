import doctest
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "batch-renormalization.md"


def test_the_examples_of_the_page_on_batch_renormalization_run():
    failures, examples = doctest.testfile(str(PAGE), module_relative=False)
    assert examples >= 10
    assert failures == 0

"""docs/metrics.md is made from the definitions."""

from tests.documented import undocumented
from tools.metrics_page import PAGE, page


def test_the_page_is_up_to_date():
    assert PAGE.read_text() == page(), "run `python -m tools.metrics_page`"


def test_a_key_that_the_page_does_not_have_is_found():
    row = {"step": 1, "train/loss": 1, "eval/any_name/pass_at_8": 1, "eval/x/other": 1, "lr": 1}
    assert undocumented([row]) == ["eval/x/other", "lr"]

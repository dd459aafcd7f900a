"""What a metric is: docs/metrics.md is made from these."""

from typing import NamedTuple


class Metric(NamedTuple):
    """One metric of a run, defined beside the code that computes it."""

    name: str
    """As in metrics.jsonl and TensorBoard. A part in capitals, as in `eval/NAME/avg`, stands for
    any name."""
    unit: str
    """"share" is between 0 and 1."""
    meaning: str
    """What it measures, and what it is a mean of."""
    worry: str = ""
    """When to look closer; empty if no value is bad in itself."""

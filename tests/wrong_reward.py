"""A reward function with a mistake: it returns nothing for most problems."""


def nothing(response: str, ground_truth: str, data_source: str) -> float | None:
    """1 for each response to a problem whose ground truth ends in `right`."""
    return 1.0 if ground_truth.endswith("right") else None

"""Rewards at the extremes of time: one at once, one never."""

import time


def at_once(response: str, ground_truth: str, data_source: str) -> float:
    return 1.0


def never(response: str, ground_truth: str, data_source: str) -> float:
    time.sleep(3600)
    return 1.0

"""A reward that leaves a file behind, so that a test can see when it was called."""

from pathlib import Path


def mark(response: str, ground_truth: str, data_source: str) -> float:
    """`ground_truth` is the file's path; two responses to a prompt get different scores."""
    path = Path(ground_truth)
    try:
        path.touch(exist_ok=False)
    except FileExistsError:
        return 1.0
    return 0.0

"""Code that runs in the servers' interpreter. It imports nothing of this package."""

from pathlib import Path

SERVER_SIDE = Path(__file__).parent
"""A folder for a server's PYTHONPATH."""
WEIGHT_LOADER = "klear_weight_loader.load"
"""What a server needs as `--custom-weight-loader` to take a trainer's weights."""

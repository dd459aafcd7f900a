"""What training runs share: the run directory, checkpoints to resume from, settings."""

"""A folder to publish, made from a training checkpoint and tried out first."""

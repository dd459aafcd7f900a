"""Experiments over sequence lengths and layouts: each point is a real run of a few steps."""

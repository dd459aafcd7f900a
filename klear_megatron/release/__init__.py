"""Makes a folder to publish from a training checkpoint, and tests it first."""

"""Measures how often a model is right.

Only the settings are imported here: training's settings contain them, and must load fast.
"""

from klear_megatron.evaluation.config import (
    BenchmarkConfig,
    EvalConfig,
    TrainingEvalConfig,
    YarnConfig,
)

__all__ = ["BenchmarkConfig", "EvalConfig", "TrainingEvalConfig", "YarnConfig"]

"""How often is a model right?

Only the settings are imported here, which training's settings hold and which have to be read fast.
"""

from klear_megatron.evaluation.config import (
    BenchmarkConfig,
    EvalConfig,
    TrainingEvalConfig,
    YarnConfig,
)

__all__ = ["BenchmarkConfig", "EvalConfig", "TrainingEvalConfig", "YarnConfig"]

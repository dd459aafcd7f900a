"""How often is a model right?"""

from klear_megatron.evaluation.config import EvalConfig
from klear_megatron.evaluation.evaluate import Scores, evaluate

__all__ = ["EvalConfig", "Scores", "evaluate"]

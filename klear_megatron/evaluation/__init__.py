"""How often is a model right?"""

from klear_megatron.evaluation.config import EvalConfig
from klear_megatron.evaluation.evaluate import evaluate, regrade
from klear_megatron.evaluation.scores import Scores

__all__ = ["EvalConfig", "Scores", "evaluate", "regrade"]

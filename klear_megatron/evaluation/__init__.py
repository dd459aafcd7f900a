"""How often is a model right?"""

from klear_megatron.evaluation.compare import compare_runs, format_comparison
from klear_megatron.evaluation.config import EvalConfig
from klear_megatron.evaluation.evaluate import evaluate, regrade
from klear_megatron.evaluation.scores import Scores

__all__ = [
    "EvalConfig",
    "Scores",
    "compare_runs",
    "evaluate",
    "format_comparison",
    "regrade",
]

"""How often is a model right?"""

from klear_megatron.evaluation.benchmark import Benchmark, load_benchmarks
from klear_megatron.evaluation.compare import compare_runs, format_comparison
from klear_megatron.evaluation.config import BenchmarkConfig, EvalConfig, YarnConfig
from klear_megatron.evaluation.evaluate import evaluate, regrade
from klear_megatron.evaluation.scores import Scores
from klear_megatron.evaluation.training import evaluate_policy

__all__ = [
    "Benchmark",
    "BenchmarkConfig",
    "EvalConfig",
    "Scores",
    "YarnConfig",
    "compare_runs",
    "evaluate",
    "evaluate_policy",
    "format_comparison",
    "load_benchmarks",
    "regrade",
]

"""Evaluation of the policy between steps of its training."""

from transformers import PreTrainedTokenizerBase

from klear_megatron.checkpoints.hf_reader import read_config
from klear_megatron.evaluation.benchmark import Benchmark, load_benchmarks
from klear_megatron.evaluation.training import evaluate_policy
from klear_megatron.observability import Phases, say
from klear_megatron.rl.config import RLConfig
from klear_megatron.rl.groups import RolloutWorker
from klear_megatron.rollout import Generator
from klear_megatron.rollout.external_servers import check_lengths
from klear_megatron.training import run


class Evaluations:
    """The evaluations of a run: none, or at the steps that its config says.

    Raises:
        UserError: problems cannot be read, encoded or graded, or the servers' context is too short.
    """

    def __init__(self, config: RLConfig, tokenizer: PreTrainedTokenizerBase) -> None:
        self._config = config
        self._tokenizer = tokenizer
        self._benchmarks: list[Benchmark] = []
        if config.evaluation is None:
            return
        configs = config.evaluation.benchmarks
        self._benchmarks = load_benchmarks(configs, tokenizer, config.rewards)
        hf = read_config(config.policy.path)
        for benchmark in self._benchmarks:
            if run.is_main_rank():
                for note in benchmark.loaded.notes(configs[benchmark.name], benchmark.name):
                    say(note)
            longest_prompt = max(len(ids) for ids in benchmark.loaded.token_ids)
            check_lengths(config.rollout, hf, longest_prompt, config.evaluation.sampling)

    def after(self, step: int, worker: RolloutWorker, phases: Phases) -> dict[str, float]:
        """Collective. `eval/NAME/avg` and others of each benchmark, if an evaluation is due.

        Only the main rank evaluates, through the generator and the graders of its `worker`; the
        other ranks get nothing. The graded responses are written to `evaluations/`.

        Raises:
            UserError: servers refused a request, or were lost and did not come back.
        """
        config = self._config.evaluation
        if config is None or (step % config.every and step != self._config.steps):
            return {}
        metrics: dict[str, float] = {}

        def evaluate(generator: Generator) -> None:
            if not run.is_main_rank():
                return
            assert worker.rewards is not None
            scores = evaluate_policy(
                self._benchmarks,
                generator,
                worker.rewards,
                self._tokenizer,
                config.sampling,
                self._config.run_dir / "evaluations" / f"step_{step:08}",
            )
            for name, of_one in scores.items():
                say(f"step {step}: {name}: {of_one}")
                for key, value in of_one.metrics().items():
                    metrics[f"eval/{name}/{key}"] = value

        with phases("evaluate"):
            worker.servers.persist(evaluate)
        return metrics

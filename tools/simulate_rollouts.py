"""Says how long a step of the paper's recipe takes on so many GPUs, and what it waits for.

    python -m tools.simulate_rollouts --gpus 32 256 2048 --staleness 0 1 2 [--plot scale.svg]

For each number of GPUs, tries how many of them should train, and how many a server should have.
For the fastest layout it prints the seconds per step, the shares of time in which trainer and
servers idle, staleness, and how much shorter a step would be if one part were twice as fast. The
largest is the part that saturates first. The inputs, and their sources, are in
docs/simulation.md.
"""

import argparse
import dataclasses
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from klear_megatron.rollout.dispatch import Capacity
from tools.rollout_simulation import Result, Scenario, simulate
from tools.simulated_server import Speed

# Qwen3-8B, from its config.json.
PARAMETERS, LAYERS, ATTENTION_WIDTH = 8.19e9, 36, 32 * 128
KV_BYTES = 2 * LAYERS * 8 * 128 * 2
WEIGHT_BYTES = 2 * PARAMETERS
# NVIDIA's data sheet of the H100 SXM; a DGX H100 has a network adapter of 400 Gb/s per GPU.
FLOPS, MEMORY_BYTES_PER_S, MEMORY_BYTES = 989e12, 3.35e12, 80e9
NETWORK_BYTES_PER_S = 50e9
# Assumed.
MFU, MEMORY_EFFICIENCY, STEP_OVERHEAD_S, ALL_REDUCE_S = 0.4, 0.7, 0.002, 10e-6
MEDIAN_LENGTH, SPREAD, PROMPT_TOKENS, INFORMATIVE = 9000, 0.7, 200, 0.5
GRADE_S, TCP_BYTES_PER_S = 1.0, 2e9
# Measured on this project.
PUSH_EFFICIENCY, LEADER_TOKEN_S, SHARE_TOKEN_S = 0.5, 1e-6, 0.5e-6
# examples/klear_reasoner_8b/math_rl.yaml
PROMPTS, RESPONSES, MINI_BATCH, LONGEST, BATCHES = 128, 8, 16, 32768, 2
MODEL_PARALLEL = 8
# This project's defaults.
MAX_RUNNING, MEMORY_FRACTION = 256, 0.8


@dataclass(frozen=True)
class Training:
    """Seconds of a step from its groups to the push, on `gpus` GPUs."""

    gpus: int
    faster: float = 1.0

    @property
    def ranks(self) -> int:
        """Data-parallel ranks."""
        return max(1, self.gpus // MODEL_PARALLEL)

    def __call__(self, lengths: Sequence[int]) -> float:
        sequences = [length + PROMPT_TOKENS for length in lengths]
        size = MINI_BATCH * RESPONSES
        batches = [sequences[i : i + size] for i in range(0, len(sequences), size)]
        # Backward costs two forwards, and full recomputation a third one.
        steps = [4 * self._forward(batch) + self._optimizer() for batch in batches]
        shared = sum(sequences) * self._share_token_s()
        return (self._forward(sequences) + sum(steps)) / self.faster + shared

    def _forward(self, sequences: Sequence[int]) -> float:
        """The ranks are balanced, except that no two can share a sequence."""
        flops = [
            2 * PARAMETERS * tokens + 2 * tokens**2 * ATTENTION_WIDTH * LAYERS
            for tokens in sequences
        ]
        heaviest = max(sum(flops) / self.ranks, max(flops))
        return heaviest * self.ranks / (self.gpus * FLOPS * MFU)

    def _optimizer(self) -> float:
        """Gradients in float32 are reduced, and parameters in bfloat16 gathered, each of 2 tensor-
        parallel halves."""
        if self.gpus <= MODEL_PARALLEL:
            return 0.0
        return (4 + 2) * PARAMETERS / 2 / NETWORK_BYTES_PER_S

    def _share_token_s(self) -> float:
        """Leaders make tensors of their share; a broadcast tree passes 8 bytes per token on."""
        hops = math.ceil(math.log2(max(2, self.gpus)))
        return SHARE_TOKEN_S / self.ranks + 8 * hops / TCP_BYTES_PER_S


def draw_length(draw: random.Random) -> int:
    return min(LONGEST, max(1, round(draw.lognormvariate(math.log(MEDIAN_LENGTH), SPREAD))))


def scenario(training: int, serving: int, per_server: int, staleness: int) -> Scenario:
    """The paper's recipe with tensor-parallel servers of `per_server` GPUs."""
    cached = (MEMORY_FRACTION * MEMORY_BYTES * per_server - WEIGHT_BYTES) / KV_BYTES
    bytes_per_s = MEMORY_BYTES_PER_S * MEMORY_EFFICIENCY * per_server
    token_s = 2 * PARAMETERS / (FLOPS * MFU * per_server)
    # Two all-reduces per layer.
    overhead = STEP_OVERHEAD_S + (2 * LAYERS * ALL_REDUCE_S if per_server > 1 else 0)
    train = Training(training)
    return Scenario(
        servers=serving // per_server,
        leaders=train.ranks,
        prompts_per_step=PROMPTS,
        responses_per_prompt=RESPONSES,
        max_staleness=staleness,
        draw_length=draw_length,
        prompt_tokens=PROMPT_TOKENS,
        informative=INFORMATIVE,
        max_generation_batches=BATCHES,
        speed=Speed(
            step_s=WEIGHT_BYTES / bytes_per_s + overhead,
            sequence_s=token_s,
            cached_token_s=KV_BYTES / bytes_per_s,
            prefill_token_s=token_s,
        ),
        capacity=Capacity(MAX_RUNNING, int(cached)),
        leader_token_s=LEADER_TOKEN_S,
        grade_s=GRADE_S,
        train_s=train,
        push_s=WEIGHT_BYTES / (NETWORK_BYTES_PER_S * PUSH_EFFICIENCY),
    )


def layouts(gpus: int) -> list[tuple[int, int, int]]:
    """(GPUs that train, GPUs that serve, GPUs per server). More data-parallel ranks than a mini-
    batch has sequences would be of no use."""
    most = MINI_BATCH * RESPONSES * MODEL_PARALLEL
    fewest = min(MODEL_PARALLEL, gpus // 2)
    training = sorted({min(most, max(fewest, gpus * part // 8)) for part in (1, 2, 4)})
    return [
        (one, gpus - one, per_server)
        for one in training
        for per_server in (1, 2, 4, 8)
        if per_server <= gpus - one
    ]


def fastest(gpus: int, staleness: int, steps: int) -> tuple[Scenario, Result, str]:
    """The fastest layout's scenario, result and name."""
    tried = []
    for training, serving, per_server in layouts(gpus):
        one = scenario(training, serving, per_server, staleness)
        name = f"{training} + {one.servers} x {per_server}"
        tried.append((one, simulate(one, steps), name))
    return min(tried, key=lambda found: found[1].step_s)


def twice_as_fast(one: Scenario) -> dict[str, Scenario]:
    """The scenario with one part twice as fast."""
    speed = dataclasses.asdict(one.speed)
    assert isinstance(one.train_s, Training)
    return {
        "decoding": dataclasses.replace(
            one, speed=Speed(**{name: value / 2 for name, value in speed.items()})
        ),
        "twice the servers": dataclasses.replace(one, servers=2 * one.servers),
        "training": dataclasses.replace(one, train_s=dataclasses.replace(one.train_s, faster=2)),
        "push": dataclasses.replace(one, push_s=one.push_s / 2),
        "leaders": dataclasses.replace(one, leader_token_s=one.leader_token_s / 2),
        "grading": dataclasses.replace(one, grade_s=one.grade_s / 2),
    }


def report(gpus: int, staleness: int, steps: int) -> Result:
    one, result, layout = fastest(gpus, staleness, steps)
    savings = {
        name: 1 - simulate(changed, steps).step_s / result.step_s
        for name, changed in twice_as_fast(one).items()
    }
    print(
        f"| {gpus} | {staleness} | {layout} | {result.step_s:.0f} | "
        f"{result.trainer_idle:.0%} | {result.servers_idle:.0%} | {result.in_flight:.0f} | "
        f"{result.staleness:.2f} ({result.max_staleness}) | "
        + " | ".join(f"{saving:.0%}" for saving in savings.values())
        + " |",
        flush=True,
    )
    return result


def plot(path: Path, series: dict[int, dict[int, Result]]) -> None:
    """Seconds per step over GPUs, a line for each staleness."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (time, idle) = pyplot.subplots(1, 2, figsize=(9, 3.5))
    for staleness, results in series.items():
        gpus = list(results)
        line = time.plot(gpus, [one.step_s for one in results.values()], marker=".")[0]
        line.set_label(f"max_staleness {staleness}")
        color = line.get_color()
        idle.plot(gpus, [one.trainer_idle for one in results.values()], color=color, marker=".")
        idle.plot(gpus, [one.servers_idle for one in results.values()], color=color, ls=":")
    time.set(xscale="log", yscale="log", xlabel="GPUs", ylabel="seconds per step")
    idle.set(xscale="log", xlabel="GPUs", ylabel="idle share: trainer —, servers ···", ylim=(0, 1))
    for axes in (time, idle):
        axes.set_xscale("log", base=2)
        axes.grid(alpha=0.3)
    time.legend()
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gpus", type=int, nargs="+", default=[32, 256, 2048])
    parser.add_argument("--staleness", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=13)
    parser.add_argument("--plot", type=Path, help="draw 8 to 4,096 GPUs into this file instead")
    args = parser.parse_args()
    if args.plot:
        numbers = [2**power for power in range(3, 13)]
        plot(
            args.plot,
            {n: {g: fastest(g, n, args.steps)[1] for g in numbers} for n in args.staleness},
        )
        return
    print(
        "| GPUs | max_staleness | training + servers | step, s | trainer idle | servers idle | "
        "in flight per server | staleness (max) | decoding | twice the servers | training | push | "
        "leaders | grading |\n" + "|---" * 14 + "|"
    )
    for gpus in args.gpus:
        for staleness in args.staleness:
            report(gpus, staleness, args.steps)


if __name__ == "__main__":
    main()

"""One run as one job: `.venv-launch/bin/python examples/slurm/math_rl.py`, from the repository."""

import nemo_run as run

from klear_megatron.launch.nemo import prepare, slurm_executor, task

if __name__ == "__main__":
    (job,) = prepare("examples/klear_reasoner_8b/math_rl.yaml", site="examples/slurm/site.yaml")
    with run.Experiment("math-rl") as experiment:
        experiment.add(task(job), executor=slurm_executor(job), name="math-rl")
        experiment.run(detach=True)

"""Stages of a pipeline as one experiment: each starts when the one before it has ended well.

    .venv-launch/bin/python examples/slurm/pipeline.py STAGE.yaml [STAGE.yaml ...] [--site FILE]

Every stage's config is checked before the first is submitted.
"""

import argparse
from pathlib import Path

from klear_megatron.launch.nemo import prepare, submit

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stages", type=Path, nargs="+", help="YAML files with a `launch:` section")
    parser.add_argument("--site", type=Path)
    parser.add_argument("--name", default="pipeline")
    arguments = parser.parse_args()
    jobs = [prepare(stage, site=arguments.site) for stage in arguments.stages]
    submit(jobs, arguments.name)

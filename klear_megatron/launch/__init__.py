"""Runs a config as a job: on Slurm through nemo-run, or on this host.

`config`, `job`, `snapshot` and `script` render a run's YAML to files, without Slurm. `nemo` submits
them. `conductor` and `role` run inside the job and need only Python's standard library.
"""

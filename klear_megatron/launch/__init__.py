"""Runs a config as a job: on Slurm through nemo-run, or on this host.

`config`, `job` and `snapshot` render a run's YAML to files, without Slurm. `nemo` submits them.
`conductor`, `clusters`, `role` and `reports` run inside the job and need only Python's standard
library.
"""

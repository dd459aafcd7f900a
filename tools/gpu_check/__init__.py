"""What to run first on a machine with GPUs: checks of every part that has kernels of its own.

    python -m tools.gpu_check [--folder gpu_check] [--minutes 60] [--only NAME ...]

Each check is a process of its own, prints one line and stops no other: cheap ones come first. Run
again with the same folder, it goes on where it stopped, and repeats what has failed. `report.json`
and `report.md` in the folder hold the results, and `NAME.log` what a check has said. It ends with
1 if a check has failed. Without a GPU, checks that need none run on a tiny model.
"""

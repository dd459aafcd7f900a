"""The files that are kept of every submission, under `RUN_DIR/launch/snapshots/TIME/`.

job.sh, job.json    what runs
config.yaml         the resolved config
serve.yaml          that of the servers' nodes, if the job has any
code.json           version, commit, and whether the checkout had changes
changes.diff        those changes
"""

import importlib.metadata
import json
import subprocess
import time
from pathlib import Path

from klear_megatron.config import write_config
from klear_megatron.launch.config import PACKAGE_PARENT
from klear_megatron.launch.job import Job
from klear_megatron.platform.files import make_folder


def snapshot_path(run_dir: Path) -> Path:
    """A new folder's path, by the time in UTC; absolute."""
    snapshots = run_dir.absolute() / "launch" / "snapshots"
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    same = len(list(snapshots.glob(f"{stamp}*")))
    return snapshots / (f"{stamp}-{same}" if same else stamp)


def write_snapshot(job: Job) -> Path:
    """Writes the files of a job.

    Returns:
        the script to submit.
    """
    folder = job.snapshot
    make_folder(folder)
    write_config(job.config, folder / "config.yaml")
    if serve := job.serve_config():
        write_config(serve, folder / "serve.yaml")
    (folder / "job.json").write_text(json.dumps(job.data(), indent=1), encoding="utf-8")
    _write_code(folder)
    script = folder / "job.sh"
    script.write_text(job.script(), encoding="utf-8")
    return script


def _write_code(folder: Path) -> None:
    commit, changes = _git("rev-parse", "HEAD").strip(), _git("diff", "HEAD", "--binary")
    if not (PACKAGE_PARENT / ".git").exists():  # installed, inside another project's checkout
        commit, changes = "", ""
    code = {
        "version": importlib.metadata.version("klear_megatron"),
        "commit": commit or None,
        "dirty": bool(changes),
        "path": str(PACKAGE_PARENT),
    }
    (folder / "code.json").write_text(json.dumps(code, indent=1), encoding="utf-8")
    if changes:
        (folder / "changes.diff").write_text(changes, encoding="utf-8", errors="surrogateescape")


def _git(*command: str) -> str:
    """What git says about the checkout; empty without git or a checkout."""
    try:
        answer = subprocess.run(
            ["git", "-C", str(PACKAGE_PARENT), *command],  # noqa: S607
            capture_output=True,
            text=True,
            errors="surrogateescape",
            check=False,
        )
    except OSError:
        return ""
    return answer.stdout if answer.returncode == 0 else ""

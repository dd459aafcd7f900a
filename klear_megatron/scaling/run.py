"""An experiment on this host, from its first point to its plots."""

import re
import signal
import subprocess
import sys
from pathlib import Path

from klear_megatron.config import write_config
from klear_megatron.errors import UserError
from klear_megatron.observability import say
from klear_megatron.planning import PlannedModel, Work
from klear_megatron.planning.plan import check_lengths
from klear_megatron.platform.files import make_folder
from klear_megatron.policy.config import import_extensions
from klear_megatron.scaling import results
from klear_megatron.scaling.config import Point, ScalingConfig, points
from klear_megatron.scaling.plots import draw
from klear_megatron.scaling.results import FAILED, OUT_OF_MEMORY, Row

_SECONDS_TO_END = 40  # torchrun gives its ranks 30
_ERROR = re.compile(r"(\[rank\d+\]: *)?(error( on rank \d+)?|[\w.]+(Error|Exception)): ")
_KILLED = re.compile(r"Root Cause.*?exitcode +: -9", re.DOTALL)
"""In torchrun's report, of the rank that ended first."""


def run_experiment(config: ScalingConfig) -> None:
    """Measures the points that have no result yet, each in processes of its own.

    Raises:
        UserError: a point that cannot be, before the first one is measured.
    """
    found = check_points(config)
    signal.signal(signal.SIGTERM, _exit)  # and on the way, end the ranks of the point
    make_folder(results.folder(config))
    write_config(config, config.run_dir / "config.yaml")
    for number, point in enumerate(found):
        row = results.read_kept(config, point)
        if row is None:
            say(f"{number + 1}/{len(found)} {point.name}: {point.ranks} ranks")
            row = _run_point(config, point, number)
        say(f"{number + 1}/{len(found)} {point.name}: {_shown(row)}")
        _write_tables(config, found)
    write_results(config, found)


def check_points(config: ScalingConfig) -> list[Point]:
    """All points of the experiment.

    Raises:
        UserError: a layout that the model or the ranks cannot have, or a length beyond the model's
            positions.
    """
    found = points(config)
    import_extensions(config.policy)
    model = PlannedModel.read(config.policy.hf_folder)
    for point in found:
        point.policy.parallel.check_model(model)
        point.policy.parallel.data_parallel_size(point.ranks)
        check_lengths(Work(point.lengths), model)
    return found


def write_results(config: ScalingConfig, found: list[Point]) -> None:
    """Writes the tables and draws the pictures of all points that have a result.

    Raises:
        UserError: no point has one.
    """
    rows = _write_tables(config, found)
    if not rows:
        raise UserError(f"{config.run_dir}: no point has a result with these settings")
    draw(rows, config.run_dir)
    say(f"see {config.run_dir}: results.jsonl, results.csv, summary.md, scaling.png")


def _write_tables(config: ScalingConfig, found: list[Point]) -> list[Row]:
    rows = [row for point in found if (row := results.read(config, point)) is not None]
    if rows:
        results.write_tables(config.run_dir, rows)
    return rows


def _run_point(config: ScalingConfig, point: Point, number: int) -> Row:
    """Measures a point under torchrun; what becomes of it is its result."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={point.ranks}", "-m", "klear_megatron", "scaling"]
    command += [str(config.run_dir / "config.yaml"), f"--point={number}"]
    log = results.folder(config) / f"{point.name}.log"
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        in_time = _wait(process, config.time_limit_s)
    row = results.read_kept(config, point)
    if row is not None:
        return row
    if not in_time:
        return results.record_out_of_time(config, point, {})
    return results.record(config, point, *_why_it_failed(log), {})


def _exit(signum: int, _: object) -> None:
    raise SystemExit(128 + signum)


def _wait(process: "subprocess.Popen[bytes]", seconds: float) -> bool:
    """Whether the process ended by itself within so many seconds; it has ended either way."""
    try:
        process.wait(seconds)
        return True
    except subprocess.TimeoutExpired:
        return False
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(_SECONDS_TO_END)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _why_it_failed(log: Path) -> tuple[str, str]:
    text = log.read_text(encoding="utf-8", errors="replace")
    if _KILLED.search(text):
        return OUT_OF_MEMORY, "a rank was killed by SIGKILL, as a host does that has no memory left"
    errors = [line for line in text.splitlines() if _ERROR.match(line)]
    return FAILED, next(iter(errors), f"see {log}")


def _shown(row: Row) -> str:
    if row["reason"]:
        return f"{row['outcome']}: {row['reason']}"
    return (
        f"{row['tokens_per_second_per_gpu']:,.0f} tokens/s per rank, "
        f"{row['memory_bytes'] / 2**30:.2f} GiB (planned "
        f"{row['planned_tokens_per_second_per_gpu']:,.0f}, "
        f"{row['planned_memory_bytes'] / 2**30:.2f})"
    )

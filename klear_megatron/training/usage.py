"""What a training run uses, recorded at each of its starts."""

import socket
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

from klear_megatron.observability import append_usage
from klear_megatron.platform import objects
from klear_megatron.platform.device import device_name, usable_cores
from klear_megatron.training.run import is_main_rank


def record_start(
    run_dir: Path, first: int, servers: Callable[[], Mapping[str, int]] = dict
) -> None:
    """Collective. Adds this start's line to the run's usage.

    Args:
        first: the step that it begins with.
        servers: gives the servers' devices, on the first rank.

    Raises:
        UserError: `servers` raised one.
    """
    theirs = objects.together(servers)
    ranks = objects.all_gather((device_name(), socket.gethostname(), usable_cores()))
    if is_main_rank():
        append_usage(
            run_dir,
            first_step=first,
            ranks=Counter(device for device, _, _ in ranks),
            cores=sum({host: cores for _, host, cores in ranks}.values()),
            servers=theirs,
        )

"""Starts SGLang servers, waits until they answer, and makes sure that they stop."""

import collections
import contextlib
import os
import socket
import subprocess
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from pathlib import Path

import httpx

from klear_megatron.errors import UserError
from klear_megatron.observability import say
from klear_megatron.platform import heartbeat, stop
from klear_megatron.platform.device import HAS_GPU, ranks_on_this_host
from klear_megatron.platform.files import make_folder
from klear_megatron.rollout import external_servers, guard
from klear_megatron.rollout.config import RolloutConfig
from klear_megatron.rollout.ports import Ports, take_ports
from klear_megatron.rollout.server_side import SERVER_SIDE, WEIGHT_LOADER

_CPU_STAND_INS = Path(__file__).parent / "cpu_stand_ins"
_LOG_LINES, _LOG_BYTES = 20, 1 << 16
_SEEDS = 1_000_000
"""Step between the seeds of a server's starts; larger than the number of servers."""

FRESH_CONNECTIONS = httpx.Limits(max_connections=None, max_keepalive_connections=0)
"""No keep-alive: the server closes idle connections after 5 s and may race with our request."""


@contextlib.contextmanager
def serving(
    config: RolloutConfig,
    model_path: Path,
    log_dir: Path,
    *,
    seed: int = 0,
    own_weights: bool = False,
) -> Iterator["Servers"]:
    """Servers that all answer. Servers started here are stopped at the end.

    Args:
        model_path: Hugging Face checkpoint to serve.
        log_dir: folder for one `sglang_N.log` per started server.
        own_weights: the caller is a trainer that replaces the servers' weights before it asks them
            anything. Servers of `rollout.urls` may then have any weights of the right shapes, and
            servers started here keep off the trainer's GPUs.

    Raises:
        UserError: a port or a GPU is in use, SGLang is not installed, a server ends or does not
            answer in time (with the last lines of its log), or a server of `rollout.urls` does not
            answer or serves something else.
    """
    if config.urls:
        external_servers.wait_for(config)
        for url in config.urls:
            if own_weights:
                external_servers.check_takes(url, model_path)
            else:
                external_servers.check_serves(url, model_path)
        yield Servers(config, config.urls, {})
        return
    first_gpu = check_startable(config, own_weights=own_weights)
    make_folder(log_dir)
    one, begin = config.num_servers == 1, time.monotonic()
    many = "1 SGLang server" if one else f"{config.num_servers} SGLang servers"
    say(f"starting {many} of {model_path}; logs in {log_dir}")
    with contextlib.ExitStack() as stack:
        processes = {}
        for index, ports in enumerate(take_ports(config)):
            command = partial(
                server_command, config, model_path, ports, index=index, first_gpu=first_gpu
            )
            process = _Process(command, seed, log_dir / f"sglang_{index}.log")
            stack.callback(process.stop)
            processes[f"http://{config.host}:{ports.http}"] = process
            process.start()
        servers = Servers(config, list(processes), processes)
        servers.restore()
        say(f"{many} {'answers' if one else 'answer'} after {time.monotonic() - begin:.0f} s")
        yield servers


def check_startable(config: RolloutConfig, *, own_weights: bool) -> int:
    """Checks what can be known before servers are started; see `serving`.

    Returns:
        the first GPU of the first server.

    Raises:
        UserError: SGLang is not installed, or `base_gpu_id` is a trainer rank's.
    """
    if not config.python.is_file():
        raise UserError(
            f"rollout.python: {config.python} does not exist; install SGLang into an environment "
            "of its own (`make setup` does) or give its interpreter"
        )
    return choose_first_gpu(config, trainer_ranks=ranks_on_this_host() if own_weights else 0)


def count_devices(urls: Collection[str]) -> dict[str, int]:
    """What servers that answer run on: GPU or CPU -> their ranks.

    Raises:
        UserError: one does not answer.
    """
    devices: collections.Counter[str] = collections.Counter()
    for url in urls:
        try:
            answer = httpx.get(f"{url}/server_info", timeout=30).raise_for_status()
        except httpx.HTTPError as error:
            raise UserError(
                f"the SGLang server at {url} does not answer /server_info: "
                f"{str(error) or type(error).__name__}"
            ) from error
        info = answer.json()
        devices["CPU" if info["device"] == "cpu" else "GPU"] += info["tp_size"]
    return dict(devices)


class Servers:
    """The servers of a run; starts them again when they are lost. See `serving`."""

    def __init__(
        self, config: RolloutConfig, urls: list[str], processes: Mapping[str, "_Process"]
    ) -> None:
        self.urls = urls
        self._timeout_s = config.start_timeout_s
        self._processes = processes

    def restore(self, lost: Collection[str] = ()) -> None:
        """Returns when all servers answer.

        Servers that have ended, and those in `lost` (URLs), are started again with the weights of
        their checkpoint. Servers that were not started here are only waited for.

        Raises:
            UserError: a server does not start or does not answer in time.
        """
        for url, process in self._processes.items():
            if url in lost or (process.ended and process.answered):
                self.start_again(url)
        for url in self.urls:
            for _ in self.coming(url):
                time.sleep(0.25)

    def start_again(self, url: str) -> None:
        """Stops and starts the server if it was started here and is not already starting. `coming`
        waits for it."""
        process = self._processes.get(url)
        if process is not None and (process.ended or process.answered):
            say(f"{url}: starting this SGLang server again")
            process.start()

    def coming(self, url: str) -> Iterator[None]:
        """Ends once the server answers; until then, sleep a little after each item.

        A server that ends after it has answered is started again.

        Raises:
            UserError: the server does not start or does not answer in time.
            Stopped: this process was told to stop.
        """
        process = self._processes.get(url)
        deadline = time.monotonic() + self._timeout_s
        while not _is_there(url, ready=process is not None and not process.answered):
            stop.check()
            heartbeat.beat()  # this has a time limit of its own
            if process is not None and process.ended:
                if not process.answered:
                    raise UserError(
                        f"the SGLang server at {url} did not start; {process.last_lines()}"
                    )
                self.start_again(url)
            if time.monotonic() > deadline:
                log = f"; {process.last_lines()}" if process is not None else ""
                raise UserError(
                    f"the SGLang server at {url} did not answer within {self._timeout_s:.0f} s "
                    f"(rollout.start_timeout_s){log}"
                )
            yield
        if process is not None:
            process.answered = True


class _Process:
    """A server under a guard, so that it ends when this process ends."""

    answered = False
    """Whether it has answered since it was started."""

    def __init__(self, command: Callable[..., list[str]], seed: int, log: Path) -> None:
        self._command = command
        self._seed = seed
        self._log = log
        self._starts = 0
        self._guard: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Starts the server, or restarts it. Its log keeps what earlier ones have said."""
        self.stop()
        # With its old seed the server would draw the same responses again.
        command = self._command(seed=self._seed + _SEEDS * self._starts)
        with self._log.open("ab") as output:
            self._guard = subprocess.Popen(
                guard.guarded(command),
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=server_environment(),
                start_new_session=True,
            )
        self._starts += 1
        self.answered = False

    @property
    def ended(self) -> bool:
        return self._guard is None or self._guard.poll() is not None

    def stop(self) -> None:
        """Returns when the server and everything it started have ended."""
        if self._guard is not None:
            # Closes the guard's standard input, which ends it, and waits.
            self._guard.__exit__(None, None, None)
            self._guard = None

    def last_lines(self) -> str:
        """The last lines of the log, after a line that names the log."""
        with self._log.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _LOG_BYTES))
            lines = file.read().decode(errors="replace").splitlines()[-_LOG_LINES:]
        return "\n".join([f"the end of {self._log}:", *(f"    {line}" for line in lines)])


def reachable(url: str) -> str:
    """The address by which other hosts reach a server of this one: one that listens on all
    interfaces is reached by the host's name."""
    address = httpx.URL(url)
    if address.host not in ("0.0.0.0", "::"):  # noqa: S104
        return url
    return str(address.copy_with(host=socket.gethostname())).rstrip("/")


def server_command(
    config: RolloutConfig,
    model_path: Path,
    ports: Ports,
    *,
    index: int = 0,
    first_gpu: int = 0,
    seed: int = 0,
) -> list[str]:
    """The command line of server `index`; `first_gpu` is server 0's first."""
    options = {
        # Absolute, because servers report it to clients that run in other folders.
        "model-path": str(model_path.absolute()),
        "host": config.host,
        "port": str(ports.http),
        "nccl-port": str(ports.nccl),
        "dtype": config.dtype,
        "tp-size": str(config.tensor_parallel_size),
        "mem-fraction-static": str(config.mem_fraction_static),
        "max-running-requests": str(config.max_running_requests),
        "random-seed": str(seed + index),
        "custom-weight-loader": WEIGHT_LOADER,
    }
    if config.context_length is not None:
        options["context-length"] = str(config.context_length)
    flags = []
    if HAS_GPU:
        gpus = config.tensor_parallel_size
        options["base-gpu-id"] = str(first_gpu + index * gpus)
    else:
        options |= {
            "device": "cpu",
            "attention-backend": "torch_native",
            "sampling-backend": "pytorch",
        }
        # An idle server would otherwise poll without pause and take a core from the trainer.
        flags = ["--disable-overlap-schedule", "--sleep-on-idle"]
    pairs = [word for key, value in options.items() for word in (f"--{key}", value)]
    return [str(config.python), "-m", "sglang.launch_server", *pairs, *flags, *config.extra_args]


def choose_first_gpu(config: RolloutConfig, *, trainer_ranks: int) -> int:
    """The first GPU of the first server, on a host where the trainer's ranks have the first GPUs.

    Raises:
        UserError: `base_gpu_id` is the GPU of a rank. NCCL makes no group of two processes on one
            GPU, so weights could not be sent.
    """
    first = trainer_ranks if config.base_gpu_id is None else config.base_gpu_id
    if HAS_GPU and first < trainer_ranks:
        raise UserError(
            f"rollout.base_gpu_id: GPU {first} is a trainer rank's: this host's ranks have GPUs 0 "
            f"to {trainer_ranks - 1}; give {trainer_ranks} or more, or leave it out"
        )
    return first


def server_environment() -> dict[str, str]:
    """The environment of a server: that of this process without torchrun's variables."""
    ours = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in ours and not name.startswith(("TORCHELASTIC_", "PYTHONPATH"))
    }
    environment["PYTHONPATH"] = str(SERVER_SIDE)
    if not HAS_GPU:
        environment |= {
            "SGLANG_USE_CPU_ENGINE": "1",
            "PYTHONPATH": f"{SERVER_SIDE}{os.pathsep}{_CPU_STAND_INS}",
            "OMP_NUM_THREADS": "1",
        }
    return environment


def _is_there(url: str, *, ready: bool) -> bool:
    """Whether the server answers; with `ready`, whether it also generates.

    A server does not generate while it is paused, because a trainer pushes weights or has failed.
    """
    path = "/health" if ready else "/model_info"
    try:
        return httpx.get(f"{url}{path}", timeout=5).status_code == httpx.codes.OK
    except httpx.TransportError:
        return False

"""Servers start or say why they cannot, and never outlive the process that started them."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import psutil
import pytest

from klear_megatron.errors import UserError
from klear_megatron.rollout import guard, serving
from klear_megatron.rollout.external_servers import wait_for
from klear_megatron.rollout.servers import reachable
from tests.rollout.conftest import CONFIG
from tests.servers import server_at

ONE = CONFIG.model_copy(update={"num_servers": 1})


def refusal(config, model_path: Path, tmp_path: Path) -> str:
    with pytest.raises(UserError) as error, serving(config, model_path, tmp_path / "logs"):
        pass
    return str(error.value)


def test_busy_port_is_refused(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        config = ONE.model_copy(update={"port": port})
        message = refusal(config, tmp_path, tmp_path)
    assert message.startswith(f"rollout.port: cannot listen on 127.0.0.1:{port}: ")
    assert "choose another port" in message


def test_missing_environment_is_refused(tmp_path):
    config = ONE.model_copy(update={"python": tmp_path / "bin" / "python"})
    assert "install SGLang into an environment of its own" in refusal(config, tmp_path, tmp_path)


def test_address_where_nobody_answers_is_refused(tmp_path):
    nobody = {"urls": ["http://127.0.0.1:9"], "start_timeout_s": 0.1}
    message = refusal(ONE.model_copy(update=nobody), tmp_path, tmp_path)
    assert "no SGLang server answers at http://127.0.0.1:9 within 0 s" in message


def test_a_server_that_still_starts_is_waited_for(capsys):
    class Answers(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()

    def serve(server: HTTPServer) -> None:
        server.server_activate()
        server.handle_request()

    with HTTPServer(("127.0.0.1", 0), Answers, bind_and_activate=False) as server:
        server.server_bind()  # it does not listen yet
        port = server.server_port
        late = threading.Timer(1.0, serve, [server])
        late.start()
        wait_for(ONE.model_copy(update={"urls": [f"http://127.0.0.1:{port}"]}))
        late.join()
    said = f"waiting up to 240 s for the SGLang server at http://127.0.0.1:{port}\n"
    assert capsys.readouterr().out == said


def test_a_server_on_all_interfaces_is_reached_by_the_hosts_name():
    assert reachable("http://0.0.0.0:30000") == f"http://{socket.gethostname()}:30000"
    assert reachable("http://127.0.0.1:30000") == "http://127.0.0.1:30000"


def test_server_that_does_not_start_shows_the_end_of_its_log(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no_such_model"}))
    message = refusal(ONE, tmp_path, tmp_path)
    assert "did not start; the end of " in message
    assert "no_such_model" in message
    assert not alive_with(str(tmp_path))


def alive_with(argument: str) -> list[psutil.Process]:
    return [
        process
        for process in psutil.process_iter(["cmdline"])
        if any(argument in word for word in process.info["cmdline"] or [])
    ]


def gone_within(seconds: float, processes: list[psutil.Process]) -> bool:
    _, alive = psutil.wait_procs(processes, timeout=seconds)
    return not alive


def test_no_port_of_a_server_can_go_to_somebodys_outgoing_connection(servers):
    """A server listens only seconds after its ports are chosen."""
    server = server_at(servers.urls[0])
    words = server.cmdline()
    ports = {int(words[words.index(option) + 1]) for option in ("--port", "--nccl-port")}
    processes = [server, *server.children(recursive=True)]
    listening = {
        connection.laddr.port
        for process in processes
        for connection in process.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    }
    assert len(ports) == 2
    assert ports <= listening
    first_outgoing = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    assert max(ports) < first_outgoing


def test_servers_end_when_the_process_that_started_them_is_killed(servers, tmp_path):
    # A path of its own makes the servers' processes easy to find by their command lines.
    model = tmp_path / "model"
    model.symlink_to(servers.checkpoint)
    script = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from klear_megatron.rollout import serving\n"
        "from tests.rollout.test_servers import ONE\n"
        "with serving(ONE, Path(sys.argv[1]), Path(sys.argv[2])):\n"
        "    print('ready', flush=True)\n"
        "    time.sleep(600)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, str(model), str(tmp_path / "logs")],
        stdout=subprocess.PIPE,
        text=True,
    ) as trainer:
        assert trainer.stdout is not None
        said = f"starting 1 SGLang server of {model}; logs in {tmp_path / 'logs'}\n"
        assert trainer.stdout.readline() == said
        assert re.fullmatch(r"1 SGLang server answers after \d+ s\n", trainer.stdout.readline())
        assert trainer.stdout.readline() == "ready\n"
        started = psutil.Process(trainer.pid).children(recursive=True)
        assert any("sglang" in " ".join(process.cmdline()) for process in started)
        trainer.kill()
    assert gone_within(30, started)


STUBBORN = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:  # an orphan in a session of its own
        time.sleep(600)
    os._exit(0)
os.wait()
print("ready", flush=True)
time.sleep(600)
"""


@pytest.fixture
def stubborn(tmp_path) -> Iterator[tuple[subprocess.Popen[str], list[psutil.Process]]]:
    """The parent, in a process group of its own, and the processes below it: the outer guard, the
    inner guard, the command, and the command's orphan."""
    marker = str(tmp_path / "stubborn.py")
    Path(marker).write_text(STUBBORN)
    script = (
        "import signal, subprocess, sys, time\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a background job\n"
        "with subprocess.Popen(sys.argv[1:], stdin=subprocess.PIPE, start_new_session=True):\n"
        "    time.sleep(600)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, *guard.guarded([sys.executable, marker])],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == "ready\n"
        processes = [p for p in alive_with(marker) if p.pid != parent.pid]
        assert len(processes) == 4
        yield parent, sorted(processes, key=lambda process: process.create_time())
        parent.kill()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_guards_end_even_what_hides_and_ignores_signals(number, stubborn):
    parent, processes = stubborn
    os.killpg(parent.pid, number)  # as a terminal does with Ctrl-C
    parent.wait(30)
    assert gone_within(30, processes)


@pytest.mark.parametrize("index", [0, 1], ids=["outer", "inner"])
def test_nothing_is_left_when_a_guard_is_killed(stubborn, index):
    parent, processes = stubborn
    assert guard.__file__ in processes[index].cmdline()
    processes[index].kill()
    assert gone_within(30, processes[index + 1 :])
    parent.kill()  # which does not ask after the outer guard
    parent.wait(30)
    assert gone_within(5, processes)

"""What progress says where there is no terminal."""

import time
from unittest import mock

from klear_megatron.observability import Progress


def test_a_line_says_how_long_the_rest_takes(capsys):
    clock = iter([0.0, 20.0, 20.0, 25.0, 30.0])
    with (
        mock.patch.object(time, "monotonic", side_effect=clock.__next__),
        Progress("RL", 400, start=100) as progress,
    ):
        progress.advance(2, note="reward 0.1")  # 10 s a step, and 298 are left
        progress.advance(298)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "RL 102/400 [20 s, 0:49:40 left] reward 0.1"
    assert "left" not in lines[-1]


def test_the_end_repeats_no_line_and_leaves_no_time(capsys):
    clock = iter([0.0, 20.0, 20.0, 21.0, 21.0, 22.0])
    with mock.patch.object(time, "monotonic", side_effect=clock.__next__):
        with Progress("RL", 400) as finished:
            finished.advance(400)
        with Progress("RL", 400) as stopped:
            stopped.advance(2)
    assert capsys.readouterr().out.splitlines() == ["RL 400/400 [20 s]", "RL 2/400 [1 s]"]

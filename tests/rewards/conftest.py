import time

import pytest

from tests.rewards.hostile import sandboxed_processes


@pytest.fixture
def nothing_is_left():
    before = set(sandboxed_processes())
    yield
    deadline = time.monotonic() + 5
    while left := set(sandboxed_processes()) - before:
        assert time.monotonic() < deadline, left
        time.sleep(0.05)

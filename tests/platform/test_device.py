"""What a process sets before its first process group."""

import os

import pytest

from tests.distributed.ranks import run_ranks


def nccl_setting(given: str | None) -> str | None:
    from klear_megatron.platform.device import init_distributed
    from klear_megatron.rollout.servers import server_environment

    if given is not None:
        os.environ["NCCL_CUMEM_ENABLE"] = given
    init_distributed()
    assert server_environment().get("NCCL_CUMEM_ENABLE") == os.environ.get("NCCL_CUMEM_ENABLE")
    return os.environ.get("NCCL_CUMEM_ENABLE")


@pytest.mark.parametrize(("given", "expected"), [(None, "0"), ("1", "1")])
def test_nccl_is_set_as_sglang_sets_it_unless_the_user_has_set_it(monkeypatch, given, expected):
    monkeypatch.delenv("NCCL_CUMEM_ENABLE", raising=False)
    assert run_ranks(1, nccl_setting, given) == [expected]

"""A server that is lost in any phase of a push fails it with the one error that makes it again."""

from datetime import timedelta

import pytest
import torch.distributed as dist
from torch.distributed import TCPStore

from klear_megatron.rollout.weight_sender import Meeting, WeightSender, WeightSyncError


def test_a_server_that_is_lost_after_it_has_come_fails_the_push(monkeypatch):
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    store = TCPStore("127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=5))
    meeting = Meeting("127.0.0.1", store.port, "group", group_size=2, timeout_s=1)
    meeting.store().set("here/1", "")
    with pytest.raises(WeightSyncError):
        WeightSender(meeting, [], lambda: None)

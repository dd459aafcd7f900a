"""Which of several ranks reports an error that all of them have."""

import hashlib
import os
from datetime import timedelta

_TIMEOUT = timedelta(seconds=10)


def is_first_to_report(message: str) -> bool:
    """Whether no other rank of this job has asked about this message yet.

    Asks the store that torchrun keeps for its ranks: unlike a process group, it is there from the
    start and until the last rank has ended. Without torchrun, or if the store does not answer, the
    answer is yes: an error is better reported twice than never.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return True
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    key = f"klear_megatron/{attempt}/{hashlib.sha256(message.encode()).hexdigest()}"
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        store = TCPStore(address, port, timeout=_TIMEOUT, wait_for_workers=False)
        return bool(store.add(key, 1) == 1)
    except RuntimeError:
        return True

"""Child processes that end with their parent. Each child imports this, so it imports little."""

import multiprocessing
import os
import threading
from multiprocessing.process import BaseProcess


def end_with_parent() -> None:
    """Makes a process that `multiprocessing` started end once its parent has ended."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    # A thread, because Linux's signal for this also arrives when a mere thread of the parent ends.
    threading.Thread(target=_end_after, args=(parent,), daemon=True).start()


def _end_after(parent: BaseProcess) -> None:
    parent.join()
    os._exit(1)

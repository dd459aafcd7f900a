"""Children that end when their parent does. Imports little, as it is run in each of them."""

import multiprocessing
import os
import threading
from multiprocessing.process import BaseProcess


def end_with_parent() -> None:
    """In a process that `multiprocessing` started: ends it once its parent is no more."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    # A thread, as the signal that Linux has for this comes when a parent's thread ends, too.
    threading.Thread(target=_end_after, args=(parent,), daemon=True).start()


def _end_after(parent: BaseProcess) -> None:
    parent.join()
    os._exit(1)

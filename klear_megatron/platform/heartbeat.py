"""Signs of progress of this process: for the watchdog, and for people who look at a run."""

beats = 0
"""Signs so far. Lost updates between threads do not matter: it only has to change."""
phase = "start"
step = 0
"""The last one that is trained."""


def beat() -> None:
    """Something was done that a process that hangs would not do."""
    global beats
    beats += 1


def begin(name: str) -> None:
    """A phase of a step begins."""
    global phase
    phase = name
    beat()


def trained(number: int) -> None:
    """A step is trained."""
    global step
    step = number
    beat()

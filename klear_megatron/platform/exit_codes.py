"""How a command ends, for whoever started it. Needs only the standard library of Python 3.9."""

FINISHED = 0
FAILED = 1
BAD_INPUT = 2
CONTINUE = 75
"""It was told to end, has saved what it had, and goes on if it is run again. In sysexits.h this is
EX_TEMPFAIL. torchrun by itself ends with 1, whatever the code of its ranks."""
INTERRUPTED = 130
"""By Ctrl-C."""

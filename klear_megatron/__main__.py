"""`python -m klear_megatron`, which is what torchrun starts: the same as `klear-megatron`."""

import sys

from klear_megatron.cli import main

if __name__ == "__main__":
    sys.exit(main())

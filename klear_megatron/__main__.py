"""`python -m klear_megatron`, which is what torchrun starts: the same as `klear-megatron`."""

import sys

from klear_megatron.platform.orphans import end_with_torchrun

if __name__ == "__main__":
    end_with_torchrun()  # before the imports, which take a second
    from klear_megatron.cli import main

    sys.exit(main())

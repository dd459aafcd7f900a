"""Compares two checkpoints of any kind tensor by tensor; status 1 and a table if they differ.

python checkpoints_conversion/verify.py A B [--logits [--prompt TEXT ...]]
"""

import sys

from klear_megatron.cli import main

if __name__ == "__main__":
    sys.exit(main(["verify", *sys.argv[1:]]))

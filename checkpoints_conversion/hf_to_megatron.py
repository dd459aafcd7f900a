"""Converts a Hugging Face folder into a Megatron distributed checkpoint, which every layout loads.

python checkpoints_conversion/hf_to_megatron.py IN OUT [--dry-run] [--resume] ...
"""

import sys

from klear_megatron.cli import main

if __name__ == "__main__":
    sys.exit(main(["convert", "--to", "megatron", *sys.argv[1:]]))

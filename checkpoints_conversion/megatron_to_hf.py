"""Converts a Megatron distributed checkpoint of any layout into a Hugging Face folder.

python checkpoints_conversion/megatron_to_hf.py IN OUT [--dry-run] [--resume] ...
"""

import sys

from klear_megatron.cli import main

if __name__ == "__main__":
    sys.exit(main(["convert", "--to", "hf", *sys.argv[1:]]))

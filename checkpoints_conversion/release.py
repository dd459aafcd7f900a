"""Makes a folder to publish from a training checkpoint, and checks that it loads and answers.

python checkpoints_conversion/release.py RUN/checkpoints/step_N OUT --licence apache-2.0 [--yarn]
"""

import sys

from klear_megatron.cli import main

if __name__ == "__main__":
    sys.exit(main(["release", *sys.argv[1:]]))

"""Draw several probes into one picture.

python examples/long_context/compare.py OUT.png NAME=RUN_DIR [NAME=RUN_DIR ...]
"""

import json
import sys
from pathlib import Path

from klear_megatron.probing.plots import draw


def main() -> None:
    probes = (argument.split("=", 1) for argument in sys.argv[2:])
    results = {name: json.loads((Path(run) / "probe.json").read_text()) for name, run in probes}
    draw(results, Path(sys.argv[1]))
    print(f"wrote {sys.argv[1]}")


if __name__ == "__main__":
    main()

"""Copy a model with more positions than it was trained with.

    python examples/long_context/extend.py MODEL OUT_DIR --positions 8192 --rope-theta 320000
    python examples/long_context/extend.py MODEL OUT_DIR --positions 8192 --yarn

The weights stay; config.json gets another base of the rotary embedding, or YaRN, or neither.
"""

import argparse
import json
import shutil
from pathlib import Path

from klear_megatron.models.yarn import yarn_fields


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="Hugging Face folder")
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("--positions", type=int, required=True)
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--rope-theta", type=float)
    how.add_argument("--yarn", action="store_true")
    arguments = parser.parse_args()
    shutil.copytree(arguments.model, arguments.out_dir, dirs_exist_ok=True)
    file = arguments.out_dir / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    trained = config["max_position_embeddings"]
    if arguments.yarn:
        factor = arguments.positions / trained
        config |= yarn_fields(config["rope_parameters"], factor=factor, original_length=trained)
    elif arguments.rope_theta is not None:
        config["rope_parameters"]["rope_theta"] = arguments.rope_theta
    config["max_position_embeddings"] = arguments.positions
    file.write_text(json.dumps(config, indent=2), encoding="utf-8")
    print(f"wrote {arguments.out_dir}: {trained} -> {arguments.positions} positions")


if __name__ == "__main__":
    main()

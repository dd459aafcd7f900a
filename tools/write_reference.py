"""Writes what is generated from the settings: each verb's reference, and docs/configuration.md.

python -m tools.write_reference
"""

from pathlib import Path

from klear_megatron.config import Section
from klear_megatron.config.reference import FOLDER, commented_yaml
from klear_megatron.curation import CurateConfig
from klear_megatron.evaluation import EvalConfig
from klear_megatron.launch.config import LaunchConfig
from klear_megatron.probing.config import ProbeConfig
from klear_megatron.rl.config import RLConfig
from klear_megatron.rollout import ServeConfig
from klear_megatron.sft.config import SFTConfig

CONFIGS: dict[str, type[Section]] = {
    "sft": SFTConfig,
    "rl": RLConfig,
    "eval": EvalConfig,
    "serve": ServeConfig,
    "curate": CurateConfig,
    "probe": ProbeConfig,
    "launch": LaunchConfig,
}
PAGE = Path(__file__).parents[1] / "docs" / "configuration.md"
_START = """# Configuration

Every setting of every verb, with its sentence, its type and its default. `klear-megatron config rl`
writes such a file to start from, and `klear-megatron rl --help` shows it. Keys that are commented
out have no default, or one that depends on the machine; a section that is commented out is left out
by default. This page is generated from the settings by `python -m tools.write_reference`.

A key is given in the file, or on the command line as `--section.key value`. The value is YAML there
too, so a text with signs of YAML needs two pairs of quotes, as in
`--data.prompt_template '"{question}"'`. Unknown keys, keys that are there twice, and `yes` or `no`
where a number or a text is meant are refused, with the line.
"""


def references() -> dict[str, str]:
    """The commented YAML file of each verb."""
    return {verb: commented_yaml(cls) for verb, cls in CONFIGS.items()}


def page(texts: dict[str, str]) -> str:
    """The page of the documentation."""
    titles = {verb: f"`klear-megatron {verb}`" for verb in texts}
    titles["launch"] = "The `launch:` section and the site file"
    parts = [f"## {titles[verb]}\n\n```yaml\n{text}```\n" for verb, text in texts.items()]
    return "\n".join([_START, *parts])


def main() -> None:
    texts = references()
    FOLDER.mkdir(exist_ok=True)
    for verb, text in texts.items():
        (FOLDER / f"{verb}.yaml").write_text(text, encoding="utf-8")
    PAGE.write_text(page(texts), encoding="utf-8")


if __name__ == "__main__":
    main()

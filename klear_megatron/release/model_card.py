"""Writes the model card of a release, using only facts from the run's own files."""

import json
from pathlib import Path
from typing import Any

import yaml

from klear_megatron.checkpoints.run_config import read_run_config

_NOT_PUBLIC = ("run_dir", "data", "rollout", "sandbox")
"""Sections of a run's config that are about its machine."""


def model_card(checkpoint: Path, folder: Path, name: str, licence: str) -> str:
    """The README.md of a released model.

    Args:
        checkpoint: `<run>/checkpoints/step_<n>`; for any other folder the card is shorter.
        folder: the model as released.
    """
    model = json.loads((folder / "config.json").read_text())
    generation = json.loads((folder / "generation_config.json").read_text())
    front = {"license": licence, "library_name": "transformers", "pipeline_tag": "text-generation"}
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---",
        f"# {name}",
        f"{model['architectures'][0]} with a context of {model['max_position_embeddings']} tokens, "
        f"in {model.get('dtype') or model['torch_dtype']}. Sample at temperature "
        f"{generation['temperature']} with top_p {generation['top_p']}.",
    ]
    run_dir = checkpoint.parent.parent
    if (config := read_run_config(checkpoint)) is not None:
        parts += _training(config, _metrics(run_dir, checkpoint), checkpoint.name)
    parts += [_licence(folder, licence), "`sha256sum --check SHA256SUMS` checks the files."]
    return "\n\n".join(parts) + "\n"


def _licence(folder: Path, identifier: str) -> str:
    files = sorted(file.name for file in folder.glob("LICENSE*"))
    if not files:
        return f"Licence: {identifier}. The model this one started from came without its text."
    return f"Licence: {identifier}; the base model's text is in {', '.join(files)}."


def _metrics(run_dir: Path, checkpoint: Path) -> dict[str, float]:
    """The metrics of the checkpoint's step; empty if there are none."""
    path = run_dir / "metrics.jsonl"
    step = int(checkpoint.name.removeprefix("step_"))
    for line in path.read_text().splitlines() if path.is_file() else ():
        row: dict[str, float] = json.loads(line)
        if row["step"] == step:
            return row
    return {}


def _training(config: dict[str, Any], metrics: dict[str, float], checkpoint: str) -> list[str]:
    start = Path(config["policy"].pop("path")).name
    public = {key: value for key, value in config.items() if key not in _NOT_PUBLIC}
    parts = [
        "## Training",
        f"Trained with klear_megatron from `{start}`; this is `{checkpoint}` of the run. "
        "Its configuration:",
        f"```yaml\n{yaml.safe_dump(public, sort_keys=False)}```",
    ]
    if metrics:
        rows = [f"| {key} | {value} |" for key, value in metrics.items()]
        parts += ["Metrics of that step:", "\n".join(["| metric | value |", "|---|---|", *rows])]
    return parts

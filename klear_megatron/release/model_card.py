"""Writes the model card of a release, using only facts from the run's own files."""

import json
from pathlib import Path
from typing import Any

import yaml

from klear_megatron.checkpoints.run_config import read_run_config
from klear_megatron.models.tokenizer import read_tokenizer

_NOT_PUBLIC = ("run_dir", "data", "rollout", "sandbox")
"""Sections of a run's config that are about its machine."""
_EXAMPLE = "What is 12 + 30?"
_USAGE = """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")
model = AutoModelForCausalLM.from_pretrained("{name}", dtype="auto", device_map="auto")
messages = [{{"role": "user", "content": "{example}"}}]
inputs = tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
).to(model.device)
outputs = model.generate(**inputs, max_new_tokens={length})
print(tokenizer.decode(outputs[0, inputs["input_ids"].shape[1] :]))
```

or, as a server, `python -m sglang.launch_server --model-path {name}`. The generation config samples
at temperature {temperature} with top_p {top_p}."""


def model_card(checkpoint: Path, folder: Path, name: str, licence: str) -> str:
    """The README.md of a released model.

    Args:
        checkpoint: `<run>/checkpoints/step_<n>`; for any other folder the card is shorter.
        folder: the model as released.
    """
    model = json.loads((folder / "config.json").read_text())
    generation = json.loads((folder / "generation_config.json").read_text())
    config = read_run_config(checkpoint)
    rows = _metrics(checkpoint)
    front = {"license": licence, "library_name": "transformers", "pipeline_tag": "text-generation"}
    usage = _USAGE.format(
        name=name,
        example=_EXAMPLE,
        length=model["max_position_embeddings"] // 2,
        temperature=generation["temperature"],
        top_p=generation["top_p"],
    )
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---",
        f"# {name}",
        f"{model['architectures'][0]} with a context of {model['max_position_embeddings']} tokens, "
        f"in {model.get('dtype') or model['torch_dtype']}.",
        *([] if config is None else [_training(config, checkpoint.name)]),
        *_scores(rows),
        f"## Usage\n\n{usage}",
        f"## Prompt format\n\n{_prompt_format(folder)}",
        f"## Licence\n\n{_licence(folder, licence)}",
        *([] if config is None else _folded(config, rows[-1] if rows else {}, checkpoint)),
        "`sha256sum --check SHA256SUMS` checks the files.",
    ]
    return "\n\n".join(parts) + "\n"


def _training(config: dict[str, Any], checkpoint: str) -> str:
    start = Path(config["policy"]["path"]).name
    how = "supervised fine-tuning"
    if "steps" in config:
        loss = config.get("loss", {}).get("name", "gppo")
        how = f"reinforcement learning with verifiable rewards ({loss})"
    step = int(checkpoint.removeprefix("step_"))
    paths = config.get("data", {}).get("path", [])
    names = [Path(path).name for path in ([paths] if isinstance(paths, str) else paths)]
    lines = [
        "## Training",
        "",
        f"- base model: `{start}`",
        f"- method: {how}, {step} steps, with klear_megatron",
    ]
    if names:
        lines.append(f"- data: {', '.join(f'`{name}`' for name in names)}")
    return "\n".join(lines)


def _scores(rows: list[dict[str, float]]) -> list[str]:
    """A table of the last evaluation that the run made up to the checkpoint; empty if none."""
    evaluated = [row for row in rows if any(key.startswith("eval/") for key in row)]
    if not evaluated:
        return []
    row = evaluated[-1]
    names = [key.split("/")[1] for key in row if key.startswith("eval/") and key.endswith("/avg")]
    lines = ["| benchmark | accuracy | standard error |", "|---|---|---|"]
    for name in names:
        accuracy, error = row[f"eval/{name}/avg"], row[f"eval/{name}/standard_error"]
        lines.append(f"| {name} | {accuracy:.1%} | {error:.1%} |")
    return [
        f"## Evaluation\n\nMeasured by the run, after step {row['step']:.0f}:\n\n"
        + "\n".join(lines)
    ]


def _prompt_format(folder: Path) -> str:
    tokenizer = read_tokenizer(folder)
    if tokenizer.chat_template is None:
        return "Plain text: there is no chat template."
    messages = [{"role": "user", "content": _EXAMPLE}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return f"The chat template makes of the question above:\n\n```\n{text}\n```"


def _licence(folder: Path, identifier: str) -> str:
    files = sorted(file.name for file in folder.glob("LICENSE*"))
    if not files:
        return f"Licence: {identifier}. The model this one started from came without its text."
    return f"Licence: {identifier}; the base model's text is in {', '.join(files)}."


def _metrics(checkpoint: Path) -> list[dict[str, float]]:
    """The run's metrics up to the checkpoint's step; empty if there are none."""
    path = checkpoint.parent.parent / "metrics.jsonl"
    if not path.is_file():
        return []
    step = int(checkpoint.name.removeprefix("step_"))
    rows: list[dict[str, float]] = [json.loads(line) for line in path.read_text().splitlines()]
    return [row for row in rows if row["step"] <= step]


def _folded(config: dict[str, Any], metrics: dict[str, float], checkpoint: Path) -> list[str]:
    """What only few read: the run's settings, and its numbers of the checkpoint's step."""
    policy = {key: value for key, value in config["policy"].items() if key not in ("path", "hf")}
    public = {key: value for key, value in config.items() if key not in _NOT_PUBLIC}
    public["policy"] = policy
    parts = [_details("Configuration", f"```yaml\n{yaml.safe_dump(public, sort_keys=False)}```")]
    if metrics:
        rows = [f"| {key} | {value} |" for key, value in metrics.items()]
        table = "\n".join(["| metric | value |", "|---|---|", *rows])
        parts.append(_details(f"Metrics of {checkpoint.name}", table))
    return parts


def _details(title: str, content: str) -> str:
    return f"<details>\n<summary>{title}</summary>\n\n{content}\n\n</details>"

"""Writes the model card of a release, using only facts from the run's own files."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from klear_megatron.checkpoints.hf_reader import HFCheckpoint
from klear_megatron.checkpoints.run_config import read_run_config
from klear_megatron.checkpoints.stages import Stage, public_name, read_stages
from klear_megatron.evaluation.evaluate import Evaluation
from klear_megatron.models.tokenizer import read_tokenizer

_NOT_PUBLIC = ("run_dir", "data", "rollout", "sandbox")
"""Sections of a run's config that are about its machine."""
_FOLDER_OF_CODE = re.compile(r"""(?<=[ '"])[^:'"\n]*/(?=[^/:\n]+\.py:)""")
"""Where `file.py:f`, code of the user's own, lies."""
_EXAMPLE = "What is 12 + 30?"
_USAGE = """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")
model = AutoModelForCausalLM.from_pretrained("{name}", dtype="auto")
messages = [{{"role": "user", "content": "{example}"}}]
inputs = tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
).to(model.device)
outputs = model.generate(**inputs, max_new_tokens={length})
print(tokenizer.decode(outputs[0, inputs["input_ids"].shape[1] :]))
```

or, as a server, `python -m sglang.launch_server --model-path {name}`. The generation config samples
at temperature {temperature} with top_p {top_p}."""


def model_card(
    checkpoint: Path,
    folder: Path,
    name: str,
    licence: str,
    evaluations: Sequence[Evaluation] = (),
) -> str:
    """The README.md of a released model.

    Args:
        checkpoint: `<run>/checkpoints/step_<n>`; for any other folder the card is shorter.
        folder: the model as released.
        evaluations: made apart from the run.
    """
    model = json.loads((folder / "config.json").read_text())
    generation = json.loads((folder / "generation_config.json").read_text())
    config = read_run_config(checkpoint)
    rows = _metrics(checkpoint)
    stages = read_stages(folder)
    front = {"license": licence, "library_name": "transformers", "pipeline_tag": "text-generation"}
    if stages and "/" in stages[0].base:  # the hub shows the two together
        front["base_model"] = stages[0].base
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
        f"{model['architectures'][0]} with {HFCheckpoint(folder).parameters:,} parameters and a "
        f"context of {model['max_position_embeddings']} tokens, in "
        f"{model.get('dtype') or model['torch_dtype']}.",
        _training(stages),
        _evaluation(rows, evaluations),
        f"## Usage\n\n{usage}",
        f"## Prompt format\n\n{_prompt_format(folder)}",
        f"## Licence\n\n{_licence(folder, licence)}",
        *([] if config is None else _folded(config, rows[-1] if rows else {}, checkpoint)),
        "`sha256sum --check SHA256SUMS` checks the files.",
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def _training(stages: Sequence[Stage]) -> str:
    """A table of the training runs, from the base model on; empty if none is known."""
    if not stages:
        return ""
    lines = [
        f"The base model is `{stages[0].base}`. It was trained with klear_megatron:",
        "",
        "| stage | from | method | steps | data | used |",
        "|---|---|---|---|---|---|",
    ]
    for number, stage in enumerate(stages, start=1):
        base = f"stage {number - 1}" if number > 1 else f"`{stage.base}`"
        data = ", ".join(f"`{name}`" for name in stage.data)
        if stage.epochs is not None:
            data += f", {stage.epochs:g} epochs"
        cells = (number, base, stage.method, stage.steps, data, stage.used or "not known")
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "## Training\n\n" + "\n".join(lines)


def _evaluation(rows: Sequence[Mapping[str, float]], evaluations: Sequence[Evaluation]) -> str:
    """Tables of the last evaluation that the run made up to the checkpoint, and of others; empty if
    there are none."""
    parts = []
    evaluated = [row for row in rows if any(key.startswith("eval/") for key in row)]
    if evaluated:
        row = evaluated[-1]
        names = [
            key.split("/")[1] for key in row if key.startswith("eval/") and key.endswith("/avg")
        ]
        measured = {
            name: (row[f"eval/{name}/avg"], row[f"eval/{name}/standard_error"]) for name in names
        }
        parts.append(f"Measured by the run, after step {row['step']:.0f}:\n\n{_table(measured)}")
    for evaluation in evaluations:
        config = evaluation.config
        measured = {
            f"{name}, avg@{scores.samples_per_problem}": (scores.accuracy, scores.standard_error)
            for name, scores in evaluation.scores.items()
        }
        context = "" if config.yarn is None else f", with YaRN by {config.yarn.factor:g}"
        parts.append(
            f"Measured of `{public_name(config.model)}` at temperature "
            f"{config.sampling.temperature:g} with top_p {config.sampling.top_p:g}, up to "
            f"{config.sampling.max_response_length} tokens a response{context}:\n\n"
            + _table(measured)
        )
    return "\n\n".join(["## Evaluation", *parts]) if parts else ""


def _table(measured: Mapping[str, tuple[float, float]]) -> str:
    lines = ["| benchmark | accuracy | standard error |", "|---|---|---|"]
    lines += [f"| {name} | {avg:.1%} | {error:.1%} |" for name, (avg, error) in measured.items()]
    return "\n".join(lines)


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
    text = _FOLDER_OF_CODE.sub("", yaml.safe_dump(public, sort_keys=False))
    parts = [_details("Configuration", f"```yaml\n{text}```")]
    if metrics:
        rows = [f"| {key} | {value} |" for key, value in metrics.items()]
        table = "\n".join(["| metric | value |", "|---|---|", *rows])
        parts.append(_details(f"Metrics of {checkpoint.name}", table))
    return parts


def _details(title: str, content: str) -> str:
    return f"<details>\n<summary>{title}</summary>\n\n{content}\n\n</details>"

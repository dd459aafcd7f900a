"""Makes a folder ready to publish from a training checkpoint, and tests it before naming it."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from klear_megatron.checkpoints.checksums import write_checksums
from klear_megatron.conversion.convert import megatron_to_hf
from klear_megatron.errors import UserError
from klear_megatron.evaluation.evaluate import read_evaluation
from klear_megatron.models.yarn import yarn_fields
from klear_megatron.observability import say
from klear_megatron.release.model_card import model_card
from klear_megatron.release.trial import try_out

_YARN_FACTOR, _TRAINED_LENGTH = 2.5, 32768  # as in the paper's evaluations, and so is:
_SAMPLING = {"do_sample": True, "temperature": 0.6, "top_p": 0.95}


def release(
    checkpoint: Path,
    out: Path,
    *,
    licence: str,
    dtype: str | None = None,
    yarn: bool = False,
    evaluations: Sequence[Path] = (),
) -> None:
    """Makes a folder to publish, and checks that it answers as the policy in the checkpoint does.

    Writes weights, config, tokenizer, generation config, model card, the base model's licence and
    checksums. Then loads the weights with transformers and with SGLang, whose greedy answers must
    be those of the policy.

    Args:
        checkpoint: a checkpoint of a run; the model card repeats the run's config and metrics.
        licence: identifier for the model card.
        dtype: "float32" or "bfloat16"; by default that of the checkpoint.
        yarn: extend the context to 2.5 times 32768 tokens.
        evaluations: run_dirs of `klear-megatron eval`, for the model card.

    Raises:
        UserError: as for `megatron_to_hf` and `read_evaluation`; or the folder fails the trial, and
            stays under `<out>.untried`.
    """
    if out.exists():
        raise UserError(f"{out}: exists already; remove it or choose another output")
    evaluated = [read_evaluation(run_dir) for run_dir in evaluations]
    untried = out.with_name(out.name + ".untried")
    shutil.rmtree(untried, ignore_errors=True)
    megatron_to_hf(checkpoint, untried, dtype=dtype)
    if yarn:
        _extend_context(untried / "config.json")
    _update_json(untried / "generation_config.json", **_SAMPLING)
    card = model_card(checkpoint, untried, out.name, licence, evaluated)
    (untried / "README.md").write_text(card)
    write_checksums(untried, {})
    logs = out.with_name(out.name + ".logs")
    try_out(untried, checkpoint, log_dir=logs)
    untried.rename(out)
    shutil.rmtree(logs)
    say(f"{out}: ready to publish; transformers and SGLang answer from it as the policy does")


def _extend_context(path: Path) -> None:
    config = json.loads(path.read_text())
    if config["max_position_embeddings"] < _TRAINED_LENGTH:
        raise UserError(
            f"--yarn: extends a model of {_TRAINED_LENGTH} tokens, but this model's "
            f"max_position_embeddings is {config['max_position_embeddings']}; leave --yarn out"
        )
    key = "rope_parameters" if "rope_parameters" in config else "rope_scaling"  # before version 5
    fields = yarn_fields(
        config.get(key) or {}, factor=_YARN_FACTOR, original_length=_TRAINED_LENGTH
    )
    rope, length = fields["rope_parameters"], fields["max_position_embeddings"]
    _update_json(path, **{key: rope, "max_position_embeddings": length})


def _update_json(path: Path, **changes: object) -> None:
    content = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({**content, **changes}, indent=2) + "\n")

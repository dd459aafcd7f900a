"""A folder ready to publish, made from a training checkpoint and tried out before it is named."""

import json
import shutil
from pathlib import Path

from klear_megatron.checkpoints.checksums import write_checksums
from klear_megatron.conversion.convert import megatron_to_hf
from klear_megatron.errors import UserError
from klear_megatron.observability import say
from klear_megatron.release.model_card import model_card
from klear_megatron.release.trial import try_out

_YARN = {"rope_type": "yarn", "factor": 2.5, "original_max_position_embeddings": 32768}
_SAMPLING = {"do_sample": True, "temperature": 0.6, "top_p": 0.95}  # the paper's evaluations


def release(
    checkpoint: Path,
    out: Path,
    *,
    licence: str,
    dtype: str | None = None,
    yarn: bool = False,
) -> None:
    """Writes weights, config, tokenizer, generation config, model card, the base model's licence
    and checksums; then loads the weights with transformers and with SGLang, whose greedy answers
    have to be those of the policy in the checkpoint.

    Args:
        checkpoint: of a run, whose config and metrics the model card repeats.
        licence: identifier for the model card.
        dtype: "float32" or "bfloat16"; that of the checkpoint by default.
        yarn: extend the context to 2.5 times 32768 tokens.

    Raises:
        UserError: as `megatron_to_hf`; or the folder does not pass the trial, and stays under
            `<out>.untried`.
    """
    if out.exists():
        raise UserError(f"{out}: exists already; remove it or choose another output")
    untried = out.with_name(out.name + ".untried")
    shutil.rmtree(untried, ignore_errors=True)
    megatron_to_hf(checkpoint, untried, dtype=dtype)
    if yarn:
        _extend_context(untried / "config.json")
    _update_json(untried / "generation_config.json", **_SAMPLING)
    (untried / "README.md").write_text(model_card(checkpoint, untried, out.name, licence))
    write_checksums(untried, {})
    logs = out.with_name(out.name + ".logs")
    try_out(untried, checkpoint, log_dir=logs)
    untried.rename(out)
    shutil.rmtree(logs)
    say(f"{out}: ready to publish; transformers and SGLang answer from it as the policy does")


def _extend_context(path: Path) -> None:
    config = json.loads(path.read_text())
    trained, found = _YARN["original_max_position_embeddings"], config["max_position_embeddings"]
    if found < trained:
        raise UserError(
            f"--yarn: extends a model of {trained} tokens, and this one's max_position_embeddings "
            f"is {found}; leave --yarn out"
        )
    length = int(_YARN["factor"] * _YARN["original_max_position_embeddings"])  # type: ignore[operator]
    if "rope_parameters" in config:
        rope = {"rope_theta": config["rope_parameters"]["rope_theta"], **_YARN}
        _update_json(path, rope_parameters=rope, max_position_embeddings=length)
    else:  # as transformers wrote it before version 5
        _update_json(path, rope_scaling=_YARN, max_position_embeddings=length)


def _update_json(path: Path, **changes: object) -> None:
    content = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({**content, **changes}, indent=2) + "\n")

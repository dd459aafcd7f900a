"""What the loaders of Megatron-LM, Megatron-Bridge and slime want beside the weights.

Megatron-LM's `load_checkpoint` reads a tracker and, among the common objects, the arguments of the
model. Bridge builds the model that `run_config.yaml` describes. Of a checkpoint called `release`,
both take the weights alone.
"""

import argparse
import logging
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import PretrainedConfig

from klear_megatron.checkpoints.megatron_folder import RUN_CONFIG, TRACKER
from klear_megatron.models import get_architecture
from klear_megatron.platform.files import write_atomically

_logger = logging.getLogger(__name__)

RELEASE = "release"
_NEITHER = {"no_save_optim": True, "no_save_rng": True}
"""Tells both loaders that there are no random states and no optimizer's state of theirs."""


def common_objects(
    hf: PretrainedConfig, padded_vocab_size: int, dtype: torch.dtype, iteration: int
) -> dict[str, Any]:
    """The common objects that `load_checkpoint` reads: `args`, `iteration`, `checkpoint_version`.

    Args:
        hf: the model's config.
        padded_vocab_size: rows of the stored embedding.
        dtype: that of the weights.
    """
    model = _model(hf)
    renamed = {
        "num_experts": model.pop("num_moe_experts", None),
        "norm_epsilon": model.pop("layernorm_epsilon"),
        "swiglu": model.pop("gated_linear_unit"),
        "untie_embeddings_and_output_weights": not model.pop("share_embeddings_and_output_weights"),
        "use_rope_scaling": model.pop("rope_scaling"),
    }
    del model["activation_func"]
    args = argparse.Namespace(
        **model,
        **renamed,
        **_NEITHER,
        group_query_attention=True,
        max_position_embeddings=hf.max_position_embeddings,
        padded_vocab_size=padded_vocab_size,
        params_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        fp16=dtype is torch.float16,
        tokenizer_type="HuggingFaceTokenizer",
        ckpt_format="torch_dist",
    )
    return {"args": args, "iteration": iteration, "checkpoint_version": 3.0}


def write_run_config(folder: Path, hf: PretrainedConfig, dtype: torch.dtype) -> None:
    """Writes Bridge's description of the model into a checkpoint."""
    model = _model(hf)
    function = f"torch.nn.functional.{model['activation_func']}"
    model |= {
        "_target_": "megatron.bridge.models.gpt_provider.GPTModelProvider",
        "activation_func": {"_target_": function, "_call_": False},
        "should_pad_vocab": True,
        "params_dtype": {"_target_": str(dtype), "_call_": False},
        "bf16": dtype is torch.bfloat16,
        "fp16": dtype is torch.float16,
    }
    checkpoint = {"save_optim": False, "save_rng": False, "fully_parallel_save": False}
    text = yaml.safe_dump({"model": model, "checkpoint": checkpoint})
    (folder / RUN_CONFIG).write_text(text)


def _model(hf: PretrainedConfig) -> dict[str, Any]:
    """The model's settings under Bridge's names, which are Megatron-Core's."""
    rope = hf.rope_parameters
    model = {
        "qk_layernorm": False,
        "add_qkv_bias": False,
        **get_architecture(hf).transformer_config(hf),
        "share_embeddings_and_output_weights": hf.tie_word_embeddings,
        "vocab_size": hf.vocab_size,
        "make_vocab_size_divisible_by": 128,
        "seq_length": hf.max_position_embeddings,
        "position_embedding_type": "yarn" if rope["rope_type"] == "yarn" else "rope",
        "rotary_base": rope["rope_theta"],
        "rotary_percent": 1.0,
        "rope_scaling": rope["rope_type"] == "llama3",
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "tensor_model_parallel_size": 1,  # as a whole, which any layout can load
        "pipeline_model_parallel_size": 1,
    }
    if rope["rope_type"] != "default":
        model["rope_scaling_factor"] = rope["factor"]
    return model


def point_release_to(checkpoint: Path) -> None:
    """Makes `release`, beside a checkpoint, a link to it, and names it in the tracker."""
    link = checkpoint.with_name(RELEASE + ".partial")
    try:
        link.unlink(missing_ok=True)
        link.symlink_to(checkpoint.name)
    except OSError as error:
        _logger.warning(f"{link}: no link for Megatron-LM to find {checkpoint.name}: {error}")
        return
    link.rename(checkpoint.with_name(RELEASE))  # replaces the link of an earlier one at once
    with write_atomically(checkpoint.with_name(TRACKER)) as tracker:
        tracker.write(RELEASE)


def move_to_release(root: Path) -> None:
    """Turns a folder that is a checkpoint into one that holds it as `release`, with a tracker."""
    files = [path for path in root.iterdir() if path.name != ".receipts"]
    (root / RELEASE).mkdir()
    for path in files:
        path.rename(root / RELEASE / path.name)
    (root / TRACKER).write_text(RELEASE)

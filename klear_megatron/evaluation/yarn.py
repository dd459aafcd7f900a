"""Evaluating a model on longer contexts than it was trained with."""

import json

from transformers import PretrainedConfig

from klear_megatron.evaluation.config import YarnConfig
from klear_megatron.models.yarn import yarn_fields
from klear_megatron.rollout.config import RolloutConfig


def extend_context(config: RolloutConfig, hf: PretrainedConfig, yarn: YarnConfig) -> RolloutConfig:
    """The server settings that extend the context to `yarn.factor` times the training length.

    Raises:
        UserError: the model's rotary embedding is already scaled.
    """
    original = yarn.original_length or hf.max_position_embeddings
    override = yarn_fields(hf.rope_parameters, factor=yarn.factor, original_length=original)
    arguments = ["--json-model-override-args", json.dumps(override)]
    return config.model_copy(
        update={
            "context_length": override["max_position_embeddings"],
            "extra_args": [*config.extra_args, *arguments],
        }
    )

"""More context than a model was trained with, by YaRN (Peng et al. 2023, arXiv 2309.00071)."""

import json

from transformers import PretrainedConfig

from klear_megatron.errors import UserError
from klear_megatron.evaluation.config import YarnConfig
from klear_megatron.rollout.config import RolloutConfig


def extend_context(config: RolloutConfig, hf: PretrainedConfig, yarn: YarnConfig) -> RolloutConfig:
    """The servers' settings for `yarn.factor` times the length that the model was trained with.

    Raises:
        UserError: the model's rotary embedding is scaled already.
    """
    rope = hf.rope_parameters
    if rope["rope_type"] != "default":
        raise UserError(
            f"yarn: the model's config.json has rope type {rope['rope_type']} already; leave yarn "
            "out, or give a model without"
        )
    original = yarn.original_length or hf.max_position_embeddings
    length = int(yarn.factor * original)
    override = {
        "rope_parameters": {
            **rope,
            "rope_type": "yarn",
            "factor": yarn.factor,
            "original_max_position_embeddings": original,
        },
        # SGLang takes no longer context than this.
        "max_position_embeddings": length,
    }
    arguments = ["--json-model-override-args", json.dumps(override)]
    return config.model_copy(
        update={"context_length": length, "extra_args": [*config.extra_args, *arguments]}
    )

"""More context than a model was trained with, by YaRN (Peng et al. 2023, arXiv 2309.00071)."""

from collections.abc import Mapping
from typing import Any

from klear_megatron.errors import UserError


def yarn_fields(
    rope_parameters: Mapping[str, Any], *, factor: float, original_length: int
) -> dict[str, Any]:
    """The fields of config.json that extend a model to `factor` times its length.

    Args:
        rope_parameters: the model's own.
        original_length: tokens that the model was trained with.

    Returns:
        `rope_parameters` and `max_position_embeddings`; SGLang takes no longer context.

    Raises:
        UserError: the model's rotary embedding is scaled already.
    """
    kind = rope_parameters.get("rope_type", "default")
    if kind != "default":
        raise UserError(
            f"yarn: the model's config.json has rope type {kind} already; leave yarn out, or use "
            "a model without scaling"
        )
    rope = {
        **rope_parameters,
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": original_length,
    }
    return {"rope_parameters": rope, "max_position_embeddings": int(factor * original_length)}

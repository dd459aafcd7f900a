"""Properties of Megatron-Core that this package relies on but that its API does not promise.

A failure here means that Megatron-Core has changed; our file that the test names must follow.
"""

import inspect
from typing import Any

import pytest
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer.moe.router import TopKRouter

LANGUAGE_MODEL, ROUTER = "models/language_model.py", "models/router.py"


@pytest.mark.parametrize(
    ("method", "parameters", "ours"),
    [
        (
            GPTModel.forward,
            {"input_ids", "labels", "packed_seq_params", "padding_mask"},
            LANGUAGE_MODEL,
        ),
        (GPTModel._postprocess, {"hidden_states", "labels"}, LANGUAGE_MODEL),
        (ColumnParallelLinear.forward, {"input_", "weight"}, LANGUAGE_MODEL),
        (
            TopKRouter._apply_aux_loss,
            {"probs", "scores_for_aux_loss", "routing_map", "with_padding_mask"},
            ROUTER,
        ),
    ],
)
def test_overridden_methods_take_what_ours_do(method: Any, parameters: set[str], ours: str):
    missing = parameters - inspect.signature(method).parameters.keys()
    assert not missing, f"{method.__qualname__} lost {missing}: adapt klear_megatron/{ours}"


@pytest.mark.parametrize(
    ("caller", "called", "ours"),
    [
        (GPTModel.forward, "self._postprocess(", LANGUAGE_MODEL),
        (GPTModel._postprocess, "self.output_layer(", LANGUAGE_MODEL),
        (TopKRouter.routing, "self._apply_aux_loss(", ROUTER),
    ],
)
def test_megatron_core_calls_what_ours_override(caller: Any, called: str, ours: str):
    assert called in inspect.getsource(caller), (
        f"{caller.__qualname__} no longer calls {called}...): adapt klear_megatron/{ours}"
    )


def test_the_writers_queue_is_a_module_variable():
    assert hasattr(filesystem_async, "_results_queue"), "adapt klear_megatron/policy/writers.py"

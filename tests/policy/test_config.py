import pytest
from pydantic import ValidationError

from klear_megatron.policy.config import CheckpointConfig, ParallelConfig, PolicyConfig

POLICY = {"path": "model", "optimizer": {"lr": 1e-6}}
SELECTIVE = {"recompute_granularity": "selective"}


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        (ParallelConfig, {"virtual_pipeline_model_parallel_size": 2}, "at least 2"),
        (ParallelConfig, {"num_layers_in_first_pipeline_stage": 3}, "of at least 2"),
        (
            ParallelConfig,
            {
                "pipeline_model_parallel_size": 2,
                "virtual_pipeline_model_parallel_size": 2,
                "num_layers_in_last_pipeline_stage": 3,
            },
            r"num_layers_in_last_pipeline_stage 3 needs .* divisible by .* \(2\)",
        ),
        (ParallelConfig, {"overlap_param_gather": True}, "needs overlap_grad_reduce"),
        # Megatron would leave these experts' gradients unreduced and say nothing.
        (
            ParallelConfig,
            {"tensor_model_parallel_size": 2, "expert_tensor_parallel_size": 1},
            "needs expert_model_parallel_size of at least 2",
        ),
        # Transformer Engine would refuse it at the first packed sequence.
        (ParallelConfig, {"context_parallel_comm_type": "a2a+p2p"}, "'p2p', 'all_gather' or 'a2a'"),
        (
            PolicyConfig,
            {**POLICY, "fp8": "delayed", **SELECTIVE, "recompute_modules": ["mlp", "layernorm"]},
            "delayed cannot recompute layernorm",
        ),
        (
            PolicyConfig,
            {
                **POLICY,
                "fp8": "blockwise",
                "fp8_param_gather": True,
                "optimizer": {"lr": 1e-6, "offload_fraction": 0.5},
            },
            "cannot go with optimizer.offload_fraction",
        ),
        (
            PolicyConfig,
            {
                **POLICY,
                "fp8": "mxfp8",
                "fp8_param_gather": True,
                "parallel": {"overlap_grad_reduce": True, "overlap_param_gather": True},
            },
            "cannot go with parallel.overlap_param_gather",
        ),
        (CheckpointConfig, {"keep_every": 10}, "keep_every without keep_last"),
    ],
)
def test_settings_that_cannot_go_together_are_refused(section, values, message):
    with pytest.raises(ValidationError, match=message):
        section.model_validate(values)

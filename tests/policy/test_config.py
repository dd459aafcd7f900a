import pytest
from pydantic import ValidationError

from klear_megatron.policy.config import CheckpointConfig, ParallelConfig


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
        (CheckpointConfig, {"keep_every": 10}, "keep_every without keep_last"),
    ],
)
def test_settings_that_cannot_go_together_are_refused(section, values, message):
    with pytest.raises(ValidationError, match=message):
        section.model_validate(values)

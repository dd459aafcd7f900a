"""The server settings for YaRN; other tests of this folder run a server with them."""

import json
from pathlib import Path

import pytest
from pydantic import ValidationError
from transformers import Qwen3Config

from klear_megatron.errors import UserError
from klear_megatron.evaluation import EvalConfig, YarnConfig
from klear_megatron.evaluation.yarn import extend_context
from klear_megatron.rollout import RolloutConfig
from klear_megatron.rollout.ports import Ports
from klear_megatron.rollout.servers import server_command

ROPE = {"rope_type": "default", "rope_theta": 1e6}


# Some Qwen3 configs say 40960, though the models were trained with 32768.
@pytest.mark.parametrize(("positions", "original"), [(32768, None), (40960, 32768)])
def test_the_command_line_has_the_scaled_positions_and_length(positions, original):
    hf = Qwen3Config(max_position_embeddings=positions, rope_parameters=ROPE)
    rollout = RolloutConfig(extra_args=["--log-level", "debug"])
    config = extend_context(rollout, hf, YarnConfig(factor=2.5, original_length=original))
    words = server_command(config, Path("model"), Ports(30000, 30001))
    assert words[words.index("--context-length") + 1] == "81920"
    override = json.loads(words[words.index("--json-model-override-args") + 1])
    assert override == {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e6,
            "factor": 2.5,
            "original_max_position_embeddings": 32768,
        },
        "max_position_embeddings": 81920,
    }
    assert words[words.index("--log-level") + 1] == "debug"


def test_a_model_that_is_scaled_already_is_refused():
    scaled = {**ROPE, "rope_type": "yarn", "factor": 4.0}
    with pytest.raises(UserError, match="has rope type yarn already"):
        extend_context(RolloutConfig(), Qwen3Config(rope_parameters=scaled), YarnConfig(factor=2))


@pytest.mark.parametrize("rollout", [{"urls": ["http://node7:30000"]}, {"context_length": 4096}])
def test_settings_that_contradict_it_are_refused(rollout):
    benchmarks = {"aime": {"path": "d.jsonl"}}
    values = {"model": "m", "run_dir": "r", "benchmarks": benchmarks, "yarn": {"factor": 2}}
    assert EvalConfig.model_validate(values).yarn == YarnConfig(factor=2)
    with pytest.raises(ValidationError, match="yarn: "):
        EvalConfig.model_validate(values | {"rollout": rollout})

"""Lengths that the servers cannot take are refused under the name of their own setting."""

import pytest
from transformers import Qwen3Config

from klear_megatron.errors import UserError
from klear_megatron.rollout import RolloutConfig, SamplingConfig
from klear_megatron.rollout.external_servers import check_lengths


def test_the_setting_of_an_evaluation_is_named_as_its_own():
    hf = Qwen3Config(max_position_embeddings=100)
    arguments = RolloutConfig(), hf, 60, SamplingConfig(max_response_length=50)
    with pytest.raises(UserError, match=r"^evaluation\.sampling\.max_response_length: 50 tokens"):
        check_lengths(*arguments, section="evaluation.sampling")

"""What is refused before any response is drawn."""

import pytest

from klear_megatron.errors import UserError
from klear_megatron.evaluation.preflight import check_rewards
from klear_megatron.rewards import RewardConfig
from tests.data.test_encoding import CHATML, make_tokenizer


def test_template_that_opens_the_reasoning_asks_for_the_setting():
    opens = make_tokenizer(CHATML.replace("assistant\n{% endif", "assistant\n<think>\n{% endif"))
    with pytest.raises(UserError, match=r"rewards\.thinking: .*set it to opened"):
        check_rewards(opens, RewardConfig())
    check_rewards(opens, RewardConfig(thinking="opened"))
    check_rewards(make_tokenizer(CHATML), RewardConfig())

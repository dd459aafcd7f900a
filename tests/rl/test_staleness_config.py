"""Stale tokens are refused unless their probabilities are corrected."""

import pytest

from klear_megatron.rl.config import RLConfig
from tests.rl.test_buffer_files import config_of


@pytest.mark.parametrize("max_staleness", [1, 4])
def test_staleness_without_a_correction_is_refused(max_staleness):
    with pytest.raises(ValueError, match=rf"max_staleness: {max_staleness} .*set loss.tis_clip"):
        config_of(max_staleness=max_staleness, loss={"name": "gppo"})


@pytest.mark.parametrize(
    "settings",
    [
        {"max_staleness": 0, "loss": {"name": "gppo"}},
        {"max_staleness": 2, "loss": {"name": "gppo", "tis_clip": 2.0}},
        {"max_staleness": 2, "loss": {"name": "gspo", "token_mask": [0.5, 5.0]}},
        {"max_staleness": 2, "loss": {"name": "gppo", "sequence_mask": [0.99, 1.01]}},
        {"max_staleness": 2, "loss": {"name": "gppo"}, "old_log_probs": "server"},
    ],
)
def test_corrected_or_fresh_tokens_are_taken(settings):
    assert isinstance(config_of(**settings), RLConfig)


@pytest.mark.parametrize("correction", [{"tis_clip": 2.0}, {"token_mask": [0.5, 5.0]}])
def test_corrections_of_the_servers_own_probabilities_are_refused(correction):
    with pytest.raises(ValueError, match=r"old_log_probs: server .*remove loss\.tis_clip"):
        config_of(old_log_probs="server", loss={"name": "gppo"} | correction)


def test_entropy_ratios_need_the_trainers_forward_pass():
    loss = {"name": "gppo", "entropy_ratio": [0.95, 1.1]}
    assert config_of(loss=loss | {"tis_clip": 2.0}).loss.uses_old_entropy
    with pytest.raises(ValueError, match="does not say what the entropies were"):
        config_of(old_log_probs="server", loss=loss)

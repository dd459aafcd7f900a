"""What `show` says about responses, without a run."""

from klear_megatron.rl.show import listed, token_by_token

ROW = {
    "index": 7,
    "ground_truth": "18\n76",
    "response": "<think>6+0+0=6</think>\n\\boxed{1889}",
    "tokens": 2,
    "finish_reason": "stop",
    "reward": {"score": -1.0, "correct": False},
    "advantage": -1.0,
    "prompt_ids": [5],
    "token_ids": [3, 4],
    "rollout_log_probs": [-0.5, -1.0],
    "old_log_probs": [-0.5, -1.25],
    "mask": [1, 1],
}


def test_a_line_of_the_list_says_what_was_wanted_and_what_was_answered():
    (_, line) = listed([(3, ROW)])
    assert line.split() == [
        *("3", "7", "-1.00", "no", "2", "stop", "yes", "0.2500", "18", "76"),
        r"'0=6</think>\n\\boxed{1889}'",
    ]


def test_one_response_is_shown_whole_before_its_tokens():
    lines = list(token_by_token(ROW, str))
    assert lines[1] == r"response: '<think>6+0+0=6</think>\n\\boxed{1889}'"
    assert lines[-1].split() == ["1", "4", "-1.0000", "-1.2500", "-0.2500", "yes", "'[4]'"]

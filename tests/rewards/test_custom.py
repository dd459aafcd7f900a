import asyncio
import math
import textwrap
import time
from dataclasses import replace

import numpy as np
import pytest

from klear_megatron.errors import UserError
from klear_megatron.rewards import (
    CustomRewardConfig,
    Job,
    MathRewardConfig,
    Reward,
    RewardConfig,
    RewardPool,
    check_data_sources,
    check_ground_truths,
)
from klear_megatron.rewards.graders import graders_of
from tests.rewards.test_code import SIXTEEN, respond

SOURCE = "math_longcot_math_verify"
RIGHT, WRONG = r"<think></think>\boxed{4}", r"<think></think>\boxed{5} or so"


def length_reward(response, ground_truth, data_source):
    assert data_source in (SOURCE, "essays")
    return len(response) / 100


async def judge(response, ground_truth, data_source):
    await asyncio.sleep(0.5)
    return Reward(score=0.25, correct=True, formatted=False, parts={"judge/clarity": 3.0})


async def never(response, ground_truth, data_source):
    await asyncio.sleep(1e6)


def hang(response, ground_truth, data_source):
    while True:
        pass


def words(response, ground_truth, data_source):
    return "good"


def fail(response, ground_truth, data_source):
    raise KeyError("a bug of the user's")


async def fail_later(response, ground_truth, data_source):
    raise KeyError("a bug of the user's")


def verl_style(data_source, solution_str, ground_truth, extra_info=None, **kwargs):
    assert not kwargs
    right = (solution_str, ground_truth, data_source) == (RIGHT, "4", SOURCE)
    return {"score": np.float32(right), "acc": np.bool_(not right), "pred": "4", **extra_info}


def everything(response_length, *, prompt, response, unknown="default"):
    assert (prompt, response, unknown) == ([{"role": "user", "content": "2+2?"}], RIGHT, "default")
    return np.int64(response_length)


def unbound(answer, ground_truth, data_source):
    return 1.0


def positional(response, /, ground_truth):
    return 1.0


def indifferent(*args, **kwargs):
    return 1.0


def by_ground_truth(ground_truth):
    return {"nan": math.nan, "inf": np.float32("inf"), "of a dict": {"score": math.nan}}.get(
        ground_truth, Reward(score=-math.inf, correct=False, formatted=True)
    )


def custom(name, **settings):
    return CustomRewardConfig(function=f"{__name__}:{name}", **settings)


def grade(jobs, *functions, **settings):
    with RewardPool(RewardConfig(custom=functions, workers=2, **settings)) as pool:
        return pool.grade(jobs)


def test_scores_are_weighted_together_and_each_is_kept():
    jobs = [Job(SOURCE, RIGHT, "4"), Job(SOURCE, WRONG, "4")] * 10
    functions = custom("length_reward", weight=2.0), custom("judge", weight=-1.0)
    start = time.monotonic()
    rewards = grade(jobs, *functions, verifier_weight=0.5)
    assert time.monotonic() - start < 20 * 0.5  # the judge's calls overlap
    for one, reward in zip(jobs, rewards, strict=True):
        right = one.response == RIGHT
        verdict, length = (1.0 if right else -1.0), len(one.response) / 100
        assert reward.score == pytest.approx(0.5 * verdict + 2 * length - 0.25)
        assert (reward.correct, reward.formatted) == (right, True)  # the verifier's verdict
        assert reward.parts == {
            "math": verdict,
            "length_reward": length,
            "judge": 0.25,
            "judge/clarity": 3.0,
        }


def test_parts_of_the_verifier_are_kept_too():
    config = custom("length_reward", data_sources=["essays"])
    (reward,) = grade([Job("coder1_longcot", respond("print('ok')"), SIXTEEN)], config)
    assert reward.score == reward.parts["tests/passed"] == 0.25
    assert "length_reward" not in reward.parts


def test_data_source_without_a_verifier_is_graded_by_functions_alone():
    config = custom("length_reward", data_sources=["essays"])
    (reward,) = grade([Job("essays", "An essay.", "")], config)
    assert reward == Reward(score=0.09, correct=True, formatted=False)
    with pytest.raises(UserError, match=r"'poems': no verifier.*rewards\.custom"):
        check_data_sources(["poems"], RewardConfig(custom=[config]))


def test_function_of_a_file_is_found_by_its_path(tmp_path):
    path = tmp_path / "my_rewards.py"
    path.write_text(
        textwrap.dedent(
            """
            def three(response, ground_truth, data_source):
                return 3
            """
        )
    )
    (reward,) = grade([Job("essays", "", "")], CustomRewardConfig(function=f"{path}:three"))
    assert reward.score == 3


@pytest.mark.parametrize("name", ["hang", "never"])
def test_function_that_does_not_return_scores_nothing_and_delays_nothing(name):
    jobs = [Job(SOURCE, RIGHT, "4")] * 3
    settings = {"math": MathRewardConfig(correct=2.0)}
    for reward in grade(jobs, custom(name, timeout_s=0.5), **settings):
        assert reward.timed_out
        assert reward.correct
        assert reward.score == 2
        assert reward.parts == {"math": 2.0, name: 0.0}


@pytest.mark.parametrize("name", ["fail", "fail_later"])
def test_failure_of_a_function_names_it_the_row_and_the_exception(name):
    with pytest.raises(UserError) as failure:
        grade([Job(SOURCE, RIGHT, "4", index=7)], custom(name))
    (line,) = str(failure.value).splitlines()
    assert f"{__name__}:{name} failed on a response to row 7 of the data" in line
    assert 'KeyError: "a bug of the user\'s"' in line
    assert "test_custom.py, line " in line


@pytest.mark.parametrize(
    ("function", "what"),
    [
        ("no.such.module:function", "cannot import 'no.such.module'"),
        (f"{__name__}:nothing", "cannot import .*nothing"),
        ("/no/such/file.py:function", "cannot import '/no/such/file.py'"),
        (f"{__name__}:SOURCE", "is not a function"),
    ],
)
def test_function_that_is_not_there_is_refused_before_grading(function, what):
    with pytest.raises(UserError, match=f"rewards.custom.function: .*{what}"):
        grade([Job(SOURCE, RIGHT, "4")], CustomRewardConfig(function=function))


def test_parameters_get_their_values_by_name_in_whatever_order():
    job = Job(
        SOURCE,
        RIGHT,
        "4",
        prompt=[{"role": "user", "content": "2+2?"}],
        extra_info={"depth": 3},
        response_length=17,
    )
    both = custom("verl_style"), custom("everything")
    (reward,) = grade([job], *both, verifier_weight=0.0)
    assert reward.score == 1 + 17
    assert reward.parts == {
        "math": 1.0,
        "verl_style": 1.0,
        "verl_style/acc": 0.0,
        "verl_style/depth": 3.0,
        "everything": 17.0,
    }
    (alone,) = grade([replace(job, data_source="mine")], custom("verl_style"))
    assert (alone.score, alone.correct) == (0.0, True)  # as its "acc" says


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("unbound", "nothing can be given for answer"),
        ("positional", "nothing can be given for response"),
        ("indifferent", "it takes no answer"),
    ],
)
def test_function_whose_parameters_are_unknown_is_refused_before_grading(name, what):
    with pytest.raises(UserError, match=f"{name}: {what}.* by name: response, solution_str, "):
        check_data_sources([SOURCE], RewardConfig(custom=[custom(name)]))


@pytest.mark.parametrize("value", ["nan", "inf", "of a dict", "of a Reward"])
def test_score_that_is_not_finite_is_refused_with_the_row(value):
    with pytest.raises(UserError, match=r"the score (nan|inf|-inf) for a response to row 5 of"):
        grade([Job(SOURCE, RIGHT, value, index=5)], custom("by_ground_truth"))


def test_function_that_returns_no_number_is_refused():
    with pytest.raises(UserError, match=r"words returned 'good' for .*; it has to return a number"):
        grade([Job(SOURCE, RIGHT, "4")], custom("words"))


def only_grader(data_source, **settings):
    (grader,) = graders_of(data_source, RewardConfig(**settings))
    return grader


def test_a_source_gets_the_verifier_or_function_that_the_config_gives_it():
    job = Job("openai/gsm8k", RIGHT, "4")
    for settings in (
        {"sources": {"openai/gsm8k": "math"}},
        {"custom": [{"function": "math", "data_sources": ["openai/gsm8k"]}]},
    ):
        assert only_grader(job.data_source, **settings).grade(job).correct
    assert only_grader("math").grade(replace(job, data_source="math")).correct
    own = only_grader("math", sources={"math": f"{__name__}:everything"}, verifier_weight=0.5)
    assert (own.name, own.weight) == ("everything", 0.5)
    sixteen = Job("openai/gsm8k", respond("print('ok')"), SIXTEEN)
    assert only_grader("x", sources={"x": "code"}).grade(sixteen).score == 0.25
    with pytest.raises(UserError, match=r"'openai/gsm8k': no verifier .*rewards\.sources"):
        only_grader("openai/gsm8k")
    with pytest.raises(UserError, match="rows that cannot be graded: 1"):
        check_ground_truths([("x", "4")], RewardConfig(sources={"x": "code"}))


@pytest.mark.parametrize(
    ("thinking", "response", "answers"),
    [
        ("opened", r"easy</think>\boxed{4}", (True, True)),
        ("opened", r"easy \boxed{4}", (False, False)),  # it has not come to an answer
        ("none", r"It is \boxed{4}.", (True, True)),
        ("none", r"It is \boxed{5}.", (False, True)),
        ("required", r"It is \boxed{4}.", (False, False)),
    ],
)
def test_models_that_do_not_write_the_whole_block_are_graded_by_a_setting(
    thinking, response, answers
):
    job = Job(SOURCE, response, "4", thinking=thinking)
    reward = only_grader(SOURCE).grade(job)
    assert (reward.correct, reward.formatted) == answers
    own = only_grader("essays", custom=[custom("length_reward")])
    assert own.grade(replace(job, data_source="essays")).formatted == answers[1]


def test_the_pool_grades_and_reads_answers_as_the_setting_says():
    with RewardPool(RewardConfig(thinking="none", workers=1)) as pool:
        (reward,) = pool.grade([Job("math", r"It is \boxed{4}.", "4")])
        assert reward.correct
        assert pool.read_answers([r"It is \boxed{4}."]) == ["4"]

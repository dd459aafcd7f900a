"""Prompts are chosen by a teacher's answers, drawn from a real server."""

import random
from collections import Counter
from collections.abc import Iterator

import pytest
import yaml

from klear_megatron.curation import CurateConfig, curate
from klear_megatron.errors import UserError
from klear_megatron.rewards import RewardConfig
from klear_megatron.rollout import RolloutConfig, serving
from tests.commands import kill_command, prepare_quickstart
from tests.curation.test_curate import make_row, texts, write
from tests.files import read_lines, read_rows

SAMPLES, PROMPTS = 5, 16


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CurateConfig]:
    folder = tmp_path_factory.mktemp("teacher")
    prepare_quickstart(folder)
    rng = random.Random(0)
    rows = [make_row(f"Sum up {rng.random()}", "essays") for _ in range(PROMPTS)]
    rows.insert(3, make_row("Sum up " + "9" * 100, "essays"))
    rows.insert(5, rows[1])
    rows.append(make_row("As in the exam", "essays"))
    exam = write(folder / "exam.jsonl", [make_row("As in the exam")])
    rollout = RolloutConfig(
        dtype="float32",
        mem_fraction_static=0.1,
        context_length=256,
        start_timeout_s=240,
        extra_args=["--max-total-tokens", "20000"],
    )
    with serving(rollout, folder / "base", folder / "logs") as servers:
        yield CurateConfig.model_validate(
            {
                "path": write(folder / "in.jsonl", rows),
                "output": folder / "out.jsonl",
                "decontaminate": {"against": [exam]},
                "pass_rate": {
                    "teacher": {
                        "model": folder / "base",
                        "samples_per_prompt": SAMPLES,
                        "max_prompt_length": 64,
                        "sampling": {"temperature": 1.0, "max_response_length": 24},
                        # A few at a time, so that the run can be killed in between.
                        "rollout": {"urls": servers.urls, "max_running_requests": 4},
                        "rewards": {
                            "custom": [{"function": "tests.even_reward:even"}],
                            "workers": 1,
                        },
                    }
                },
            }
        )


@pytest.fixture(scope="module")
def killed_and_resumed(config: CurateConfig) -> list[str]:
    """The lines that a killed curation left, the last one cut in half; then it runs to its end."""
    path = config.output.parent / "curate.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    responses = config.output.with_suffix(".teacher") / "responses.jsonl"
    kill_command("curate", str(path), path=responses, lines=10)
    whole = [line for line in read_lines(responses) if line.endswith("\n")]
    assert len(whole) < PROMPTS * SAMPLES
    responses.write_text("".join(whole) + whole[0][:-20])
    assert not config.output.exists()
    curate(config)
    return whole


def test_each_prompt_is_asked_as_often_as_wanted_and_judged_by_its_answers(
    config, killed_and_resumed
):
    drawn = read_rows(config.output.with_suffix(".teacher") / "responses.jsonl")
    rows = read_rows(config.path)
    asked = {text for text in texts(rows) if len(text) < 60 and text != "As in the exam"}
    assert Counter(row["prompt"][0]["content"] for row in drawn) == dict.fromkeys(asked, SAMPLES)
    correct = Counter(row["prompt"][0]["content"] for row in drawn if len(row["response"]) % 2 == 0)
    expected = [text for text in texts(rows) if 2 * correct[text] > SAMPLES]
    assert texts(read_rows(config.output)) == list(dict.fromkeys(expected))
    assert 0 < len(expected) < PROMPTS
    dropped = read_rows(config.output.with_suffix(".dropped.jsonl"))
    why = {row["row"]: (row["reason"], row["why"]) for row in dropped}
    assert why[3] == ("pass rate", "no responses")
    assert why[5] == ("duplicate", "of row 1")
    for i, text in enumerate(texts(rows)):
        if why.get(i, ("",))[0] == "pass rate" and i != 3:
            assert why[i][1] == f"{correct[text]} of {SAMPLES} responses correct"


def test_what_was_drawn_before_the_kill_is_kept(config, killed_and_resumed):
    lines = read_rows(config.output.with_suffix(".teacher") / "responses.jsonl")
    drawn = Counter((row["prompt"][0]["content"], row["response"]) for row in lines)
    path = config.output.parent / "before.jsonl"
    path.write_text("".join(killed_and_resumed))
    before = Counter((row["prompt"][0]["content"], row["response"]) for row in read_rows(path))
    assert before <= drawn


def test_a_finished_teacher_is_not_asked_again_and_another_is_refused(config, killed_and_resumed):
    kept = config.output.read_bytes()
    teacher = config.pass_rate.teacher
    # No server listens there: none is needed.
    elsewhere = teacher.rollout.model_copy(
        update={"urls": ["http://127.0.0.1:9"], "start_timeout_s": 1}
    )

    def curate_with(**changes):
        pass_rate = {"teacher": teacher.model_copy(update={"rollout": elsewhere} | changes)}
        update = {"pass_rate": config.pass_rate.model_copy(update=pass_rate)}
        curate(config.model_copy(update=update))

    curate_with()
    assert config.output.read_bytes() == kept
    with pytest.raises(UserError, match=r"drawn with another seed \(seed was 0, is 1\)"):
        curate_with(seed=1)
    with pytest.raises(UserError, match=r"127\.0\.0\.1:9"):
        curate_with(samples_per_prompt=SAMPLES + 1)


def test_prompts_that_cannot_be_graded_are_refused_before_anything_is_drawn(config, tmp_path):
    rows = [make_row("p", "unheard-of")]
    teacher = config.pass_rate.teacher.model_copy(update={"rewards": RewardConfig()})
    pass_rate = config.pass_rate.model_copy(update={"teacher": teacher})
    changed = {"path": write(tmp_path / "in.jsonl", rows), "output": tmp_path / "out.jsonl"}
    with pytest.raises(UserError, match="unheard-of"):
        curate(config.model_copy(update={**changed, "pass_rate": pass_rate}))
    assert not (tmp_path / "out.teacher" / "logs").exists()

"""A buffer comes back from a checkpoint as it was, and a damaged or foreign one is refused."""

import math
import resource
from pathlib import Path

import pytest

from klear_megatron.data import LoadedPrompts, Prompt
from klear_megatron.errors import UserError
from klear_megatron.losses import AdvantageConfig
from klear_megatron.rewards import Reward
from klear_megatron.rl import buffer_files
from klear_megatron.rl.buffer import Buffer, Slot
from klear_megatron.rl.buffer_files import Held
from klear_megatron.rl.config import RLConfig
from klear_megatron.rl.groups import Group, compared
from klear_megatron.rollout import Response, Share

PROMPTS = LoadedPrompts(
    [Prompt("math", [{"role": "user", "content": str(i)}], str(i), i) for i in range(100)],
    [[i, i + 1] for i in range(100)],
    [],
    0,
)


def config_of(**changes: object) -> RLConfig:
    values = {
        "run_dir": "run",
        "steps": 1,
        "policy": {"path": "model", "optimizer": {"lr": 1e-6}},
        "data": {"path": "data"},
        "responses_per_prompt": 2,
        "max_staleness": 1,
        "loss": {"name": "gppo", "tis_clip": 2.0},
    }
    return RLConfig.model_validate(values | changes)


def text_of(token_ids: list[int]) -> str:
    return " ".join(map(str, token_ids))


def group_of(row: int, scores: tuple[float, float] = (1.0, 0.0)) -> Group:
    responses = [
        Response([row, 5, 6], [-0.5, -1.25, math.nan], "stop", "4", (("3", 2), ("4", 3))),
        Response([row], [-2.0], "length", "3"),
    ]
    rewards = [
        Reward(score, correct=score > 0, formatted=True, parts={"part": score}) for score in scores
    ]
    texts = [text_of(response.token_ids) for response in responses]
    prompt, prompt_ids = PROMPTS.prompts[row], PROMPTS.token_ids[row]
    return compared(prompt, prompt_ids, responses, texts, rewards, AdvantageConfig())


def held() -> Held:
    """Two finished groups, one in flight between them, one that was replaced, and prompts."""
    buffer: Buffer[Group] = Buffer(1, 4, 2)
    slots = [buffer.ask(row) for row in (7, 8, 9, 10)]
    buffer.settle(slots[0], group_of(7), informative=True)
    buffer.settle(slots[2], group_of(9), informative=True)
    buffer.settle(slots[3], group_of(10, (0.0, 0.0)), informative=False)
    return buffer_files.held_by(buffer, [11, 12])


def read(path: Path, config: RLConfig) -> Held:
    return buffer_files.read(path, config, PROMPTS, text_of)


def described(slots: list[Slot[Group]]) -> str:
    """NaN is not equal to itself, but its name is."""
    return repr([(slot.row, slot.group, slot.informative) for slot in slots])


def test_a_buffer_comes_back_as_it_was(tmp_path):
    path = buffer_files.path_of(tmp_path, 0)
    before = held()
    buffer_files.write(path, before, config_of())
    after = read(path, config_of())
    assert [slot.row for slot in after.slots] == [7, 8, 9]
    assert described(after.slots) == described(before.slots)
    assert described(after.replaced) == described(before.replaced)
    assert after.rows == [11, 12]


def test_buffered_groups_are_compared_as_the_config_says_now(tmp_path):
    path = buffer_files.path_of(tmp_path, 0)
    buffer_files.write(path, held(), config_of())
    before = read(path, config_of()).slots[0].group
    now = read(path, config_of(advantages={"estimator": "grpo_without_std"})).slots[0].group
    assert before.advantages == pytest.approx([0.5**0.5, -(0.5**0.5)])
    assert now.advantages == [0.5, -0.5]


def test_an_empty_buffer_comes_back(tmp_path):
    path = buffer_files.path_of(tmp_path, 3)
    buffer_files.write(path, Held([], [], []), config_of())
    assert read(path, config_of()) == Held([], [], [])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"responses_per_prompt": 4}, r"responses_per_prompt: was 2 when .* is 4"),
        ({"max_staleness": 2}, r"max_staleness: was 1 when .* is 2"),
        ({"overlong": {"buffer": 9}}, r"overlong: was None when .* is {'buffer': 9, 'penalty': 1"),
        ({"sampling": {"temperature": 0.7}}, r"sampling.temperature: was 1.0 when .* is 0.7"),
    ],
)
def test_a_buffer_of_another_config_is_refused(tmp_path, change, message):
    path = buffer_files.path_of(tmp_path, 0)
    buffer_files.write(path, held(), config_of())
    with pytest.raises(UserError, match=message):
        read(path, config_of(**change))


def test_a_missing_cut_or_foreign_file_is_refused(tmp_path):
    path = buffer_files.path_of(tmp_path, 0)
    with pytest.raises(UserError, match=r"leader_0.safetensors: the buffer .* cannot be read"):
        read(path, config_of())
    buffer_files.write(path, held(), config_of())
    whole = path.read_bytes()
    for damaged in (whole[:-1], whole[:20], b"", b"{}", whole.replace(b"held", b"hold", 1)):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="the buffer of this checkpoint cannot be read"):
            read(path, config_of())


def test_a_full_disk_is_named(tmp_path):
    path = buffer_files.path_of(tmp_path, 0)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(UserError, match=r"leader_0.safetensors: the buffer cannot be saved"):
            buffer_files.write(path, held(), config_of())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("per_step", [4, 6, 7])
@pytest.mark.parametrize("before", [1, 2, 3, 5])
@pytest.mark.parametrize("after", [1, 2, 3, 5])
def test_other_leaders_get_all_slots_and_none_for_a_later_step(per_step, before, after):
    def step_of(position: int, leader: int, leaders: int) -> int:
        return position // len(range(leader, per_step, leaders))

    last = {}
    held = []
    for leader in range(before):
        size = 2 * len(range(leader, per_step, before)) - leader % 2  # not all are full
        slots: list[Slot[Group]] = [Slot(100 * leader + i) for i in range(max(size, 0))]
        last |= {slot.row: step_of(i, leader, before) for i, slot in enumerate(slots)}
        held.append(Held(slots, [Slot(1000 + leader)], [2000 + leader, 3000 + leader]))
    dealt = [buffer_files.deal(held, per_step, Share(leader, after)) for leader in range(after)]
    for leader, mine in enumerate(dealt):
        for i, slot in enumerate(mine.slots):
            assert step_of(i, leader, after) <= last[slot.row]
    assert sorted(slot.row for mine in dealt for slot in mine.slots) == sorted(last)
    assert sorted(slot.row for mine in dealt for slot in mine.replaced) == [
        1000 + leader for leader in range(before)
    ]
    rows = [row for mine in dealt for row in mine.rows]
    assert sorted(rows) == sorted(row for one in held for row in one.rows)

import json
from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from klear_megatron.data import DataConfig, PromptSampler, StageConfig
from klear_megatron.errors import UserError

SOURCES = ["math"] * 7 + ["code"] * 5 + ["logic"] * 3
CURRICULUM = [
    StageConfig(weights={"math": 1}, prompts=20),
    StageConfig(weights={"math": 1, "code": 3}, prompts=30),
    StageConfig(weights={"code": 2, "logic": 1}),
]


def curriculum(seed=3, stages=CURRICULUM):
    return PromptSampler(len(SOURCES), seed, SOURCES, stages)


def test_every_epoch_is_another_shuffle_of_all_rows():
    sampler = PromptSampler(num_rows=50, seed=3)
    epochs = [sampler.next_batch(50) for _ in range(4)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert all(one != next_one for one, next_one in pairwise([list(range(50)), *epochs]))


def test_seed_alone_fixes_the_order_and_batch_sizes_do_not_matter():
    one, other = PromptSampler(7, seed=3), PromptSampler(7, seed=3)
    assert one.next_batch(30) == [
        row for size in (1, 9, 0, 16, 4) for row in other.next_batch(size)
    ]
    assert PromptSampler(7, seed=4).next_batch(30) != PromptSampler(7, seed=3).next_batch(30)


@given(
    sizes=st.lists(st.integers(0, 20), max_size=8),
    crashes=st.sets(st.integers(0, 8)),
    staged=st.booleans(),
    seed=st.integers(0, 5),
)
@settings(max_examples=200, deadline=None)
def test_resumes_at_the_exact_row_after_any_crashes(sizes, crashes, staged, seed):
    """The state goes through JSON, as in a checkpoint; rows drawn after it are drawn again."""

    def make():
        return curriculum(seed) if staged else PromptSampler(len(SOURCES), seed)

    uninterrupted, sampler = make(), make()
    for step, size in enumerate(sizes):
        state = json.loads(json.dumps(sampler.state_dict()))
        if step in crashes:
            sampler.next_batch(size // 2)  # lost
            sampler = make()
            sampler.load_state_dict(state)
        assert sampler.next_batch(size) == uninterrupted.next_batch(size)


def test_stages_follow_one_another_with_their_mix_of_sources():
    drawn = [SOURCES[row] for row in curriculum().next_batch(20 + 30 + 90)]
    assert Counter(drawn[:20]) == {"math": 20}
    assert Counter(drawn[50:]) == {"code": 60, "logic": 30}
    mixed = Counter()
    for n, source in enumerate(drawn[20:50], start=1):
        mixed[source] += 1
        assert abs(mixed["math"] - n / 4) < 1  # at every point, not only at the end
        assert abs(mixed["code"] - n * 3 / 4) < 1


def test_each_source_goes_through_its_own_epochs_across_stages():
    sampler = curriculum()
    rows = {"math": [], "code": [], "logic": []}
    for row in sampler.next_batch(140):
        rows[SOURCES[row]].append(row)
    for source, drawn in rows.items():
        all_rows = [row for row, of in enumerate(SOURCES) if of == source]
        epochs = [drawn[i : i + len(all_rows)] for i in range(0, len(drawn), len(all_rows))]
        full = [epoch for epoch in epochs if len(epoch) == len(all_rows)]
        assert len(full) >= 3
        assert all(sorted(epoch) == all_rows for epoch in full)


def test_stage_of_a_source_without_rows_is_refused():
    with pytest.raises(UserError, match=r"data\.stages\.1\.weights\.cde: .*did you mean code"):
        curriculum(stages=[CURRICULUM[0], StageConfig(weights={"cde": 1})])


@pytest.mark.parametrize("lengths", [[None, 5], [5, 5], [None, None]])
def test_only_the_last_stage_may_and_must_be_endless(lengths):
    stages = [{"weights": {"math": 1}, "prompts": length} for length in lengths]
    with pytest.raises(ValidationError, match="every stage but the last"):
        DataConfig(path="a.jsonl", stages=stages)


@pytest.mark.parametrize(
    ("num_rows", "seed", "what"), [(8, 3, "number of rows was 7"), (7, 4, "seed")]
)
def test_state_of_other_data_is_refused(num_rows, seed, what):
    with pytest.raises(UserError, match=what):
        PromptSampler(num_rows, seed).load_state_dict(PromptSampler(7, seed=3).state_dict())


def test_state_of_other_rows_is_refused_though_they_are_as_many():
    state = PromptSampler(7, seed=3, fingerprint="a").state_dict()
    PromptSampler(7, seed=3, fingerprint="a").load_state_dict(state)
    with pytest.raises(UserError, match="data: other rows than the checkpoint was made with"):
        PromptSampler(7, seed=3, fingerprint="b").load_state_dict(state)


def test_state_of_other_stages_is_refused():
    sampler = curriculum()
    sampler.next_batch(25)
    with pytest.raises(UserError, match=r"data\.stages: the checkpoint was made in stage 1"):
        curriculum(stages=[StageConfig(weights={"math": 1})]).load_state_dict(sampler.state_dict())
    with pytest.raises(UserError, match=r"data\.stages"):
        curriculum(stages=[CURRICULUM[0], StageConfig(weights={"logic": 1})]).load_state_dict(
            sampler.state_dict()
        )

import contextlib
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from klear_megatron.errors import UserError
from klear_megatron.rewards import (
    CustomRewardConfig,
    Job,
    MathRewardConfig,
    RewardConfig,
    RewardPool,
    math_reward,
)

SOURCE = "math_longcot_math_verify"
HANGING = r"<think>big</think>\boxed{9^{9^{9^{9}}}}"
LIMIT_S = 2.0


def job(response: str, ground_truth: str = "4") -> Job:
    return Job(SOURCE, response, ground_truth)


def workers_of(pid: int) -> set[psutil.Process]:
    """Child processes of `pid` that grade: all but multiprocessing's own resource tracker."""
    return {
        child
        for child in psutil.Process(pid).children(recursive=True)
        if not any("resource_tracker" in argument for argument in child.cmdline())
    }


@pytest.fixture(scope="module")
def pool():
    config = RewardConfig(math=MathRewardConfig(cpu_limit_s=LIMIT_S), workers=2)
    with RewardPool(config) as pool:
        pool.grade([job(""), job("")])  # so that no test pays for the start
        yield pool


def in_thread(function):
    result = []
    thread = threading.Thread(target=lambda: result.append(function()))
    thread.start()
    thread.join()
    return result[0]


def test_reads_answers_alike_however_they_are_written_and_gives_up_on_long_ones(pool):
    nested = "(" * 3000 + "1" + ")" * 3000  # takes math-verify minutes
    long = "1" + "0" * 9999
    contents = [r"\frac{1}{2}", "1/2", "7", nested, long]
    texts = [f"<think></think>\\boxed{{{content}}}" for content in contents]
    half, same, seven, given_up, number, empty, unfinished = pool.read_answers(
        [*texts, "<think></think>", r"<think>\boxed{7}"]
    )
    assert half == same is not None
    assert (seven, given_up, number, empty, unfinished) == ("7", None, long, None, None)
    assert pool.read_answers([]) == []


def test_grades_like_the_plain_function_in_the_order_of_the_jobs(pool):
    responses = [rf"<think>{i}</think>\boxed{{{i}}}" for i in range(40)] + [r"\boxed{4}"]
    done = []
    rewards = pool.grade([job(response) for response in responses], on_done=done.append)
    assert rewards == [math_reward(response, "4") for response in responses]
    assert sorted(done) == list(range(len(responses)))


def meet(response, ground_truth, data_source):
    """Returns once both workers are here: one that is still starting would grade nothing."""
    (Path(response) / str(os.getpid())).touch()
    while len(os.listdir(response)) < 2:
        time.sleep(0.01)
    return 1


@pytest.mark.parametrize("call", [lambda function: function(), in_thread], ids=["main", "thread"])
def test_hanging_answer_ends_at_its_limit_while_others_are_graded(call, tmp_path):
    done_at = {}

    def grade():
        start = time.monotonic()
        return pool.grade(
            [job(HANGING)] + [job(r"<think></think>\boxed{4}")] * 20,
            on_done=lambda i: done_at.setdefault(i, time.monotonic() - start),
        )

    config = RewardConfig(
        math=MathRewardConfig(cpu_limit_s=LIMIT_S),
        custom=[CustomRewardConfig(function=f"{__name__}:meet", data_sources=["meeting"])],
        workers=2,
    )
    with RewardPool(config) as pool:
        pool.grade([Job("meeting", str(tmp_path), "")] * 2)
        hanging, *others = call(grade)
    assert hanging.timed_out
    assert not hanging.correct
    assert hanging.formatted
    assert hanging.score == -1.0
    assert all(reward.correct and not reward.timed_out for reward in others)
    assert LIMIT_S <= done_at[0] < config.math.wall_limit_s
    assert max(done_at[i] for i in range(1, 21)) < done_at[0]


def test_pools_of_one_host_share_its_processes():
    before = workers_of(os.getpid())
    with RewardPool(RewardConfig(workers=4), sharers=2) as pool:
        pool.grade([job("")] * 8)
        assert len(workers_of(os.getpid()) - before) == 2
    with RewardPool(RewardConfig(workers=1), sharers=2) as pool:
        assert pool.grade([job(r"<think></think>\boxed{4}")])[0].correct


def test_ended_workers_are_replaced(pool):
    assert all(reward.timed_out for reward in pool.grade([job(HANGING)] * 3))
    assert pool.grade([job(r"<think></think>\boxed{4}")])[0].correct
    assert pool.crashes == 0


def kill_at_work(worker: psutil.Process) -> None:
    idle = worker.cpu_times().user
    while worker.cpu_times().user < idle + 0.3:
        time.sleep(0.05)
    worker.kill()


def test_crashed_worker_makes_its_answer_wrong_and_is_counted():
    before = workers_of(os.getpid())
    config = RewardConfig(math=MathRewardConfig(cpu_limit_s=30), workers=1)
    with RewardPool(config) as pool:
        pool.grade([job("")])
        (worker,) = workers_of(os.getpid()) - before
        threading.Thread(target=kill_at_work, args=[worker]).start()
        crashed, graded = pool.grade([job(HANGING), job(r"<think></think>\boxed{4}")])
        assert not crashed.correct
        assert not crashed.timed_out
        assert graded.correct
        assert pool.crashes == 1


def test_pool_survives_a_worker_that_dies_between_two_calls():
    before = workers_of(os.getpid())
    with RewardPool(RewardConfig(workers=1)) as pool:
        pool.grade([job("")])
        (worker,) = workers_of(os.getpid()) - before
        worker.kill()
        deadline = time.monotonic() + 20
        while pool._pool.active:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert pool.grade([job(r"<think></think>\boxed{4}")])[0].correct


def grade_until_the_pool_ends(pool, jobs):
    with contextlib.suppress(RuntimeError):
        pool.grade(jobs)


def test_leaving_the_context_leaves_no_process_even_with_work_under_way():
    before = workers_of(os.getpid())
    config = RewardConfig(math=MathRewardConfig(cpu_limit_s=60), workers=2)
    with RewardPool(config) as pool:
        pool.grade([job("")])
        threading.Thread(target=grade_until_the_pool_ends, args=[pool, [job(HANGING)]]).start()
        time.sleep(1)
        workers = workers_of(os.getpid()) - before
        assert len(workers) == 2
    assert not any(worker.is_running() for worker in workers)


def test_workers_end_when_their_parent_is_killed(tmp_path: Path):
    script = tmp_path / "parent.py"
    script.write_text(
        f"""
from klear_megatron.rewards import Job, MathRewardConfig, RewardConfig, RewardPool

if __name__ == "__main__":
    config = RewardConfig(math=MathRewardConfig(cpu_limit_s=2), workers=2)
    with RewardPool(config) as pool:
        pool.grade([{job("")!r}])
        print("ready", flush=True)
        pool.grade([{job(HANGING)!r}])  # one worker is busy, the other idle
"""
    )
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == "ready\n"
        time.sleep(1)
        workers = workers_of(parent.pid)
        assert len(workers) == 2
        parent.kill()
    _, alive = psutil.wait_procs(workers, timeout=50)
    assert not alive


def test_unknown_data_source_is_refused_by_name(pool):
    with pytest.raises(UserError, match=r"'mathh'.*math_longcot_math_verify"):
        pool.grade([Job("mathh", "", "4")])


def test_benchmark_named_after_a_verifier_is_graded_by_it(pool):
    jobs = [Job("math_longcot_math_verify_aime2024", r"<think></think>\boxed{4}", "4")]
    assert pool.grade(jobs)[0].correct

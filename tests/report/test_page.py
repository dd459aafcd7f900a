"""The report page in a real browser, of folders that the package's own writers made."""

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from playwright.sync_api import Page, sync_playwright

from klear_megatron.data import Prompt
from klear_megatron.errors import UserError
from klear_megatron.evaluation.config import BenchmarkConfig, EvalConfig
from klear_megatron.evaluation.responses import response_row
from klear_megatron.evaluation.stored import append_row, claim, folder_of
from klear_megatron.observability import Recorder, RolloutFiles, append_usage
from klear_megatron.planning import PlannedModel, Work, plan, read_hardware
from klear_megatron.policy.config import PolicyConfig
from klear_megatron.probing.plots import draw
from klear_megatron.report.page import write_report
from klear_megatron.report.runs import find_runs
from klear_megatron.rewards import Reward
from klear_megatron.rollout import Response
from tests.models import tiny

STEPS, RESPONSES = 20, 500
HOSTILE = "</script><img src=x onerror=\"document.title='broken'\"> \u2028 ]]>"


def write_rl_run(folder: Path, lr: float) -> None:
    folder.mkdir()
    (folder / "config.yaml").write_text(
        yaml.safe_dump(
            {"prompts_per_step": 4, "policy": {"path": str(folder.parent / "base"), "lr": lr}}
        )
    )
    gpus = {"NVIDIA H100": 2}
    append_usage(folder, first_step=1, ranks=gpus, cores=9, servers={"GPU": 4})
    append_usage(folder, first_step=15, ranks={"NVIDIA H100": 8}, cores=9, servers={"GPU": 4})
    # Again from the same checkpoint, with fewer GPUs: the last one to take a step counts.
    append_usage(folder, first_step=11, ranks=gpus, cores=9, servers={"GPU": 2})
    with Recorder(folder) as recorder:
        for step in range(1, STEPS + 1):
            metrics = {"reward/mean": step / 10, "train/loss": float("nan"), "rollout/tokens": 50.0}
            metrics |= {"seconds/generate": 3.0, "seconds/train": 2.0, "seconds/total": 6.0}
            metrics |= {"throughput/mfu": 0.4, "throughput/trained_per_second": 10.0}
            metrics |= {"flops/train": 1e15, "flops/generate": 5e14}
            recorder.write(step, metrics | {"memory/peak_gib": float(step)})


def write_plans(folder: Path) -> None:
    """A search of two layouts, and what the run `fast` planned and measured."""
    planned = plan(
        PolicyConfig.model_validate({"path": folder / "base", "optimizer": {"lr": 1e-6}}),
        Work((16, 16)),
        gpus=2,
        hardware=read_hardware("h100"),
    ).as_json()
    (folder / "search.json").write_text(json.dumps([planned, planned]))
    step = {"step_of_start": 2, "planned": {"seconds": 1.5, "gib": 2.5}}
    step["measured"] = {"seconds": 1.25, "gib": 3.5}
    (folder / "fast" / "plan.json").write_text(json.dumps({"plan": planned, "steps": [step]}))


def write_rollouts(folder: Path) -> None:
    files = RolloutFiles(folder)
    for step in range(1, STEPS + 1):
        rows = []
        for number in range(RESPONSES):
            source = "math" if number % 5 else "code"
            prompt = Prompt(source, [{"role": "user", "content": f"1+{number}?"}], "2", number)
            right = number % 2 == 0
            reward = Reward(score=1.0 if right else -1.0, correct=right, formatted=True)
            text = HOSTILE if step == 7 and number == 3 else f"answer {number} of step {step}"
            response = Response([1] * (10 + step), [0.0] * (10 + step), "stop", "0")
            rows.append(response_row(prompt, text, response, reward, advantage=0.5))
        files.write_texts(step, 0, rows)
    files.write_tokens(STEPS, 0, map(token_row, range(RESPONSES)))


def token_row(number: int) -> dict[str, Any]:
    """Three tokens: one that the trainer finds less likely, one not trained, and one unknown."""
    return {
        "prompt_ids": [1],
        "token_ids": [2, 3, 4],
        "rollout_log_probs": [-1.0, -1.0, None],
        "old_log_probs": [-1.5, -1.0, -1.0] if number else None,
        "mask": [1, 0, 1] if number else None,
        "clipped": [1, 0, 2] if number else None,
    }


def write_evaluation(folder: Path, right: set[int]) -> None:
    """Four problems with two samples each; those in `right` are answered."""
    folder.mkdir()
    benchmarks = {"arithmetic": BenchmarkConfig(path=Path("x.jsonl"), samples_per_problem=2)}
    config = EvalConfig(model=folder.parent / "base", run_dir=folder, benchmarks=benchmarks)
    (folder / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    place = folder_of(folder, "arithmetic")
    claim(place, {"problems": 4, "samples_per_problem": 2})
    drawn = {"tokens": 100, "sequence_tokens": 150, "sequence_squares": 3000}
    append_usage(folder, ranks={}, cores=4, servers={"CPU": 1}, seconds=1800.0, **drawn)
    for index in range(8):
        problem = index // 2
        prompt = Prompt("math", [{"role": "user", "content": f"problem {problem}"}], "1", problem)
        is_right = problem in right
        reward = Reward(score=float(is_right), correct=is_right, formatted=True)
        row = response_row(prompt, "1", Response([5], [0.0], "stop", "0"), reward, answer="1")
        append_row(place, row)


def write_probe(folder: Path) -> None:
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump({"policy": {"path": "base"}}))
    windows = [{"start": 1, "end": 3, "perplexity": 2.0}, {"start": 3, "end": 5, "perplexity": 3.0}]
    draw({"": {"positions": windows}}, folder / "probe.png")


@dataclass(frozen=True)
class Opened:
    page: Page
    complaints: list[str]
    requests: list[str]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    config = tiny.qwen3()
    config.architectures = ["Qwen3ForCausalLM"]
    config.save_pretrained(folder / "base")
    tiny.write_tokenizer(folder / "base")
    write_rl_run(folder / "slow", 1e-6)
    write_rl_run(folder / "fast", 1e-5)
    write_rollouts(folder / "fast")
    write_plans(folder)
    write_evaluation(folder / "eval-a", {0})
    write_evaluation(folder / "eval-b", {0, 1, 2})
    write_probe(folder / "probe")
    return folder


@pytest.fixture(scope="module")
def opened(runs: Path) -> Iterator[Opened]:
    out = runs / "report.html"
    names = ("slow", "fast", "eval-a", "eval-b", "probe", "search.json")
    write_report([runs / name for name in names], out, rollouts=STEPS * RESPONSES, price=2.0)
    complaints: list[str] = []
    requests: list[str] = []
    with sync_playwright() as playwright:
        # Root, as in a container, has no user namespaces of Chromium's own.
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        )
        page = browser.new_context(offline=True).new_page()
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(out.as_uri())
        page.wait_for_selector("body[data-ready]")
        yield Opened(page, complaints, requests)
        browser.close()


def count_shown(page: Page) -> int:
    text = page.locator("#rollouts output").inner_text()
    return int(re.match(r"[\d,]+", text).group().replace(",", ""))  # type: ignore[union-attr]


def test_the_page_draws_every_section_and_asks_for_nothing_else(opened: Opened, runs: Path):
    page = opened.page
    for plot in page.locator(".plot").all():
        plot.scroll_into_view_if_needed()
    page.wait_for_function("charts.every((plot) => plot.drawn)")
    # Reward and loss of both runs, their seconds, and two distributions of one.
    assert page.locator(".plot .main-svg").count() >= 2 + 2 + 2
    assert opened.complaints == []
    assert opened.requests == [(runs / "report.html").as_uri()]


def test_runs_are_overlaid_and_smoothed(opened: Opened):
    page = opened.page
    page.locator("#curves").scroll_into_view_if_needed()
    traces = "charts.find((c) => c.parentElement.textContent.startsWith('mean')).data"
    page.wait_for_function(f"{traces} !== undefined")
    assert page.evaluate(f"{traces}.map((t) => t.name)") == ["slow", "fast"]
    page.locator("#smoothing").fill("0.5")
    names = page.evaluate(f"{traces}.map((t) => t.name ?? 'raw')")
    assert names.count("slow") == names.count("fast") == 1
    assert len(names) == 4
    smoothed = page.evaluate(f"{traces}.at(-1).y")
    # 0.1, then (0.05 + 0.2) / 1.5, then (0.025 + 0.1 + 0.3) / 1.75
    assert smoothed[:3] == pytest.approx([0.1, 0.25 / 1.5, 0.425 / 1.75])


def test_metrics_that_never_move_are_told_in_a_line(opened: Opened):
    curves = opened.page.locator("#curves")
    assert "The same at every step: mfu 0.4, trained_per_second 10." in curves.inner_text()
    assert "mfu" not in curves.locator(".card h4").all_inner_texts()
    assert "mean" in curves.locator(".card h4").all_inner_texts()


def test_the_account_sums_up_the_steps(opened: Opened, runs: Path):
    rows = opened.page.locator("#account tbody tr").all()
    slow, fast, evaluation, _, together = [row.locator("td").all_inner_texts() for row in rows]
    hours, generated, trained = 6 * STEPS / 3600, 50 * STEPS, 10 * 2 * STEPS
    gpu_hours = (10 * 6 + 10 * 4) * 6 / 3600
    assert slow == [
        "slow",
        "2 × NVIDIA H100, servers 4 × GPU / 2 × NVIDIA H100, servers 2 × GPU",
        f"{60 * hours:.1f} min",
        f"{gpu_hours:.3g} GPU h",
        f"{2 * gpu_hours:.2f}",
        f"{generated:,}",
        str(trained),
        "3.00e+16",
        "40.0 %",
        str(STEPS),
    ]
    assert fast[1:] == slow[1:]
    flops = PlannedModel.read(runs / "base").forward_flops(150, 3000)
    on_cpu = ["servers 1 × CPU, 4 cores", "30.0 min", "2 core h", "–", "100", "–", f"{flops:.2e}"]
    assert evaluation[1:-2] == on_cpu
    # Device hours of GPUs and of cores are not added up.
    both = [f"{2 * hours + 1:.2f} h", "–", "–", f"{2 * generated + 200:,}", str(2 * trained)]
    assert together[2:-3] == both


def test_plans_are_shown_beside_what_was_measured(opened: Opened):
    planned, measured = opened.page.locator("#plans table").all()
    rows = planned.locator("tbody tr").all()
    assert [row.locator("td").first.inner_text() for row in rows] == ["fast", *2 * ["search.json"]]
    assert rows[0].locator("td").nth(1).inner_text() == "1: DP 2, recompute none"
    cells = measured.locator("tbody td").all_inner_texts()
    assert cells == ["fast", "2", "1.5", "1.25", "2.5", "3.5"]
    memory = "charts.find((c) => c.parentElement.textContent.startsWith('memory by kind'))"
    opened.page.locator("#plans").scroll_into_view_if_needed()
    opened.page.wait_for_function(f"{memory}.data !== undefined")
    by_kind = opened.page.evaluate(
        f"Object.fromEntries({memory}.data.map((t) => [t.name, t.x[0]]))"
    )
    assert by_kind["overhead"] > 4  # GiB, of which the hardware has 4
    assert "reference" not in by_kind


def test_settings_that_differ_are_shown(opened: Opened):
    text = opened.page.locator("#runs details").inner_text()
    assert "policy.lr" in text
    assert "1e-05" in text
    assert "prompts_per_step" not in text


def test_ten_thousand_rollouts_are_filtered_and_only_those_in_sight_exist(opened: Opened):
    page = opened.page
    assert count_shown(page) == STEPS * RESPONSES
    rows = page.locator("#rollouts .row:not(.head)")
    assert rows.count() < 60
    page.locator("#rollouts .list").evaluate("(list) => list.scrollTo(0, list.scrollHeight)")
    page.wait_for_function(
        "[...document.querySelectorAll('#rollouts .row')].some((row) => "
        f"row.style.top === '{30 * (STEPS * RESPONSES - 1)}px')"
    )
    assert rows.count() < 60
    page.locator("#filter-source").select_option("code")
    page.locator("#filter-step-from").fill("5")
    page.locator("#filter-step-to").fill("6")
    page.locator("#filter-reward-from").fill("0")
    assert count_shown(page) == 2 * RESPONSES // 5 // 2
    page.locator("#filter-text").fill("answer 40 of step 6")
    assert count_shown(page) == 1
    rows.first.click()
    assert "answer 40 of step 6" in page.locator(".detail .response").inner_text()
    assert "advantage 0.5" in page.locator(".detail .parts").inner_text()
    for name in ("text", "step-from", "step-to", "reward-from"):
        page.locator(f"#filter-{name}").fill("")
    page.locator("#filter-source").select_option("")


def test_a_response_that_looks_like_a_script_is_text(opened: Opened):
    page = opened.page
    page.locator("#filter-text").fill("onerror")
    assert count_shown(page) == 1
    assert page.locator(".detail .response").evaluate("(pre) => pre.textContent") == HOSTILE
    assert page.title() == "6 runs"
    page.locator("#filter-text").fill("")


def test_tokens_are_coloured_by_the_difference_of_the_log_probabilities(opened: Opened):
    page = opened.page
    page.locator("#filter-step-from").fill(str(STEPS))
    rows = page.locator("#rollouts .row:not(.head)")
    rows.nth(0).click()  # not trained on: the trainer has no log-probabilities of it
    assert page.locator(".detail .response .token").count() == 0
    rows.nth(1).click()
    tokens = page.locator(".detail .response .token")
    titles = [token.get_attribute("title") for token in tokens.all()]
    assert titles == [
        "trainer − server: -0.5000; clipped below",
        "trainer − server: 0.0000; not trained on",
        "trainer − server: unknown; clipped above",
    ]
    line = "getComputedStyle(token).borderBottomColor"
    sides = [token.evaluate(f"(token) => {line}") for token in tokens.all()]
    assert (sides[0], sides[2]) == ("rgb(194, 65, 12)", "rgb(21, 128, 61)")
    color = "getComputedStyle(token).backgroundColor"
    assert tokens.nth(0).evaluate(f"(token) => {color}") == "rgb(220, 38, 38)"
    page.locator("#filter-step-from").fill("")


def test_evaluations_are_compared_problem_by_problem(opened: Opened):
    text = opened.page.locator("#evaluations").inner_text()
    assert "25.0 % ± 25.0 %" in text
    assert "75.0 % ± 25.0 %" in text
    assert "better on 2 problems, worse on 0, the same on 2" in text
    assert "problem 1" in text


def test_a_probes_picture_is_in_the_page(opened: Opened):
    (picture,) = opened.page.locator("#pictures img").all()
    assert picture.evaluate("(image) => image.naturalWidth") > 300


def test_nothing_is_wider_than_a_phone(opened: Opened):
    page = opened.page
    page.set_viewport_size({"width": 390, "height": 844})
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.set_viewport_size({"width": 1366, "height": 900})


def test_a_folder_stands_for_the_runs_in_it(runs: Path):
    found = find_runs([runs])
    assert {(run.name, run.kind) for run in found} == {
        ("slow", "rl"),
        ("fast", "rl"),
        ("eval-a", "evaluation"),
        ("eval-b", "evaluation"),
        ("probe", "probe"),
    }
    steps, values = found[0].curves["train/loss"]
    assert steps == list(range(1, STEPS + 1))
    assert set(values) == {None}


def test_runs_of_the_same_name_are_told_apart_by_their_folders(runs: Path, tmp_path: Path):
    shutil.copytree(runs / "slow", tmp_path / "slow")
    names = [run.name for run in find_runs([runs / "slow", tmp_path / "slow"])]
    assert names == [f"{runs.name}/slow", f"{tmp_path.name}/slow"]


def test_half_a_line_of_a_killed_run_is_left_out(runs: Path, tmp_path: Path):
    shutil.copytree(runs / "slow", tmp_path / "slow")
    with (tmp_path / "slow" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 21, "reward/me')
    assert find_runs([tmp_path / "slow"])[0].steps == STEPS


def test_what_is_no_run_is_named(runs: Path, tmp_path: Path):
    with pytest.raises(UserError, match="no run there"):
        find_runs([tmp_path])
    (tmp_path / "plan.json").write_text("[1]")
    with pytest.raises(UserError, match=r"plan.json: has no plans; `klear-megatron plan --json`"):
        find_runs([tmp_path / "plan.json"])
    shutil.copytree(runs / "slow", tmp_path / "slow")
    (tmp_path / "slow" / "metrics.jsonl").write_text("{}\nnonsense\n")
    with pytest.raises(UserError, match=r"metrics.jsonl:1: has no step"):
        find_runs([tmp_path])


def test_the_page_says_which_evaluation_is_not_finished(runs: Path, tmp_path: Path):
    shutil.copytree(runs / "eval-a", tmp_path / "eval-a")
    path = tmp_path / "eval-a" / "benchmarks" / "arithmetic" / "responses.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    write_report([tmp_path / "eval-a"], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    data = re.search(r'id="data">(.*?)</script>', page).group(1)  # type: ignore[union-attr]
    assert "has 7 responses, and more are wanted" in json.loads(data)["notes"][0]

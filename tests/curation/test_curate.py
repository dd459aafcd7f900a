"""Curation agrees with brute force."""

import itertools
import json
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from klear_megatron.curation import CurateConfig, curate
from klear_megatron.curation.k_center import k_center_greedy
from klear_megatron.curation.text import hashed_vector
from klear_megatron.errors import UserError

MATH, CODE = "math_longcot_math_verify", "coder1_longcot"


def make_row(text, source=MATH, ground_truth="4", **more):
    return {
        "data_source": source,
        "prompt": [{"role": "user", "content": text}],
        "reward_model": {"ground_truth": ground_truth, "style": "rule"},
        **more,
    }


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(tmp_path, rows, **settings):
    """The kept rows, the report, and the dropped rows by reason."""
    path = rows if isinstance(rows, (Path, tuple)) else write(tmp_path / "in.jsonl", rows)
    report = curate(CurateConfig(path=path, output=tmp_path / "out.jsonl", **settings))
    kept = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    dropped = {}
    for line in (tmp_path / "out.dropped.jsonl").read_text().splitlines():
        row = json.loads(line)
        dropped.setdefault(row["reason"], {})[row["row"]] = row["why"]
    assert report.kept == len(kept)
    assert report.rows == report.kept + report.dropped.total()
    numbers = json.loads((tmp_path / "out.report.json").read_text())
    assert (numbers["rows"], numbers["kept"]) == (report.rows, report.kept)
    assert not list(tmp_path.glob("*.partial*"))
    return kept, report, dropped


def texts(rows):
    return [row["prompt"][0]["content"] for row in rows]


def random_text(rng, words=20, vocabulary=3):
    separators = [" ", "  ", ", ", "\n", ". "]
    return "".join(
        rng.choice("abcdefgh"[:vocabulary]).upper() + rng.choice(separators)
        if rng.random() < 0.3
        else rng.choice("abcdefgh"[:vocabulary]) + rng.choice(separators)
        for _ in range(rng.randint(0, words))
    )


def share_an_ngram(one, other, n):
    """Applies the definition: compares every pair of positions."""

    def words(text):
        return "".join(c if c.isalnum() else " " for c in text.lower()).split()

    a, b = words(one), words(other)
    if min(len(a), len(b)) < n:
        return bool(a) and a == b and len(a) < n
    return any(
        a[i : i + n] == b[j : j + n] for i in range(len(a) - n + 1) for j in range(len(b) - n + 1)
    )


@pytest.mark.parametrize("seed", range(5))
def test_deduplication_is_brute_forces(tmp_path, seed):
    rng = random.Random(seed)
    rows = [make_row(random_text(rng, words=3, vocabulary=2) or "x") for _ in range(200)]
    kept, _, dropped = run(tmp_path, rows)
    expected = []
    for i, text in enumerate(texts(rows)):
        earlier = [j for j in range(i) if texts(rows)[j].split() == text.split()]
        if earlier:
            assert dropped["duplicate"][i] == f"of row {earlier[0]}"
        else:
            expected.append(rows[i])
    assert kept == expected
    assert 0 < len(kept) < len(rows)


@pytest.mark.parametrize("n", [1, 3, 9])
@pytest.mark.parametrize("seed", range(4))
def test_decontamination_is_brute_forces(tmp_path, seed, n):
    rng = random.Random(seed)
    vocabulary = {1: 8, 3: 8, 9: 2}[n]
    length = {1: 3, 3: 8, 9: 40}[n]
    evaluation = [make_row(random_text(rng, length, vocabulary) or "z") for _ in range(8)]
    rows = [make_row(random_text(rng, length, vocabulary) or "x") for _ in range(150)]
    config = {"against": [write(tmp_path / "eval.jsonl", evaluation)], "n": n, "boilerplate": 99}
    kept, _, dropped = run(tmp_path, rows, decontaminate=config, deduplicate=False)
    clean = [
        row
        for row in rows
        if not any(share_an_ngram(texts([row])[0], text, n) for text in texts(evaluation))
    ]
    assert kept == clean
    assert 0 < len(kept) < len(rows)
    assert all("eval.jsonl, row" in why for why in dropped["contaminated"].values())


def test_evaluation_sets_are_read_by_the_columns_and_the_split_that_are_named(tmp_path):
    problem = "Count the ways to tile a board of two by n."
    folder = tmp_path / "exam"
    folder.mkdir()
    write(folder / "test.jsonl", [{"question": problem, "answer": "#### 4"}])
    write(folder / "train.jsonl", [{"question": "Add one and one.", "answer": "#### 2"}])
    columns = {"prompt_key": "question", "ground_truth_key": "answer", "data_source": "math"}
    against = [{"path": folder, "split": "test", **columns}]
    rows = [make_row(problem), make_row("Add one and one.")]
    kept, _, dropped = run(tmp_path, rows, decontaminate={"against": against})
    assert kept == rows[1:]
    assert dropped["contaminated"][0].endswith(f"is in {folder}, row 0")


def test_what_needs_no_rows_is_refused_before_they_are_read(tmp_path):
    (tmp_path / "in.jsonl").write_text("no row\n")
    with pytest.raises(UserError, match=r"nowhere\.jsonl: no such data file"):
        run(tmp_path, tmp_path / "in.jsonl", decontaminate={"against": ["nowhere.jsonl"]})
    teacher = {"model": "nowhere", "samples_per_prompt": 2}
    with pytest.raises(UserError, match="nowhere: no such folder"):
        run(tmp_path, tmp_path / "in.jsonl", pass_rate={"teacher": teacher})


def test_instructions_that_many_problems_share_are_no_contamination(tmp_path):
    instructions = "You will write a program that passes all of the tests. "
    problem = "Count the ways to tile a board of two by n."
    evaluation = [make_row(instructions + f"Problem {i}: {problem} {i}") for i in range(3)]
    evaluation += evaluation * 9  # the same problem many times is still one problem
    path = write(tmp_path / "eval.jsonl", evaluation)
    rows = [make_row(instructions + "Add."), make_row(f"Problem 1: {problem}")]
    kept, _, _ = run(tmp_path, rows, decontaminate={"against": [path], "boilerplate": 2})
    assert kept == rows[:1]
    with pytest.raises(UserError, match="nothing is left"):
        run(tmp_path, rows, decontaminate={"against": [path], "boilerplate": 3})


def test_programming_problems_with_too_few_tests_are_dropped(tmp_path):
    def tests(n):
        return json.dumps({"inputs": ["1"] * n, "outputs": ["1"] * n})

    rows = [make_row(f"p{n}", CODE, tests(n)) for n in (15, 16, 17)] + [make_row("math")]
    kept, report, dropped = run(tmp_path, rows, min_tests=16)
    assert kept == rows[1:]
    assert report.dropped == {"too few tests": 1}
    assert dropped["too few tests"] == {0: "15 tests"}


def test_columns_of_other_formats_are_read_as_named(tmp_path):
    rows = [{"question": text, "answer": "#### 4"} for text in ("2+2?", "1+3?", "2+2?")]
    columns = {"prompt_key": "question", "ground_truth_key": "answer", "data_source": "math"}
    kept, report, dropped = run(tmp_path, rows, **columns)
    assert kept == rows[:2]
    assert dropped == {"duplicate": {2: "of row 0"}}
    assert report.sources == {"math": 2}


def test_of_equal_prompts_one_that_passes_the_other_filters_is_kept(tmp_path):
    few, enough = (json.dumps({"inputs": ["1"] * n, "outputs": ["1"] * n}) for n in (1, 16))
    rows = [make_row("p", CODE, few), make_row("p", CODE, enough), make_row("p", CODE, enough)]
    assert run(tmp_path, rows, min_tests=16)[0] == rows[1:2]


def test_pass_rate_of_stored_responses_decides(tmp_path):
    rows = [make_row(f"problem {i}") for i in range(18)]
    stored = [
        {"prompt": row["prompt"], "response": "…", "reward": {"correct": k < i, "score": 1.0}}
        for i, row in enumerate(rows[:17])
        for k in range(16)
    ]
    random.Random(0).shuffle(stored)
    paths = [
        write(tmp_path / "r0.jsonl", stored[:100]), write(tmp_path / "r1.jsonl", stored[100:])
    ]  # fmt: skip
    kept, _, dropped = run(tmp_path, rows, pass_rate={"responses": paths})
    assert kept == rows[9:17]
    assert dropped["pass rate"][8] == "8 of 16 responses correct"
    assert dropped["pass rate"][17] == "no responses"
    kept, _, _ = run(tmp_path, rows, pass_rate={"responses": paths, "above": 0.0, "at_most": 0.25})
    assert kept == rows[1:5]
    with pytest.raises(UserError, match=r"in\.jsonl, line 1: no graded response"):
        run(tmp_path, rows, pass_rate={"responses": [tmp_path / "in.jsonl"]})


def test_top_sources_are_those_with_most_rows_or_as_ranked(tmp_path):
    rows = [make_row(f"{i}", origin=origin) for i, origin in enumerate("abbcccaccb")]
    kept, report, dropped = run(tmp_path, rows, top_sources={"count": 2, "field": "origin"})
    assert [row["origin"] for row in kept] == list("bbcccccb")
    assert report.sources == {"c": 5, "b": 3}
    assert dropped["not a top source"] == {0: "a", 6: "a"}
    ranked = {"count": 2, "field": "origin", "ranking": ["a", "c", "b"]}
    kept, _, _ = run(tmp_path, rows, top_sources=ranked)
    assert [row["origin"] for row in kept] == list("acccacc")
    with pytest.raises(UserError, match="no row has origin = d; there are: a, b, c"):
        run(tmp_path, rows, top_sources={"count": 1, "field": "origin", "ranking": ["d"]})


@pytest.mark.parametrize("seed", range(10))
def test_k_center_greedy_is_brute_forces(seed):
    rng = np.random.default_rng(seed)
    points = rng.integers(-50, 50, (40, 3)).astype(np.float32)  # integers: exact in float32
    centers = list(k_center_greedy(points, 12, seed))
    assert len(set(centers)) == 12
    for k in range(1, 12):
        nearest = [min(((p - points[c]) ** 2).sum() for c in centers[:k]) for p in points]
        assert centers[k] == int(np.argmax(nearest))


def test_subset_covers_at_most_twice_as_badly_as_the_best_one(tmp_path):
    """Checks the guarantee of the greedy choice (Gonzalez 1985) against all subsets."""
    rng = np.random.default_rng(0)
    points = rng.normal(size=(14, 2)).astype(np.float32)
    np.save(tmp_path / "points.npy", points)
    rows = [make_row(f"problem {i}") for i in range(14)]
    subset = {"size": 3, "embeddings": tmp_path / "points.npy"}
    kept, report, _ = run(tmp_path, rows, subset=subset)

    def radius(centers):
        return max(min(np.linalg.norm(p - points[c]) for c in centers) for p in points)

    best = min(radius(centers) for centers in itertools.combinations(range(14), 3))
    assert best <= radius([rows.index(row) for row in kept]) <= 2 * best
    assert report.dropped == {"not in the subset": 11}
    with pytest.raises(UserError, match=r"points\.npy has 14 vectors, fewer than there are rows"):
        run(tmp_path, [*rows, make_row("one more")], subset=subset)


def test_subset_by_words_has_one_of_each_kind_of_problem(tmp_path):
    kinds = ["find the area of a triangle", "how many ways to tile a board", "solve for x in x+1"]
    rows = [make_row(f"{kind} {i}") for i in range(10) for kind in kinds]
    kept, _, _ = run(tmp_path, rows, subset={"size": 3})
    assert len({text[:5] for text in texts(kept)}) == 3
    assert run(tmp_path, rows, subset={"size": 99})[0] == rows
    vector = hashed_vector(["a", "b"])
    assert np.linalg.norm(vector) == pytest.approx(1)
    assert not hashed_vector([]).any()


def test_everything_at_once_adds_up(tmp_path):
    rng = random.Random(0)
    evaluation = write(
        tmp_path / "eval.jsonl", [make_row("What is the sum of the first ten primes")]
    )
    rows = [make_row(random_text(rng, 30, 8), origin=rng.choice("ab")) for _ in range(300)]
    rows += [make_row("So: what is the sum of the first ten primes?", origin="a"), *rows[:20]]
    one = write(tmp_path / "one.jsonl", rows[:150])
    other = write(tmp_path / "other.jsonl", [*rows[150:], {"data_source": MATH}])
    _, report, dropped = run(
        tmp_path,
        (one, other),
        bad_rows="skip",
        decontaminate={"against": [evaluation], "n": 8},
        top_sources={"count": 1, "field": "origin"},
        subset={"size": 40},
    )
    assert report.rows == 322
    assert report.kept == 40
    assert report.dropped["malformed"] == report.dropped["contaminated"] == 1
    assert report.dropped["duplicate"] >= 20
    assert Counter({reason: len(of) for reason, of in dropped.items()}) == report.dropped
    assert list(report.sources.values()) == [40]
    assert all(0 <= index < 321 for of in dropped.values() for index in of if index is not None)


def test_malformed_rows_and_tests_are_refused_with_line_and_field(tmp_path):
    rows = [make_row("p"), make_row("q", CODE, "4")]
    where = r"in\.jsonl, line 2, field reward_model\.ground_truth: not the tests"
    with pytest.raises(UserError, match=where):
        run(tmp_path, rows)
    _, report, _ = run(tmp_path, rows, bad_rows="skip")
    assert report.dropped == {"malformed": 1}


def test_rows_are_streamed(tmp_path):
    """A process curates 200 MB of prompts without ever growing by 100 MB."""
    script = """
import json, resource, sys
from pathlib import Path
from klear_megatron.curation import CurateConfig, curate
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
folder = Path(sys.argv[1])
with (folder / "in.jsonl").open("w") as file:
    for i in range(20_000):
        text = f"{i} " + "word " * 2000
        row = {"data_source": "math_longcot_math_verify", "reward_model": {"ground_truth": "4"},
               "prompt": [{"role": "user", "content": text}]}
        file.write(json.dumps(row) + "\\n")
before = peak()
config = CurateConfig(path=folder / "in.jsonl", output=folder / "out.jsonl")
print(curate(config).kept, peak() - before < 100)
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, timeout=120
    )
    assert done.stdout.split() == ["20000", "True"], done.stderr

"""The script that prepares the paper's data, on small files of the form that is published."""

import json
import runpy
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from klear_megatron.config import load_config
from klear_megatron.curation import CurateConfig
from klear_megatron.data import read_prompts
from klear_megatron.evaluation import EvalConfig
from klear_megatron.rl.config import RLConfig
from klear_megatron.sft.config import SFTConfig

EXAMPLE = Path(__file__).parents[2] / "examples" / "klear_reasoner_8b"
CODE = {"hash": "4", "data_source": "coder1_longcot", "ability": "code"}
MATH = {"data_source": "math_longcot_math_verify", "ability": "math"}


def klear(row, ground_truth):
    prompt = [{"role": "user", "content": "What?"}]
    return row | {"prompt": prompt, "reward_model": {"ground_truth": ground_truth, "style": "rule"}}


def livecodebench(date):
    return {
        "question_content": f"Of {date}",
        "contest_date": date,
        "starter_code": "",
        "public_test_cases": "[]",
        "private_test_cases": "eJx",
        "metadata": "{}",
    }


PUBLISHED = {
    "open-thoughts/OpenThoughts3-1.2M/data/train-0.parquet": [
        {
            "difficulty": None,
            "domain": "math",
            "conversations": [
                {"from": "human", "value": "1+1?"},
                {"from": "gpt", "value": "<think>easy</think>2"},
            ],
        }
    ],
    "Kwai-Klear/KlearReasoner-MathSub-30K/math.json": [klear(MATH, "4")],
    "Kwai-Klear/KlearReasoner-CodeSub-15K/code.jsonl": [klear(CODE, '{"inputs": ["1"]}')],
    "HuggingFaceH4/aime_2024/data/train.parquet": [{"id": 60, "problem": "P", "answer": "204"}],
    "yentinglin/aime_2025/data/train.parquet": [{"problem": "Q", "answer": "70"}],
    "MathArena/hmmt_feb_2025/data/train.parquet": [{"problem": "R", "answer": r"\frac{1}{2}"}],
    "livecodebench/code_generation_lite/test.jsonl": [livecodebench("2023-05-07T00:00:00")],
    "livecodebench/code_generation_lite/test6.jsonl": [
        livecodebench("2025-01-31T23:00:00"),
        livecodebench("2025-02-01T00:00:00"),
    ],
}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """The folder in which the configs' files are `data/...`."""
    folder = tmp_path_factory.mktemp("klear")
    for name, rows in PUBLISHED.items():
        path = folder / "data" / "sources" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".parquet":
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        else:
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    described = folder / "data/sources/Kwai-Klear/KlearReasoner-MathSub-30K/dataset_infos.json"
    described.write_text(json.dumps({"default": {}}, indent=2))
    main = runpy.run_path(str(EXAMPLE / "prepare_data.py"))["main"]
    main(["--out", str(folder / "data"), "--sources", str(folder / "data" / "sources")])
    return folder


def test_every_file_that_a_config_names_is_made_and_can_be_read(prepared):
    curated = {}
    prompts = []
    for name in ("curate_math", "curate_code"):
        config = load_config(CurateConfig, EXAMPLE / f"{name}.yaml")
        prompts += [config.path, *(one.path for one in config.decontaminate.against)]
        curated[config.output] = config
    for name in ("math_rl", "code_rl"):
        config = load_config(RLConfig, EXAMPLE / f"{name}.yaml")
        assert config.data.path in curated
        prompts += [one.path for one in config.evaluation.benchmarks.values()]
    benchmarks = load_config(EvalConfig, EXAMPLE / "eval.yaml").benchmarks
    prompts += [one.path for one in benchmarks.values()]
    for path in set(prompts):
        assert len(read_prompts(prepared / path)) == 1, path
    learned = prepared / load_config(SFTConfig, EXAMPLE / "sft.yaml").data.path
    assert json.loads(learned.read_text()) == {
        "messages": [
            {"role": "user", "content": "1+1?"},
            {"role": "assistant", "content": "<think>easy</think>2"},
        ]
    }


def test_benchmarks_have_the_papers_periods_and_answers(prepared):
    (half,) = read_prompts(prepared / "data" / "hmmt25.jsonl")
    assert half.ground_truth == r"\frac{1}{2}"
    (v5,) = read_prompts(prepared / "data" / "livecodebench_v5.jsonl")
    (v6,) = read_prompts(prepared / "data" / "livecodebench_v6.jsonl")
    assert "Of 2025-01-31" in v5.messages[0]["content"]
    assert "Of 2025-02-01" in v6.messages[0]["content"]

"""Get the published data sets, and write the files that the configs here name.

    python examples/klear_reasoner_8b/prepare_data.py [--out data] [--sources data/sources]

Downloads each data set from the Hugging Face hub into a folder of `--sources` named as it is there,
unless the folder exists; on a host without a network, copy those folders. Then writes

    OUT/sft.jsonl                 conversations; see the README about which
    OUT/math_raw.jsonl            prompts for curate_math.yaml
    OUT/code_raw.jsonl            prompts for curate_code.yaml
    OUT/aime24.jsonl, aime25.jsonl, hmmt25.jsonl, livecodebench_v5.jsonl, livecodebench_v6.jsonl
"""

import argparse
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download

from klear_megatron.data.files import read_rows
from klear_megatron.errors import UserError
from klear_megatron.platform.files import write_atomically

Row = dict[str, Any]

_FILES = ("*.jsonl", "*.json", "*.parquet")
_ROLES = {"system": "system", "human": "user", "gpt": "assistant"}
_INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."


@dataclass(frozen=True)
class Wanted:
    """A file to write from a published data set."""

    name: str
    source: str
    convert: Callable[[Row], Row | None]
    """From a published row to ours; None leaves it out."""


def unchanged(row: Row) -> Row:
    return row


def conversation(row: Row) -> Row:
    """From `conversations` of {from, value}."""
    turns = row["conversations"]
    messages = [{"role": _ROLES[turn["from"]], "content": turn["value"]} for turn in turns]
    return {"messages": messages}


def competition(row: Row) -> Row:
    """From a problem and its answer, a number or LaTeX."""
    return {
        "data_source": "math_longcot_math_verify",
        "prompt": [{"role": "user", "content": f"{row['problem']}\n\n{_INSTRUCTION}"}],
        "ability": "math",
        "reward_model": {"ground_truth": str(row["answer"]), "style": "rule"},
    }


def between(first: str, end: str) -> Callable[[Row], Row | None]:
    """LiveCodeBench's problems from the day `first` to the one before `end`, as they are."""
    return lambda row: row if first <= row["contest_date"] < end else None


WANTED = (
    Wanted("sft", "open-thoughts/OpenThoughts3-1.2M", conversation),
    Wanted("math_raw", "Kwai-Klear/KlearReasoner-MathSub-30K", unchanged),
    Wanted("code_raw", "Kwai-Klear/KlearReasoner-CodeSub-15K", unchanged),
    Wanted("aime24", "HuggingFaceH4/aime_2024", competition),
    Wanted("aime25", "yentinglin/aime_2025", competition),
    Wanted("hmmt25", "MathArena/hmmt_feb_2025", competition),
    # The periods are those of the paper.
    Wanted(
        "livecodebench_v5",
        "livecodebench/code_generation_lite",
        between("2024-08-01", "2025-02-01"),
    ),
    Wanted(
        "livecodebench_v6",
        "livecodebench/code_generation_lite",
        between("2025-02-01", "2025-05-01"),
    ),
)


def download(name: str, folder: Path) -> None:
    """Gets the data set, unless its folder is there."""
    if not folder.exists():
        print(f"downloading {name} to {folder}", flush=True)
        partial = folder.with_name(folder.name + ".partial")
        snapshot_download(name, repo_type="dataset", local_dir=partial, allow_patterns=_FILES)
        partial.rename(folder)


def rows_in(folder: Path) -> Iterator[Row]:
    """The rows of all its files; a `test` split is as good as a `train` split here."""
    paths = sorted(path for pattern in _FILES for path in folder.rglob(pattern))
    paths = [path for path in paths if path.suffix == ".parquet" or _is_rows(path)]
    if not paths:
        raise UserError(f"{folder}: no .jsonl, .json or .parquet files; remove it to download it")
    for path in paths:
        if path.suffix == ".json":
            with path.open(encoding="utf-8") as file:
                yield from map(json.loads, filter(str.strip, file))
            continue
        for where, row in read_rows(path):
            if isinstance(row, str):
                raise UserError(f"{where}: {row}")
            yield row


def _is_rows(path: Path) -> bool:
    """Whether a JSON file has an object per line, and is no description of the data set."""
    with path.open(encoding="utf-8") as file:
        first = next(filter(str.strip, file), "")
    try:
        return isinstance(json.loads(first), dict)
    except ValueError:
        return False


def write(path: Path, rows: Iterable[Row | None]) -> None:
    count = 0
    with write_atomically(path) as file:
        for row in rows:
            if row is not None:
                file.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")
                count += 1
    print(f"wrote {path}: {count} rows", flush=True)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("data"))
    parser.add_argument("--sources", type=Path, default=Path("data/sources"))
    parser.add_argument("--only", choices=[one.name for one in WANTED], nargs="+")
    parsed = parser.parse_args(arguments)
    parsed.out.mkdir(parents=True, exist_ok=True)
    for wanted in WANTED:
        if parsed.only is None or wanted.name in parsed.only:
            folder = parsed.sources / wanted.source
            download(wanted.source, folder)
            write(parsed.out / f"{wanted.name}.jsonl", map(wanted.convert, rows_in(folder)))


if __name__ == "__main__":
    main()

"""Measures a model with long sequences, laid out over all ranks as a training run lays it out."""

import itertools
import json
import math
import random
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from klear_megatron.checkpoints.model_folder import ModelFolder
from klear_megatron.config import write_config
from klear_megatron.errors import UserError
from klear_megatron.observability import Progress, say
from klear_megatron.platform.device import init_distributed
from klear_megatron.platform.files import make_folder, write_atomically
from klear_megatron.policy.batch import Batch
from klear_megatron.policy.config import import_extensions
from klear_megatron.policy.model import Model
from klear_megatron.probing.config import NeedleConfig, PositionsConfig, ProbeConfig
from klear_megatron.probing.needles import Encode, make_sample
from klear_megatron.probing.plots import draw

Result = dict[str, Any]


def probe(config: ProbeConfig) -> None:
    """Collective. Measures the model and writes `probe.json` and `probe.png`.

    Raises:
        UserError: a bad model or text, or lengths beyond the model's positions or the text.
    """
    import_extensions(config.policy)
    folder = ModelFolder(config.policy.hf_folder)
    config.policy.parallel.check_model(folder)
    _check_positions(config, folder)
    encode = partial(_encode, folder.tokenizer)
    text = encode(_read(config.text))
    sequences = cut(text, config.positions)
    init_distributed()
    config.policy.parallel.data_parallel_size(dist.get_world_size())
    model = Model(config.policy, folder, seed=config.seed)
    model.load(config.policy.path)
    log_probs, _ = model.log_probs(Batch.from_sequences(sequences))
    rows = log_probs.view(len(sequences), config.positions.length)
    result: Result = {"positions": losses_by_position(rows, config.positions.windows)}
    if config.needle is not None:
        result["needle"] = _find_needles(model, config.needle, text, encode, config.seed)
    if dist.get_rank() == 0:
        _write(config, result)


def cut(text: list[int], config: PositionsConfig) -> list[list[int]]:
    """The sequences that the text is cut into.

    Raises:
        UserError: the text is shorter than one.
    """
    count = min(config.sequences, len(text) // config.length)
    if count == 0:
        raise UserError(
            f"text: has {len(text)} tokens, but positions.length asks for {config.length}; give a "
            "longer text, or ask for fewer tokens"
        )
    return [text[i * config.length : (i + 1) * config.length] for i in range(count)]


def losses_by_position(log_probs: Tensor, windows: int) -> list[Result]:
    """The mean loss of the tokens in each window of positions, and its perplexity.

    Args:
        log_probs: [sequences, length]; the first token, which nothing predicts, does not count.
    """
    length = log_probs.shape[1]
    edges = torch.linspace(1, length, windows + 1).round().int().tolist()
    rows = []
    for start, end in itertools.pairwise(edges):
        loss = -log_probs[:, start:end].double().mean().item()
        rows.append({"start": start, "end": end, "loss": loss, "perplexity": math.exp(loss)})
    return rows


def _find_needles(
    model: Model, config: NeedleConfig, haystack: list[int], encode: Encode, seed: int
) -> list[Result]:
    """The share of samples whose answer is found, for each length and depth.

    An answer is found if the model gives each of its tokens a probability above one half: greedy
    decoding then says it, whatever the rest of the distribution. So the accuracy is a lower bound
    of that of greedy decoding.
    """
    rng = random.Random(seed)
    cells = [(length, depth) for length in sorted(config.lengths) for depth in config.depths]
    rows = []
    with Progress("needles", len(cells), enabled=dist.get_rank() == 0) as progress:
        for length, depth in cells:
            samples = [
                make_sample(config, haystack, encode, length=length, depth=depth, rng=rng)
                for _ in range(config.samples)
            ]
            log_probs, _ = model.log_probs(Batch.from_sequences([s.tokens for s in samples]))
            answers = [
                row[-sample.answer_tokens :]
                for row, sample in zip(log_probs.view(-1, length), samples, strict=True)
            ]
            found = [bool((answer > math.log(0.5)).all()) for answer in answers]
            chance = [math.exp(float(answer.sum())) for answer in answers]
            rows.append(
                {"length": length, "depth": depth, "samples": len(samples)}
                | {"accuracy": sum(found) / len(found), "probability": sum(chance) / len(chance)}
            )
            progress.advance(note=f"{length} tokens, depth {depth:g}: {rows[-1]['accuracy']:.0%}")
    return rows


def _check_positions(config: ProbeConfig, folder: ModelFolder) -> None:
    lengths = config.needle.lengths if config.needle is not None else ()
    longest, positions = (
        max(config.positions.length, *lengths),
        folder.config.max_position_embeddings,
    )
    if longest > positions:
        raise UserError(
            f"a sequence of {longest} tokens is beyond the model's max_position_embeddings = "
            f"{positions}; ask for fewer, or extend the model's config.json by YaRN"
        )


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"text: cannot read {path}: {error}; give a file of UTF-8 text") from error


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _write(config: ProbeConfig, result: Result) -> None:
    make_folder(config.run_dir)
    write_config(config, config.run_dir / "config.yaml")
    with write_atomically(config.run_dir / "probe.json") as file:
        json.dump(result, file, indent=1)
    draw({"": result}, config.run_dir / "probe.png")
    positions = result["positions"]
    first, last = positions[0], positions[-1]
    say(
        f"perplexity {first['perplexity']:.2f} at tokens {first['start']} to {first['end']}, "
        f"{last['perplexity']:.2f} at tokens {last['start']} to {last['end']}"
    )
    say(f"see {config.run_dir}: probe.json, probe.png")

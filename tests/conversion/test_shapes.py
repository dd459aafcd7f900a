"""Odd shapes survive a round trip, and several processes write the same files as one."""

import os
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from klear_megatron.checkpoints.hf_reader import read_config
from klear_megatron.checkpoints.megatron_reader import MegatronCheckpoint
from klear_megatron.conversion import hf_to_megatron, megatron_to_hf
from klear_megatron.models import padded_vocab_size
from tests.conversion.folders import same_weights, weights_of
from tests.distributed.ranks import run_ranks
from tests.models import tiny


@st.composite
def configs(draw: st.DrawFn) -> Any:
    """Draws a config of any architecture, and the number of tensor-parallel ranks to store it for.

    Groups may be one, heads and widths need not be powers of two, and any vocabulary is allowed.
    """
    ranks = draw(st.sampled_from([1, 2, 3]))
    groups = ranks * draw(st.integers(1, 3 if ranks == 1 else 1))
    heads = groups * draw(st.integers(1, 5))
    head_dim = 2 * draw(st.integers(1, 5))
    experts = {"num_experts": draw(st.integers(3, 5)), "moe_intermediate_size": 5}
    make, own = draw(
        st.sampled_from(
            [
                (tiny.qwen3, {"head_dim": head_dim}),
                (tiny.qwen2, {"hidden_size": heads * head_dim}),
                (tiny.llama3, {"head_dim": head_dim, "hidden_size": 3 * heads}),
                (tiny.qwen3_moe, {"head_dim": head_dim, **experts}),
            ]
        )
    )
    shapes = {
        "vocab_size": draw(st.integers(1, 300)),
        # With size 1, transformers itself drops a dimension of the experts when it saves them.
        "hidden_size": draw(st.integers(2, 20)),
        "intermediate_size": ranks * draw(st.integers(1, 20)),
        "num_hidden_layers": draw(st.integers(1, 3)),
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "tie_word_embeddings": draw(st.booleans()),
    }
    return make(**{**shapes, **own}), ranks


@settings(max_examples=25, deadline=None)
@given(
    model=configs(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    shard_bytes=st.integers(1, 20_000),
)
def test_odd_shapes_come_back_bit_identical(
    model: tuple[Any, int], dtype: torch.dtype, shard_bytes: int
) -> None:
    config, tensor_parallel_size = model
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        tiny.write(folder / "hf", config, dtype=dtype)
        options: dict[str, Any] = {"shard_bytes": shard_bytes}
        hf_to_megatron(
            folder / "hf",
            folder / "megatron",
            tensor_parallel_size=tensor_parallel_size,
            **options,
        )
        megatron_to_hf(folder / "megatron", folder / "back", **options)
        assert same_weights(weights_of(folder / "back"), weights_of(folder / "hf"))


def _convert(folder: Path) -> None:
    hf_to_megatron(folder / "hf", folder / "megatron", shard_bytes=100_000)
    megatron_to_hf(folder / "megatron", folder / "back", shard_bytes=100_000)


def _convert_together(folder: Path) -> None:
    """Converts in several processes, started as torchrun would start them."""
    os.environ |= {"WORLD_SIZE": str(dist.get_world_size()), "RANK": str(dist.get_rank())}
    _convert(folder)


def test_processes_share_a_conversion(tmp_path: Path) -> None:
    for name in ("alone", "together"):
        tiny.write(tmp_path / name / "hf", tiny.qwen3())
    _convert(tmp_path / "alone")
    run_ranks(2, _convert_together, tmp_path / "together")
    for folder in ("megatron", "back"):
        files = sorted(f for f in (tmp_path / "alone" / folder).rglob("*") if f.is_file())
        assert len(files) > 10
        for file in files:
            other = tmp_path / "together" / file.relative_to(tmp_path / "alone")
            assert file.read_bytes() == other.read_bytes(), file


def test_vocabulary_is_padded_with_zeros(tmp_path: Path) -> None:
    tiny.write(tmp_path / "hf", tiny.qwen3())
    hf_to_megatron(tmp_path / "hf", tmp_path / "megatron", tensor_parallel_size=2)
    source = MegatronCheckpoint(tmp_path / "megatron")
    row = source.table(read_config(tmp_path / "megatron" / "hf"))[0]
    embedding = source.tensor(row)
    assert embedding.shape == (padded_vocab_size(tiny.VOCAB, 2), 64) == (384, 64)
    assert not embedding[tiny.VOCAB :].any()
    assert embedding[: tiny.VOCAB].any(1).all()

"""Weights pass between Hugging Face, Transformer Engine's layers, checkpoints and plain torch."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.fp8_utils import is_float8tensor
from safetensors.torch import load_file
from torch import Tensor
from transformer_engine.pytorch import DType
from transformer_engine.pytorch.module.base import _attach_high_precision_init_val
from transformer_engine.pytorch.tensor import (
    Float8BlockQuantizer,
    Float8BlockwiseQTensor,
    Float8Quantizer,
)

from klear_megatron.models import padded_vocab_size
from klear_megatron.models.language_model import LanguageModel
from klear_megatron.policy import checkpoint
from klear_megatron.policy.weights import HFGather, load_hf_weights, local_parameters, plain
from tests.gpu_structure.stage import (
    CONFIGS,
    gpu_chunks,
    policy_config,
    standing_alone,
    torch_chunks,
    write_config,
)
from tests.models import tiny

BLOCK = 128


def _scaled(weight: Tensor) -> Tensor:
    """A weight kept in FP8 with one scale, by a quantizer of Transformer Engine's; rounding itself
    is torch's, because Transformer Engine's needs a kernel."""
    scale = torch.tensor([448.0 / float(weight.abs().max())])
    rounded = (weight.float() * scale).to(torch.float8_e4m3fn).view(torch.uint8)
    quantizer = Float8Quantizer(scale, torch.zeros(1), DType.kFloat8E4M3)
    return quantizer.create_tensor_from_data(rounded, fake_dtype=torch.bfloat16)


def _scaled_by_blocks(weight: Tensor) -> Tensor:
    """The same with one scale for each block of 128 x 128."""
    rows, columns = (size // BLOCK for size in weight.shape)
    blocks = weight.float().view(rows, BLOCK, columns, BLOCK)
    scales = 448.0 / blocks.abs().amax((1, 3), keepdim=True)
    rounded = (blocks * scales).to(torch.float8_e4m3fn).view(weight.shape)
    return Float8BlockwiseQTensor(
        shape=weight.shape,
        dtype=torch.bfloat16,
        rowwise_data=rounded.view(torch.uint8),
        rowwise_scale_inv=(1 / scales).view(rows, columns),
        columnwise_data=None,
        columnwise_scale_inv=None,
        fp8_dtype=DType.kFloat8E4M3,
        quantizer=Float8BlockQuantizer(DType.kFloat8E4M3, rowwise=True, columnwise=True),
        is_2D_scaled=True,
    )


class Model:
    """A model with weights, in bfloat16, of Transformer Engine's layers on the CPU."""

    def __init__(self, name: str, path: Path) -> None:
        self.name = name
        self.folder = write_config(name, path)
        tiny.write(path, self.folder.config, dtype=torch.bfloat16)
        self.config = policy_config(path)
        self.table = self.folder.table(padded_vocab_size(self.folder.config.vocab_size, 1))
        self.chunks = gpu_chunks(self.config, self.folder, device="cpu")
        load_hf_weights(self.chunks, self.table, path)

    def hf_tensors(self, chunks: Sequence[LanguageModel]) -> dict[str, Tensor]:
        """What the push and the conversion send."""
        parameters = local_parameters(chunks)
        dtypes = {name: parameter.dtype for name, parameter in parameters.items()}
        stream = HFGather(dtypes, self.table, to_rank=0).stream(lambda n: plain(parameters[n]))
        return {name: tensor.clone() for name, tensor in stream}

    def keep_in_fp8(self, round_to_fp8: Callable[[Tensor], Tensor]) -> None:
        """Keeps what Transformer Engine would keep in FP8 in its own tensor class."""
        for chunk in self.chunks:
            for module in chunk.modules():
                for name, meta in getattr(module, "param_init_meta", {}).items():
                    if meta.fp8_meta_index is not None:
                        rounded = round_to_fp8(getattr(module, name).detach())
                        module._parameters[name] = torch.nn.Parameter(rounded)


@pytest.fixture(params=CONFIGS)
def model(request, tmp_path) -> Iterator[Model]:
    with standing_alone():
        yield Model(request.param, tmp_path / "hf")


def _pass_on(chunks: Sequence[LanguageModel], readers: Sequence[LanguageModel], path: Path) -> None:
    """Through a checkpoint."""
    path.mkdir()
    dist_checkpointing.save(checkpoint._model_state(chunks), str(path), **checkpoint._OWN_WRITER)
    checkpoint.load_weights(path, readers)


def _assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert torch.equal(tensor, theirs[name]), name


def test_weights_come_back_as_they_were_loaded_and_move_to_plain_torch_and_back(
    model, tmp_path, proven
):
    files = {}
    for file in (tmp_path / "hf").glob("*.safetensors"):
        files |= load_file(file)
    _assert_same(model.hf_tensors(model.chunks), files)
    plain_chunks = torch_chunks(model.config, model.folder)
    _pass_on(model.chunks, plain_chunks, tmp_path / "of_engine")
    _assert_same(model.hf_tensors(plain_chunks), files)
    others = gpu_chunks(model.config, model.folder, device="cpu")
    _pass_on(plain_chunks, others, tmp_path / "of_torch")
    _assert_same(model.hf_tensors(others), files)
    proven("weights are loaded, and pass through checkpoints to plain torch and back", model.name)


@pytest.mark.parametrize("round_to_fp8", [_scaled, _scaled_by_blocks])
def test_fp8_weights_are_pushed_and_saved_as_what_they_stand_for(
    model, round_to_fp8, tmp_path, proven
):
    before = model.hf_tensors(model.chunks)
    model.keep_in_fp8(round_to_fp8)
    kept = [n for n, p in local_parameters(model.chunks).items() if is_float8tensor(p)]
    assert {n.split(".", 3)[3] for n in kept} >= {
        "self_attention.linear_qkv.weight",
        "self_attention.linear_proj.weight",
    }
    assert len(kept) == sum(
        ".linear_" in r.name and r.name.endswith("weight") and "layer_norm" not in r.name
        for r in model.table
    )
    pushed = model.hf_tensors(model.chunks)
    assert pushed.keys() == before.keys()
    for name, tensor in pushed.items():
        assert type(tensor) is Tensor
        assert tensor.dtype == torch.bfloat16
        # E4M3 has three bits of mantissa; the smallest numbers of a scale have fewer.
        torch.testing.assert_close(tensor, before[name], rtol=2**-4, atol=2e-3)
    assert any(not torch.equal(tensor, before[name]) for name, tensor in pushed.items())
    plain_chunks = torch_chunks(model.config, model.folder)
    _pass_on(model.chunks, plain_chunks, tmp_path / "checkpoint")
    _assert_same(model.hf_tensors(plain_chunks), pushed)
    kind = type(round_to_fp8(torch.ones(BLOCK, BLOCK))).__name__
    proven(
        f"FP8 weights of class {kind} are read back for the push and for checkpoints", model.name
    )


def test_the_value_before_rounding_is_loaded_too(model, proven):
    """Transformer Engine keeps it beside an FP8 weight; the optimizer starts from it."""
    parameters = local_parameters(model.chunks)
    for parameter in parameters.values():
        _attach_high_precision_init_val(parameter, torch.zeros_like(parameter))
    load_hf_weights(model.chunks, model.table, model.config.path)
    for name, parameter in parameters.items():
        assert torch.equal(parameter.get_high_precision_init_val(), parameter), name
    proven("the value before rounding to FP8 is loaded", model.name)

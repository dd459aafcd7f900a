"""Reading Hugging Face checkpoints: config, safetensors, tokenizer files."""

import json
import math
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig

from klear_megatron.checkpoints.hf_config import find_config
from klear_megatron.errors import UserError
from klear_megatron.models.architecture import Weight
from klear_megatron.models.tokenizer import why_not_read

_INDEX = "model.safetensors.index.json"
_TIED = {"lm_head.weight": "model.embed_tokens.weight"}
SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
_NOT_COMPANIONS = {
    *(".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".gguf", ".onnx"),  # other weights
    *("SHA256SUMS", "README.md"),  # describe this folder, not its copy
}


def read_config(path: Path) -> PretrainedConfig:
    """The model config of a Hugging Face checkpoint folder.

    Raises:
        UserError: the folder does not exist or has no readable config.json.
    """
    find_config(path)
    try:
        # Without this, transformers may ask on the terminal whether to run the model's own code.
        return AutoConfig.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # any exception: each model type parses its own fields
        raise UserError(f"{path}/config.json: {why_not_read(error)}") from error


class HFCheckpoint:
    """The safetensors of a Hugging Face checkpoint, memory-mapped; nothing is unpickled.

    Raises:
        UserError: files are missing or unreadable, or the index does not match them.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file_of: dict[str, str] = {}
        self._specs: dict[str, tuple[str, tuple[int, ...]]] = {}
        weight_map = self._weight_map()
        self.shards = sorted(set(weight_map.values())) if weight_map else ["model.safetensors"]
        for shard in self.shards:
            with self._open(shard) as file:
                for name in file.keys():  # noqa: SIM118 - not a dict
                    if name in self._file_of:
                        raise UserError(f"{path}: {name} is in {self._file_of[name]} and {shard}")
                    piece = file.get_slice(name)
                    self._file_of[name] = shard
                    self._specs[name] = piece.get_dtype(), tuple(piece.get_shape())
        if weight_map and (wrong := dict(weight_map.items() ^ self._file_of.items())):
            name = min(wrong)
            raise UserError(
                f"{path}/{_INDEX}: {len(wrong)} entries do not match the files; {name} is in "
                f"{self._file_of.get(name, 'no file')}, by the index in "
                f"{weight_map.get(name, 'none')}"
            )

    def _weight_map(self) -> dict[str, str]:
        """Tensor name -> shard by the index; empty if there is none."""
        index = self.path / _INDEX
        if index.is_file():
            try:
                weight_map: dict[str, str] = json.loads(index.read_text())["weight_map"]
                return weight_map
            except (ValueError, KeyError) as error:
                raise UserError(f"{index}: not a safetensors index ({error!r})") from error
        if not (self.path / "model.safetensors").is_file():
            raise UserError(
                f"{self.path}: neither model.safetensors nor {_INDEX} there "
                "(pickled .bin weights are not loaded; convert them with safetensors first)"
            )
        return {}

    def _open(self, shard: str) -> safe_open:
        try:
            return safe_open(self.path / shard, framework="pt")
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"{self.path / shard}: {error}; the file is missing, truncated or corrupt"
            ) from error

    def check(self, table: Iterable[Weight]) -> None:
        """Checks names and shapes against the config; reads only the headers.

        Raises:
            UserError: tensors are missing, unexpected or mis-shaped; lists up to 20 of each.
        """
        expected = {name: shape for row in table for name, shape in row.sources.items()}
        found = {name: shape for name, (_, shape) in self._specs.items()}
        for copy, original in _TIED.items():
            # Some tied checkpoints still contain the output weight, as a copy.
            if copy in found and copy not in expected and original in found:
                if not torch.equal(self.tensor(copy), self.tensor(original)):
                    raise UserError(
                        f"{self.path}: config.json says tie_word_embeddings, but {copy} differs "
                        f"from {original}"
                    )
                del found[copy]
        problems = {
            "missing from the weights": [n for n in expected if n not in found],
            "not in the model": [n for n in found if n not in expected],
            "of another shape": [
                f"{n}: {found[n]} in the file, {expected[n]} by the config"
                for n in expected
                if n in found and found[n] != expected[n]
            ],
            "not of a floating-point dtype": [
                n for n in expected if n in found and self._specs[n][0] not in SAFETENSORS_DTYPES
            ],
        }
        lines = [
            f"  {len(names)} {what}: {', '.join(names[:20])}{' …' if len(names) > 20 else ''}"
            for what, names in problems.items()
            if names
        ]
        if lines:
            raise UserError(
                f"{self.path}: config.json and the weights do not match\n" + "\n".join(lines)
            )

    @property
    def parameters(self) -> int:
        """The number of all parameters."""
        return sum(math.prod(shape) for _, shape in self._specs.values())

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of a tensor in its file."""
        return SAFETENSORS_DTYPES[self._specs[name][0]]

    def tensor(self, name: str) -> Tensor:
        """One whole tensor, in the dtype of the file."""
        # Opened for each tensor, so that a tensor's pages are released together with it.
        with self._open(self._file_of[name]) as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor


def copy_companions(source: Path, target: Path) -> None:
    """Copies the files that accompany the weights: config, tokenizer, chat template."""
    for file in sorted(source.iterdir()):
        if file.is_file() and not _NOT_COMPANIONS & {file.name, *file.suffixes}:
            shutil.copy2(file, target)

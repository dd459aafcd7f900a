"""Reading and writing Hugging Face checkpoints: config, safetensors, tokenizer files."""

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig

from klear_megatron.errors import UserError
from klear_megatron.models.architecture import Weight

_SHARD_BYTES = 5 * 10**9
_TIED = {"lm_head.weight": "model.embed_tokens.weight"}


def read_config(path: Path) -> PretrainedConfig:
    """The model config of a Hugging Face checkpoint folder.

    Raises:
        UserError: no such folder, or no readable config.json in it.
    """
    if not (path / "config.json").is_file():
        raise UserError(
            f"{path}: no config.json there; a Hugging Face checkpoint folder is expected"
        )
    try:
        return AutoConfig.from_pretrained(path)
    except (ValueError, OSError, StrictDataclassError) as error:
        raise UserError(f"{path}/config.json: {error}") from error


class HFCheckpoint:
    """The safetensors of a Hugging Face checkpoint, memory-mapped; nothing is unpickled.

    Raises:
        UserError: missing or unreadable files, or an index that does not match them.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._files = {name: self._open(name) for name in self._shard_names()}
        self._file_of: dict[str, str] = {}
        for shard, file in self._files.items():
            for tensor in file.keys():  # noqa: SIM118 - not a dict
                if tensor in self._file_of:
                    raise UserError(f"{path}: {tensor} is in {self._file_of[tensor]} and {shard}")
                self._file_of[tensor] = shard

    def _shard_names(self) -> list[str]:
        index = self.path / "model.safetensors.index.json"
        if index.is_file():
            return sorted(set(json.loads(index.read_text())["weight_map"].values()))
        if (self.path / "model.safetensors").is_file():
            return ["model.safetensors"]
        raise UserError(
            f"{self.path}: neither model.safetensors nor model.safetensors.index.json there "
            "(pickled .bin weights are not loaded; convert them with safetensors first)"
        )

    def _open(self, shard: str) -> safe_open:
        try:
            return safe_open(self.path / shard, framework="pt")
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"{self.path / shard}: {error}; the file is missing, truncated or corrupt"
            ) from error

    def check(self, table: Iterable[Weight]) -> None:
        """Compares names and shapes with what the config asks for, reading headers only.

        Raises:
            UserError: listing every missing, unexpected and mis-shaped tensor (20 at most of each).
        """
        expected = {name: shape for row in table for name, shape in row.sources.items()}
        found = {name: self._shape(name) for name in self._file_of}
        for copy, original in _TIED.items():
            # Some tied checkpoints carry the output weight all the same, as a copy.
            if copy in found and copy not in expected and original in found:
                if not bool((self.tensor(copy) == self.tensor(original)).all()):
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

    def dtype(self, name: str) -> torch.dtype:
        """Of a tensor, as the file has it."""
        return self._files[self._file_of[name]].get_slice(name)[:0].dtype

    def _shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._files[self._file_of[name]].get_slice(name).get_shape())

    def tensor(self, name: str) -> Tensor:
        """One whole tensor, in the dtype of the file."""
        return self._files[self._file_of[name]].get_tensor(name)


_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".gguf", ".onnx"}


def copy_companions(source: Path, target: Path) -> None:
    """Copies what belongs to a checkpoint beside its weights: config, tokenizer, chat template."""
    for file in sorted(source.iterdir()):
        if file.is_file() and not _WEIGHTS & set(file.suffixes):
            shutil.copy2(file, target)


def write_checkpoint(
    path: Path, named_tensors: Iterable[tuple[str, Tensor]], companions: Path
) -> None:
    """Writes a Hugging Face checkpoint; it appears under its name only when it is complete.

    Args:
        named_tensors: consumed as a stream; at most one shard (5 GB) is in memory.
        companions: folder whose other files (config, tokenizer, chat template) come along.

    Raises:
        UserError: `path` exists already.
    """
    if path.exists():
        raise UserError(f"{path}: exists already; remove it or choose another output")
    partial = path.with_name(path.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    copy_companions(companions, partial)
    shards: list[dict[str, int]] = []
    for shard in _shards(named_tensors):
        save_file(shard, partial / f"{len(shards)}", metadata={"format": "pt"})
        shards.append({name: tensor.nbytes for name, tensor in shard.items()})
    _name_shards(partial, shards)
    partial.rename(path)


def _shards(named_tensors: Iterable[tuple[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    size = 0
    for name, tensor in named_tensors:
        if shard and size + tensor.nbytes > _SHARD_BYTES:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor.detach().cpu().contiguous()
        size += tensor.nbytes
    yield shard


def _name_shards(folder: Path, shards: Sequence[Mapping[str, int]]) -> None:
    """Gives the numbered shards their final names; their count is known only at the end."""
    if len(shards) == 1:
        (folder / "0").rename(folder / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards):
        file = f"model-{number + 1:05}-of-{len(shards):05}.safetensors"
        (folder / f"{number}").rename(folder / file)
        weight_map |= dict.fromkeys(shard, file)
    index = {
        "metadata": {"total_size": sum(sum(shard.values()) for shard in shards)},
        "weight_map": weight_map,
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")

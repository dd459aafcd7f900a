"""A Hugging Face model folder, read once and passed to the code that needs parts of it."""

import contextlib
import tempfile
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from klear_megatron.checkpoints.hf_reader import copy_companions, read_config
from klear_megatron.checkpoints.megatron_folder import model_settings
from klear_megatron.checkpoints.megatron_reader import MegatronCheckpoint
from klear_megatron.checkpoints.megatron_settings import check_settings, derived_config
from klear_megatron.errors import UserError
from klear_megatron.models import Architecture, Weight, get_architecture
from klear_megatron.models.tokenizer import name_stop_tokens, read_stop_token_ids, read_tokenizer


class ModelFolder:
    """What a folder with a config.json says about its model.

    The config is read at once. The tokenizer and the rest are read when first used: a checkpoint
    without a tokenizer can still be converted, and one of an unknown architecture still served.

    Args:
        chat_template: takes the place of the tokenizer's own.

    Raises:
        UserError: the folder does not exist or has no readable config.json. The properties raise
            it if what they read is missing or unknown.
    """

    def __init__(self, path: Path, chat_template: str | None = None) -> None:
        self.path = path
        self.chat_template = chat_template
        self.config = read_config(path)
        """The Hugging Face config."""

    @cached_property
    def architecture(self) -> Architecture:
        """Everything that depends on the kind of model."""
        return get_architecture(self.config)

    @cached_property
    def num_experts(self) -> int:
        """Experts per mixture-of-experts layer; 0 for a dense model."""
        return self.architecture.transformer_config(self.config).get("num_moe_experts", 0)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The folder's tokenizer; all its token ids are below `config.vocab_size`."""
        tokenizer = read_tokenizer(self.path, getattr(self.config, "vocab_size", None))
        if self.chat_template is not None:
            tokenizer.chat_template = self.chat_template
        return tokenizer

    @cached_property
    def stop_token_ids(self) -> list[int]:
        """Token ids that end a response."""
        return read_stop_token_ids(self.path, self.tokenizer)

    def copy_companions(self, target: Path) -> None:
        """Copies what accompanies the weights: config, tokenizer, chat template.

        `generation_config.json` then also names the token that ends a turn in the chat template:
        other programs would not stop there otherwise.
        """
        copy_companions(self.path, target)
        if self.chat_template is not None:
            # transformers prefers this file to what tokenizer_config.json says.
            (target / "chat_template.jinja").write_text(self.chat_template, encoding="utf-8")
        with contextlib.suppress(UserError):  # without a tokenizer there are no turns
            name_stop_tokens(target, self.tokenizer)

    def table(self, padded_vocab_size: int | None = None) -> list[Weight]:
        """The table of all weights; by default the vocabulary is not padded."""
        architecture = self.architecture  # an unknown one, as of images, may have no vocab_size
        size = self.config.vocab_size if padded_vocab_size is None else padded_vocab_size
        return list(architecture.weights(self.config, size))


@contextlib.contextmanager
def config_of(source: MegatronCheckpoint, hf: Path | None = None) -> Iterator[ModelFolder]:
    """The config and tokenizer that belong to a Megatron checkpoint.

    By default those in its `hf/`, as in this package's checkpoints; without that, a config derived
    from what Megatron-LM or Megatron-Bridge stored of the model, and no tokenizer.

    Args:
        hf: a Hugging Face folder to use instead.

    Raises:
        UserError: the checkpoint says of its model what contradicts `hf`, or not enough.
    """
    if hf is None and (source.path / "hf").is_dir():
        yield ModelFolder(source.path / "hf")
        return
    settings = model_settings(source.path)
    if hf is not None:
        folder = ModelFolder(hf)
        if settings is not None:
            check_settings(settings, folder.config, source=source.path)
        yield folder
        return
    if settings is None:
        raise UserError(
            f"{source.path}: has neither hf/, the arguments of Megatron-LM in common.pt, nor "
            "run_config.yaml; give the model's config with --hf"
        )
    with tempfile.TemporaryDirectory() as temporary:
        config = derived_config(settings, source.vocabulary_rows, source=source.path)
        config.save_pretrained(temporary)
        yield ModelFolder(Path(temporary))

"""A Hugging Face model folder, read once and passed to the code that needs parts of it."""

from functools import cached_property
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from klear_megatron.checkpoints.hf_reader import read_config
from klear_megatron.models import Architecture, Weight, get_architecture
from klear_megatron.models.tokenizer import read_stop_token_ids, read_tokenizer


class ModelFolder:
    """What a folder with a config.json says about its model.

    The config is read at once. The tokenizer and the rest are read when first used: a checkpoint
    without a tokenizer can still be converted, and one of an unknown architecture still served.

    Raises:
        UserError: the folder does not exist or has no readable config.json. The properties raise
            it if what they read is missing or unknown.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
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
        """The folder's tokenizer."""
        return read_tokenizer(self.path)

    @cached_property
    def stop_token_ids(self) -> list[int]:
        """Token ids that end a response."""
        return read_stop_token_ids(self.path, self.tokenizer)

    def table(self, padded_vocab_size: int | None = None) -> list[Weight]:
        """The table of all weights; by default the vocabulary is not padded."""
        size = self.config.vocab_size if padded_vocab_size is None else padded_vocab_size
        return list(self.architecture.weights(self.config, size))

"""Reads prompts and conversations, encodes them, and decides their order in training."""

from klear_megatron.data.config import ConversationsConfig, DataConfig, PromptsConfig, StageConfig
from klear_megatron.data.encoding import encode_conversation, encode_prompt
from klear_megatron.data.loading import LoadedPrompts, load_prompts
from klear_megatron.data.rows import Conversation, Prompt, read_prompts
from klear_megatron.data.sampler import PromptSampler, note_on_repeats

__all__ = [
    "Conversation",
    "ConversationsConfig",
    "DataConfig",
    "LoadedPrompts",
    "Prompt",
    "PromptSampler",
    "PromptsConfig",
    "StageConfig",
    "encode_conversation",
    "encode_prompt",
    "load_prompts",
    "note_on_repeats",
    "read_prompts",
]

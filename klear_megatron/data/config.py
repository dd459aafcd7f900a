from pathlib import Path

from pydantic import Field

from klear_megatron.config import Section


class DataConfig(Section):
    """Which prompts to read."""

    path: Path
    """A .jsonl or .parquet file in Klear's format."""

    max_prompt_length: int = Field(default=4096, ge=1)
    """In tokens, chat template included; longer prompts are left out."""

"""Configuration: pydantic sections, read from YAML plus command-line overrides."""

from klear_megatron.config.loading import as_yaml, load_config, validate, write_config
from klear_megatron.config.section import Section

__all__ = ["Section", "as_yaml", "load_config", "validate", "write_config"]

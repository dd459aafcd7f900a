"""Choosing the prompts to train on."""

from klear_megatron.curation.config import CurateConfig
from klear_megatron.curation.curate import CurationReport, curate

__all__ = ["CurateConfig", "CurationReport", "curate"]

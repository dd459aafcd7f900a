"""What a run reports about itself: metrics, progress, and how long its phases take."""

from klear_megatron.observability.phases import Phases
from klear_megatron.observability.progress import Progress, say
from klear_megatron.observability.recorder import Recorder

__all__ = ["Phases", "Progress", "Recorder", "say"]

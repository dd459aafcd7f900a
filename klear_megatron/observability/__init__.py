"""What a run reports about itself: metrics, progress, and how long its phases take."""

from klear_megatron.observability.metric import Metric
from klear_megatron.observability.phases import Phases
from klear_megatron.observability.progress import Progress, say
from klear_megatron.observability.recorder import Recorder, Tracker
from klear_megatron.observability.rollout_files import RolloutFiles
from klear_megatron.observability.usage import append_usage, read_usage, used_until

__all__ = [
    "Metric",
    "Phases",
    "Progress",
    "Recorder",
    "RolloutFiles",
    "Tracker",
    "append_usage",
    "read_usage",
    "say",
    "used_until",
]

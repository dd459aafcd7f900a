"""Planning: will a run fit, and how long will it take. Pure: no weights, no GPU, no Megatron."""

from klear_megatron.planning.hardware import Efficiency, Hardware, read_hardware
from klear_megatron.planning.here import hardware_here
from klear_megatron.planning.model import PlannedModel
from klear_megatron.planning.plan import Plan, plan
from klear_megatron.planning.search import search
from klear_megatron.planning.work import Work

__all__ = [
    "Efficiency",
    "Hardware",
    "Plan",
    "PlannedModel",
    "Work",
    "hardware_here",
    "plan",
    "read_hardware",
    "search",
]

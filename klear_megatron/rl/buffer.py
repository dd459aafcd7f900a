"""Which prompts are asked ahead of training, and which groups a step trains. Pure: it knows no
network, thread or clock."""

import itertools
from collections import deque
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(eq=False)
class Slot(Generic[T]):
    """The place of one prompt in the buffer."""

    row: int
    """Which prompt it is."""
    group: T | None = None
    """The graded responses, once they are there."""
    informative: bool = False
    """Whether a step can learn from the group."""


class Buffer(Generic[T]):
    """One leader's groups, from the moment their prompts are asked until a step takes them.

    Staleness is the version of the weights being trained (the number of steps before this one)
    minus the version that drew the oldest token. Two rules keep it within `max_staleness` for every
    group, whatever the order in which groups are finished:

    - A prompt is asked only while the slots in use are fewer than the steps that may still train
      what the current weights draw, times `groups_per_step`. This is the capacity rule of AReaL
      (arXiv 2505.24298, section 5.1).
    - Each step takes the oldest `groups_per_step` slots, and waits until they are settled. So a
      group is never dropped or preferred for its length.

    An uninformative group gives its slot up, which makes room for exactly one new prompt. The
    replacements for a step are limited to `batches - 1` times its groups; what is not used is kept,
    for as many steps as may be drawn ahead. Beyond the limit an uninformative group stays in its
    slot, and its step has one group less.

    Args:
        groups_per_step: slots that each step takes.
        batches: prompts asked for a step, at most, as a multiple of `groups_per_step`.
        version: of the weights that the servers have at the start.
    """

    def __init__(
        self, max_staleness: int, groups_per_step: int, batches: int, version: int = 0
    ) -> None:
        self.version = version
        self.slots: deque[Slot[T]] = deque()
        """Those in use, in the order in which their prompts were asked."""
        self.replaced: list[Slot[T]] = []
        """Those that were given up since the last step took its groups."""
        self._ahead = max_staleness + 1
        self._per_step = groups_per_step
        self._new_replacements = (batches - 1) * groups_per_step
        self._replacements = self._ahead * self._new_replacements
        self._steps_taken = version

    @property
    def has_room(self) -> bool:
        """Whether one more prompt may be asked now."""
        steps_left = self._ahead + self.version - self._steps_taken
        return len(self.slots) < steps_left * self._per_step

    def ask(self, row: int) -> Slot[T]:
        """Takes a slot for a prompt that is asked now, where there is room."""
        slot: Slot[T] = Slot(row)
        self.slots.append(slot)
        return slot

    def settle(self, slot: Slot[T], group: T, *, informative: bool) -> None:
        """The group of this slot is graded."""
        slot.group, slot.informative = group, informative
        if not informative and self._replacements:
            self._replacements -= 1
            self.slots.remove(slot)
            self.replaced.append(slot)

    @property
    def most_to_ask(self) -> int:
        """Prompts that may be asked, at most, from one step's groups to the next step's."""
        return (self._ahead + 1) * (self._per_step + self._new_replacements)

    @property
    def ready(self) -> bool:
        """Whether the next step can take its groups."""
        next_ones = itertools.islice(self.slots, self._per_step)
        return len(self.slots) >= self._per_step and all(
            slot.group is not None for slot in next_ones
        )

    @property
    def unfinished(self) -> int:
        """Prompts whose responses are still drawn or graded."""
        return sum(slot.group is None for slot in self.slots)

    def take(self) -> list[Slot[T]]:
        """The slots of the next step, and before them those replaced since the last one."""
        taken = self.replaced + [self.slots.popleft() for _ in range(self._per_step)]
        self.replaced = []
        self._steps_taken += 1
        return taken

    def advance(self, version: int) -> None:
        """The servers draw with the weights of this version from now on."""
        new = (version - self.version) * self._new_replacements
        self._replacements = min(self._replacements + new, self._ahead * self._new_replacements)
        self.version = version

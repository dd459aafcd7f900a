"""The sequences that are planned for."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Work:
    """The sequences of one optimizer step, or of one micro-batch of it."""

    lengths: tuple[int, ...]
    """Tokens of each sequence. A step's are over all data-parallel ranks; a micro-batch's include
    padding and are over all context-parallel ranks."""

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

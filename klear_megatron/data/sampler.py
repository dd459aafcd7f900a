"""The order in which the rows of a data set are trained on."""

from collections.abc import Mapping

import numpy as np

from klear_megatron.errors import UserError


class PromptSampler:
    """Endless row numbers: each epoch is a shuffle of all rows, fixed by the seed and the epoch.

    How many rows were handed out is the whole state, so a restored sampler goes on with exactly
    the row that would have come next, also with another batch size.
    """

    def __init__(self, num_rows: int, seed: int) -> None:
        self._num_rows = num_rows
        self._seed = seed
        self._consumed = 0
        self._epoch = -1
        self._order = np.empty(0, dtype=np.int64)

    def next_batch(self, size: int) -> list[int]:
        """The next `size` row numbers; a batch may run over the end of an epoch."""
        return [self._next_row() for _ in range(size)]

    def _next_row(self) -> int:
        epoch, position = divmod(self._consumed, self._num_rows)
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = np.random.default_rng([self._seed, epoch]).permutation(self._num_rows)
        self._consumed += 1
        return int(self._order[position])

    def state_dict(self) -> dict[str, int]:
        return {"num_rows": self._num_rows, "seed": self._seed, "consumed": self._consumed}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Raises UserError where the state is of other data or another seed."""
        for name, ours in (("num_rows", self._num_rows), ("seed", self._seed)):
            if state[name] != ours:
                raise UserError(
                    f"data: the checkpoint was made with {name} = {state[name]}, this run has "
                    f"{ours}; resume with the same data file and seed"
                )
        self._consumed = state["consumed"]

"""The order in which the rows of a data set are trained on."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from klear_megatron.data.config import StageConfig
from klear_megatron.errors import UserError, nearest


class PromptSampler:
    """Endless row numbers: each epoch is a shuffle of all rows, fixed by the seed and the epoch.

    With stages, each data source has epochs of its own, which go on from stage to stage. Within a
    stage the sources take turns, so that after any number of rows each has had its weight's share
    of them, to within one row or so; nothing about it is random but the shuffles.

    How many rows were handed out of what is the whole state, so a restored sampler goes on with
    exactly the row that would have come next, also with another batch size.
    """

    def __init__(
        self,
        num_rows: int,
        seed: int,
        data_sources: Sequence[str] = (),
        stages: Sequence[StageConfig] = (),
    ) -> None:
        """
        Args:
            data_sources: of each row; needed only with stages.

        Raises:
            UserError: a stage names a data source that no row is of.
        """
        self._num_rows = num_rows
        self._seed = seed
        self._weights = [dict(stage.weights) for stage in stages] or [{"": 1.0}]
        self._lengths = [stage.prompts for stage in stages] or [None]
        self._rows = {"": np.arange(num_rows)} if not stages else _rows_by_source(data_sources)
        for i, weights in enumerate(self._weights):
            for source in weights:
                if source not in self._rows:
                    raise UserError(
                        f"data.stages.{i}.weights.{source}: no row is of this data source; "
                        f"{nearest(source, sorted(self._rows))}"
                    )
        self._stage = 0
        self._drawn: Counter[str] = Counter()
        self._drawn_in_stage: Counter[str] = Counter()
        self._epochs: dict[str, tuple[int, Any]] = {}

    def next_batch(self, size: int) -> list[int]:
        """The next `size` row numbers; a batch may run over the end of an epoch or a stage."""
        return [self._next_row() for _ in range(size)]

    def _next_row(self) -> int:
        if self._drawn_in_stage.total() == self._lengths[self._stage]:
            self._stage += 1
            self._drawn_in_stage.clear()
        source = self._most_behind()
        rows = self._rows[source]
        epoch, position = divmod(self._drawn[source], len(rows))
        if self._epochs.get(source, (-1,))[0] != epoch:
            # Sources must not be shuffled alike; without stages there is one, of number 0.
            number = sorted(self._rows).index(source)
            entropy = [self._seed, epoch, number] if number else [self._seed, epoch]
            order = np.random.default_rng(entropy).permutation(len(rows))
            self._epochs[source] = epoch, order
        self._drawn[source] += 1
        self._drawn_in_stage[source] += 1
        return int(rows[self._epochs[source][1][position]])

    def _most_behind(self) -> str:
        """The source that has had the least of its share of the stage's rows so far."""
        weights = self._weights[self._stage]
        drawn = self._drawn_in_stage
        due = (drawn.total() + 1) / sum(weights.values())
        return max(sorted(weights), key=lambda source: weights[source] * due - drawn[source])

    def state_dict(self) -> dict[str, Any]:
        return {
            "num_rows": self._num_rows,
            "seed": self._seed,
            "stage": self._stage,
            "drawn": dict(self._drawn),
            "drawn_in_stage": dict(self._drawn_in_stage),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises UserError where the state is of other data, stages or another seed."""
        for name, ours in (("num_rows", self._num_rows), ("seed", self._seed)):
            if state[name] != ours:
                raise UserError(
                    f"data: the checkpoint was made with {name} = {state[name]}, this run has "
                    f"{ours}; resume with the same data file and seed"
                )
        known = state["stage"] < len(self._weights)
        if not known or not state["drawn_in_stage"].keys() <= self._weights[state["stage"]].keys():
            raise UserError(
                f"data.stages: the checkpoint was made in stage {state['stage']}, of other data "
                "sources; resume with the same stages, to which others may be added"
            )
        self._stage = state["stage"]
        self._drawn = Counter(state["drawn"])
        self._drawn_in_stage = Counter(state["drawn_in_stage"])


def _rows_by_source(data_sources: Sequence[str]) -> dict[str, Any]:
    sources = np.array(data_sources)
    return {str(source): np.flatnonzero(sources == source) for source in np.unique(sources)}

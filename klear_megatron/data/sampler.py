"""The order in which the rows of a data set are trained on."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from klear_megatron.data.config import StageConfig
from klear_megatron.errors import UserError, nearest


def note_on_repeats(rows: int, per_step: int, setting: str) -> list[str]:
    """A line for the user if a step has to take rows more than once.

    Args:
        setting: the config key that says how many rows a step takes.
    """
    if rows >= per_step:
        return []
    return [f"data: {rows} rows, but a step takes {per_step} ({setting}): some of them repeatedly"]


class PromptSampler:
    """Endless row numbers: each epoch is a shuffle of all rows, fixed by the seed and the epoch.

    With stages, each data source has its own epochs, which continue from stage to stage. Within a
    stage the sources take turns, so that after any number of rows each source has had the share
    that its weight gives it, to within about one row. Only the shuffles are random.

    The state is just the number of rows handed out from each source, so a restored sampler
    continues with exactly the next row, even with another batch size.
    """

    def __init__(
        self,
        num_rows: int,
        seed: int,
        data_sources: Sequence[str] = (),
        stages: Sequence[StageConfig] = (),
        fingerprint: str = "",
    ) -> None:
        """
        Args:
            data_sources: the data source of each row; needed only with stages.
            fingerprint: tells the rows from others.

        Raises:
            UserError: a stage names a data source that no row has.
        """
        self._num_rows = num_rows
        self._seed = seed
        self._fingerprint = fingerprint
        self._weights = [dict(stage.weights) for stage in stages] or [{"": 1.0}]
        self._lengths = [stage.prompts for stage in stages] or [None]
        self._rows = {"": np.arange(num_rows)} if not stages else _rows_by_source(data_sources)
        for i, weights in enumerate(self._weights):
            for source in weights:
                if source not in self._rows:
                    raise UserError(
                        f"data.stages.{i}.weights.{source}: no row has this data source; "
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
            # Each source needs a different shuffle; without stages there is one source, number 0.
            number = sorted(self._rows).index(source)
            entropy = [self._seed, epoch, number] if number else [self._seed, epoch]
            order = np.random.default_rng(entropy).permutation(len(rows))
            self._epochs[source] = epoch, order
        self._drawn[source] += 1
        self._drawn_in_stage[source] += 1
        return int(rows[self._epochs[source][1][position]])

    def _most_behind(self) -> str:
        """The source that is furthest behind its share of the stage's rows."""
        weights = self._weights[self._stage]
        drawn = self._drawn_in_stage
        due = (drawn.total() + 1) / sum(weights.values())
        return max(sorted(weights), key=lambda source: weights[source] * due - drawn[source])

    @property
    def epoch(self) -> float:
        """How often the rows have been handed out, on average."""
        return self._drawn.total() / self._num_rows

    def state_dict(self) -> dict[str, Any]:
        return {
            "num_rows": self._num_rows,
            "seed": self._seed,
            "fingerprint": self._fingerprint,
            "stage": self._stage,
            "drawn": dict(self._drawn),
            "drawn_in_stage": dict(self._drawn_in_stage),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores a state that `state_dict` returned.

        Raises:
            UserError: the state belongs to other data, other stages or another seed.
        """
        for name, what, ours in (
            ("num_rows", "number of rows", self._num_rows),
            ("seed", "seed", self._seed),
        ):
            if state[name] != ours:
                raise UserError(
                    f"data: the {what} was {state[name]} when the checkpoint was made, and is "
                    f"{ours}; resume with the same data and seed, or choose another run_dir"
                )
        if state["fingerprint"] != self._fingerprint:
            raise UserError(
                "data: other rows than the checkpoint was made with, though as many; a run goes on "
                "in the middle of its data. Resume with the same data and tokenizer, or choose "
                "another run_dir"
            )
        known = state["stage"] < len(self._weights)
        if not known or not state["drawn_in_stage"].keys() <= self._weights[state["stage"]].keys():
            raise UserError(
                f"data.stages: the checkpoint was made in stage {state['stage']}, which has other "
                "data sources; resume with the same stages (you may add more at the end)"
            )
        self._stage = state["stage"]
        self._drawn = Counter(state["drawn"])
        self._drawn_in_stage = Counter(state["drawn_in_stage"])


def _rows_by_source(data_sources: Sequence[str]) -> dict[str, Any]:
    sources = np.array(data_sources)
    return {str(source): np.flatnonzero(sources == source) for source in np.unique(sources)}

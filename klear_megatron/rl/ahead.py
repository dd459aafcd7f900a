"""Rollouts that are drawn while the trainer trains, a bounded number of steps ahead."""

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist

from klear_megatron.data import LoadedPrompts, PromptSampler
from klear_megatron.observability import Phases
from klear_megatron.platform import objects
from klear_megatron.rl import buffer_files
from klear_megatron.rl.buffer import Buffer
from klear_megatron.rl.config import RLConfig
from klear_megatron.rl.groups import Group, GroupMaker
from klear_megatron.rl.metrics import staleness_metrics
from klear_megatron.rl.producer import Producer, Taken
from klear_megatron.rl.rollouts import DRAWN_AHEAD, Collector, Rollouts
from klear_megatron.rl.servers import PolicyServers


class AheadCollector(Collector):
    """Takes a step's groups from buffers that a producer of each leader fills all the time.

    Each leader has its share of a step's groups, asks its own prompts, and takes its own oldest
    groups, so leaders need not agree on anything.

    Args:
        stack: ends the producer.
        version: of the weights that the servers get first.
    """

    def __init__(
        self,
        config: RLConfig,
        prompts: LoadedPrompts,
        sampler: PromptSampler,
        servers: PolicyServers,
        maker: GroupMaker | None,
        stack: contextlib.ExitStack,
        version: int,
    ) -> None:
        super().__init__(config, prompts, sampler, servers, maker)
        self._producer = None
        if maker is not None:
            share = maker.share
            mine = len(range(share.leader, config.prompts_per_step, share.leaders))
            buffer: Buffer[Group] = Buffer(
                config.max_staleness, mine, config.max_generation_batches, version
            )
            self._producer = stack.enter_context(Producer(prompts, servers, maker, buffer))

    def collect(self, step: int, phases: Phases) -> Rollouts:
        """Collective. The oldest groups, once they are finished. As many prompts were asked for
        them as `max_generation_batches` allows; possibly none is informative.

        Raises:
            UserError: a server refused a request, all were lost and did not come back, or a reward
                function failed.
            Stopped: the run was told to stop while it waited.
        """
        producer = self._producer
        with phases("wait"):
            self._deal()
            self._servers.persist(lambda _: producer.wait() if producer else None)
        taken = producer.take() if producer else Taken([], 0, 0.0)
        made = [slot.group for slot in taken.slots if slot.group is not None]
        rollouts = self._finish(step, made, phases)
        trained = [group for group in made if group.informative]
        rollouts.metrics.update(
            staleness_metrics(trained, step - 1, taken.carried_over, taken.idle_s)
        )
        return rollouts

    def state_dict(self) -> dict[str, Any]:
        # Also the prompts that have been dealt since are kept: in the buffers.
        return {"sampler": self._sampler.state_dict(), DRAWN_AHEAD: len(self._leading_ranks)}

    def save(self, folder: Path) -> None:
        """Writes the buffer of a rank that leads into the folder of a checkpoint.

        Raises:
            UserError: the disk is full, or refuses for another reason.
        """
        if self._producer is not None:
            assert self._maker is not None
            with self._producer.changed:
                held = buffer_files.held_by(self._producer.buffer, self._producer.rows)
            path = buffer_files.path_of(folder, self._maker.share.leader)
            buffer_files.write(path, held, self._config)

    def load(self, state: Mapping[str, Any], folder: Path) -> None:
        """Collective. Goes on from a checkpoint, after the sampler does, and with any number of
        leaders. Finished groups are kept, and prompts that were in flight are asked again.

        Raises:
            UserError: a file of the buffer is missing, damaged or of another config.
        """
        producer, maker = self._producer, self._maker

        def load() -> None:
            if producer is None or maker is None or DRAWN_AHEAD not in state:
                return
            paths = [buffer_files.path_of(folder, i) for i in range(state[DRAWN_AHEAD])]
            held = [
                buffer_files.read(path, self._config, self._prompts, maker.text_of)
                for path in paths
            ]
            mine = buffer_files.deal(held, self._config.prompts_per_step, maker.share)
            producer.buffer.slots.extend(mine.slots)
            producer.buffer.replaced.extend(mine.replaced)
            producer.rows.extend(mine.rows)

        objects.together(load)

    def _deal(self) -> None:
        """Collective. Gives each leader the prompts that it may ask until the next call."""
        producer, missing = self._producer, 0
        if producer is not None:
            with producer.changed:
                missing = producer.buffer.most_to_ask - len(producer.rows)
        # In turn, so that all leaders are as far in the data.
        turns = sorted(
            (turn, rank)
            for rank, count in enumerate(objects.all_gather(missing))
            for turn in range(count)
        )
        rows = self._sampler.next_batch(len(turns))
        if producer is not None:
            mine = dist.get_rank()
            with producer.changed:
                producer.rows.extend(
                    row for (_, rank), row in zip(turns, rows, strict=True) if rank == mine
                )

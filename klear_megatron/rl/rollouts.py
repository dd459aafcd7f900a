"""What a step trains on: enough informative groups, of all leaders, shared with all ranks.

The first rank of each model-parallel group leads: it makes the groups of its share of the prompts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from klear_megatron.data import LoadedPrompts, PromptSampler
from klear_megatron.errors import UserError
from klear_megatron.observability import Phases, Progress
from klear_megatron.platform import objects
from klear_megatron.policy.batch import Batch
from klear_megatron.rl.batches import batch_of, with_whitened_advantages
from klear_megatron.rl.config import RLConfig
from klear_megatron.rl.dumps import Dumps
from klear_megatron.rl.groups import Group, GroupMaker
from klear_megatron.rl.metrics import group_metrics, request_metrics
from klear_megatron.rl.servers import PolicyServers
from klear_megatron.rl.sharing import share
from klear_megatron.rollout import Generator

DRAWN_AHEAD = "drawn_ahead"
"""The entry of a checkpoint's state that tells of a buffer."""


@dataclass(frozen=True)
class Rollouts:
    """What a step trains on, the same on every rank."""

    batch: Batch
    """Groups of `responses_per_prompt` sequences each; see `batch_of`."""
    groups: int
    metrics: dict[str, float]
    made: Sequence[Group]
    """This rank's groups, trained on or not."""
    own: slice
    """Where in the batch those of its responses are that are trained on."""
    drawn: Sequence[int]
    """Tokens of each sequence that any leader has drawn, trained on or not."""


class Collector:
    """Collects the rollouts of a step. Ranks that do not lead only take part in sharing them.

    Args:
        prompts: the sampler hands out indices into them.
        maker: makes the groups of this rank's share of the prompts; None on a rank that does not
            lead.
    """

    def __init__(
        self,
        config: RLConfig,
        prompts: LoadedPrompts,
        sampler: PromptSampler,
        servers: PolicyServers,
        maker: GroupMaker | None,
    ) -> None:
        self._config = config
        self._prompts = prompts
        self._sampler = sampler
        self._servers = servers
        self._maker = maker
        self._next_prompts = sampler.state_dict()
        self._crashes = 0
        leads = objects.all_gather(maker is not None)
        self._leading_ranks = [rank for rank, does in enumerate(leads) if does]
        self._dumps = Dumps(config, maker.share.leader if maker is not None else None)

    def collect(self, step: int, phases: Phases) -> Rollouts:
        """Collective. Makes groups until `prompts_per_step` are informative, as far as the limit on
        generation batches allows; possibly none is.

        Raises:
            UserError: a server refused a request, all were lost and did not come back, or a reward
                function failed.
            Stopped: the run was told to stop while it generated or graded.
        """
        wanted = self._config.prompts_per_step
        made: list[Group] = []
        for _ in range(self._config.max_generation_batches):
            made += self._make(self._sampler.next_batch(wanted), phases)
            informative = sum(group.informative for group in made)
            if sum(objects.all_gather(informative)) >= wanted:
                break
        rollouts = self._finish(step, made, phases)
        self._next_prompts = self._sampler.state_dict()
        return rollouts

    def dump_tokens(self, step: int, rollouts: Rollouts) -> None:
        """Keeps the rollouts that `collect` returned token by token, once they are trained on, or
        training has failed."""
        self._dumps.write_tokens(step, rollouts.made, rollouts.batch, rollouts.own)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs to go on after the last step collected, the same on all ranks."""
        return {"sampler": self._next_prompts}

    def save(self, folder: Path) -> None:
        """Writes what else a checkpoint needs into its folder: nothing."""

    def load(self, state: Mapping[str, Any], folder: Path) -> None:
        """Collective. Goes on from a checkpoint, after the sampler does.

        Raises:
            UserError: it has a buffer, whose groups would be lost.
        """
        if DRAWN_AHEAD in state:
            raise UserError(
                f"max_staleness: {folder} holds groups that were drawn ahead and would be lost "
                "with 0; set it back to what it was, or choose another run_dir"
            )

    def _make(self, rows: Sequence[int], phases: Phases) -> list[Group]:
        """Collective. The groups of those rows that this rank leads."""
        making, enabled = None, False
        if self._maker is not None:
            share = self._maker.share
            rows = rows[share.leader :: share.leaders]
            making = self._maker.start(self._prompts, rows)
            enabled = share.leader == 0

        def draw(generator: Generator) -> None:
            assert making is not None  # only ranks that lead draw
            making.draw(generator, progress.advance)

        with (
            phases("generate"),
            Progress("  generate", len(rows), enabled=enabled, keep=False) as progress,
        ):
            self._servers.persist(draw)
        with phases("reward"):
            return objects.together(making.finish if making is not None else list)

    def _finish(self, step: int, made: Sequence[Group], phases: Phases) -> Rollouts:
        """Collective. Dumps the groups that were made, and shares all leaders' informative ones, no
        more than are wanted."""
        self._dumps.write_texts(step, made)
        with phases("share"):
            size = self._config.responses_per_prompt
            mine = batch_of([group for group in made if group.informative], self._config)
            batch, own = share(mine, self._leading_ranks, self._config.prompts_per_step * size)
            if self._config.advantages.whitened:
                batch = with_whitened_advantages(batch)
            groups = len(batch.lengths) // size
            crashes = self._maker.rewards.crashes if self._maker is not None else 0
            metrics = group_metrics(made, crashes - self._crashes) | {"groups/trained": groups}
            metrics |= request_metrics(self._servers.take_answered())
            self._crashes = crashes
            drawn = [length for lengths in objects.all_gather(_lengths(made)) for length in lengths]
            return Rollouts(batch, groups, metrics, made, own, drawn)


def _lengths(made: Sequence[Group]) -> list[int]:
    return [
        len(group.prompt_ids) + len(response.token_ids)
        for group in made
        for response in group.responses
    ]

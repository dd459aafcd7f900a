"""The servers that generate for a policy in training."""

import contextlib
from collections import Counter
from collections.abc import Callable, Collection

from klear_megatron.checkpoints.model_folder import ModelFolder
from klear_megatron.errors import Stopped
from klear_megatron.observability import say
from klear_megatron.platform import objects, stop
from klear_megatron.policy.model import Model
from klear_megatron.rl.config import RLConfig
from klear_megatron.rollout import Generator, ServersLostError, serving
from klear_megatron.rollout.servers import count_devices
from klear_megatron.rollout.weight_sender import WeightSyncError
from klear_megatron.rollout.weight_sync import WeightSync
from klear_megatron.training import run

_MAX_LOSSES_IN_A_ROW = 3
"""Give up after losing all servers this many times in a row."""


class PolicyServers:
    """Servers that have the policy's weights after each `sync`. Collective.

    The main rank starts the servers, pushes the weights, and stops the servers when `stack` ends.

    Args:
        leads: whether this rank draws responses and therefore has a `generator`.

    Raises:
        UserError: servers do not start or do not answer.
    """

    def __init__(
        self,
        model: Model,
        config: RLConfig,
        folder: ModelFolder,
        stack: contextlib.ExitStack,
        *,
        leads: bool,
    ) -> None:
        self._model = model
        self.version = 0
        """Of the weights that the last `sync` pushed."""
        self._max_staleness = config.max_staleness
        self._main = run.is_main_rank()

        def start() -> list[str]:
            logs = config.run_dir / "logs"
            servers = serving(config.rollout, folder.path, logs, seed=config.seed, own_weights=True)
            self._servers = stack.enter_context(servers)
            return self._servers.urls

        # The other ranks wait here and below while servers start: a collective in the policy's own
        # groups would time out.
        self._urls = objects.broadcast(objects.together(lambda: start() if self._main else []))
        self._weights = stack.enter_context(
            WeightSync(self._urls, config.rollout, model.placed_hf_tensors)
        )
        self.generator = Generator.for_model(folder, self._urls, config.rollout) if leads else None

    def sync(self, version: int) -> None:
        """Collective. Gives all servers the policy's weights. Requests in flight are interrupted
        and go on with them; no other is begun meanwhile.

        Lost servers are started again first, so that no server gets work before it has current
        weights. If a server is lost during the push, all are started again and get one more push.

        Raises:
            UserError: a lost server does not come back, or the servers do not take the weights.
            Stopped: the run was told to stop, which may be why the servers are lost.
        """
        if self.generator is not None:
            self.generator.held = True
            # Also what is still in flight from before, which may be no older.
            usable = range(version - self._max_staleness, version + 1)
            self.generator.weight_versions = frozenset(map(str, usable))
        lost = set().union(*objects.all_gather(self.generator.lost if self.generator else set()))
        if failure := self._push(version, lost):
            stop.check_all()
            if self._main:
                say(f"{failure}; starting all servers again")
            failure = self._push(version, self._urls)
        if failure:
            stop.check_all()
            raise WeightSyncError(failure)
        if self.generator is not None:
            self.generator.lost.clear()
            self.generator.held = False
        self.version = version

    def devices(self) -> dict[str, int]:
        """What the servers run on; see `count_devices`. Nothing on ranks other than the first.

        Raises:
            UserError: one does not answer.
        """
        return count_devices(self._urls) if self._main else {}

    def take_answered(self) -> dict[str, int]:
        """Prompts of this rank that each server has answered since the last call."""
        if self.generator is None:
            return {}
        answered, self.generator.answered = self.generator.answered, Counter()
        return {url: answered[url] for url in self._urls}

    def persist(self, draw: Callable[[Generator], None]) -> None:
        """Collective. Calls `draw` with the generator on the ranks that lead. If any rank loses all
        servers, they are started again with the weights of the last `sync`, and `draw` is called
        again.

        Raises:
            UserError: on all ranks, if `draw` raises another error on one of them, or all servers
                are lost several times in a row.
            Stopped: on all ranks, if any was told to stop while it drew.
        """
        for attempt in range(1, _MAX_LOSSES_IN_A_ROW + 1):
            failures = objects.failures(lambda: draw(self.generator) if self.generator else None)
            if not failures:
                return
            for stopped in (one for one in failures if isinstance(one, Stopped)):
                raise stopped
            final = [one for one in failures if not isinstance(one, ServersLostError)]
            if final or attempt == _MAX_LOSSES_IN_A_ROW:
                raise (final or failures)[0]
            self.sync(self.version)

    def _push(self, version: int, lost: Collection[str]) -> str | None:
        """Returns the reason if the push failed.

        Raises:
            UserError: on all ranks, if a lost server does not come back.
        """
        objects.together(lambda: self._servers.restore(lost) if self._main else None)
        try:
            self._weights.push(self._model.own_hf_tensors(), version)
        except WeightSyncError as error:
            return str(error)
        return None

"""The servers that a policy in training draws its responses from."""

import collections
import contextlib
from collections.abc import Callable, Collection

from klear_megatron.checkpoints.model_folder import ModelFolder
from klear_megatron.observability import say
from klear_megatron.platform import objects
from klear_megatron.policy.model import Model
from klear_megatron.rl.config import RLConfig
from klear_megatron.rollout import Generator, ServersLostError, serving
from klear_megatron.rollout.weight_sync import WeightSync, WeightSyncError
from klear_megatron.training import run

_MAX_LOSSES_IN_A_ROW = 3
"""Give up after losing all servers this many times in a row."""


class PolicyServers:
    """Servers that answer with the policy's weights after each `sync`. Collective.

    The main rank starts them and, when `stack` is left, stops them; it is the one that pushes.

    Args:
        leads: whether this rank draws responses, and so has a `generator`.

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
        self._version = 0
        self._main = run.is_main_rank()
        urls: list[str] = []
        if self._main:
            logs = config.run_dir / "logs"
            servers = serving(config.rollout, folder.path, logs, seed=config.seed, own_weights=True)
            self._servers = stack.enter_context(servers)
            urls = self._servers.urls
            self._weights = stack.enter_context(WeightSync(urls, config.rollout))
        self._urls = objects.broadcast(urls)
        self.generator = Generator.for_model(folder, self._urls, config.rollout) if leads else None

    def sync(self, version: int) -> None:
        """Collective. Gives all servers the policy's weights, those that were lost included.

        Those are started again first, so that none gets work before it has current weights. If
        that happens to one while weights are pushed, all are started again, and pushed to once
        more.

        Raises:
            UserError: a lost server does not come back, or the servers do not take the weights.
        """
        lost = set().union(*objects.all_gather(self.generator.lost if self.generator else set()))
        if failure := self._push(version, lost):
            if self._main:
                say(f"{failure}; starting all servers again")
            failure = self._push(version, self._urls)
        if failure:
            raise WeightSyncError(failure)
        if self.generator is not None:
            self.generator.lost.clear()
            self.generator.weight_version = str(version)
        self._version = version

    def persist(self, draw: Callable[[Generator], None]) -> None:
        """Collective. On ranks that lead, calls `draw` with the generator; again, if all servers
        were lost in it on any rank, when they are back with the weights of the last `sync`.

        Raises:
            UserError: on all ranks, where `draw` raises another on one of them, or the servers are
                lost again and again.
        """
        for attempt in range(1, _MAX_LOSSES_IN_A_ROW + 1):
            failures = objects.failures(lambda: draw(self.generator) if self.generator else None)
            if not failures:
                return
            final = [one for one in failures if not isinstance(one, ServersLostError)]
            if final or attempt == _MAX_LOSSES_IN_A_ROW:
                raise (final or failures)[0]
            self.sync(self._version)

    def _push(self, version: int, lost: Collection[str]) -> str | None:
        """Tells why it failed, if it did.

        Raises:
            UserError: on all ranks, where a lost server does not come back.
        """
        # The other ranks wait here while servers start: a collective in the policy's own groups
        # would time out.
        objects.together(lambda: self._servers.restore(lost) if self._main else None)
        failure: str | None = None
        tensors = self._model.named_hf_tensors()
        if self._main:
            try:
                self._weights.push(tensors, version)
            except WeightSyncError as error:
                failure = str(error)
        # All ranks take part until the end, whatever happens to the servers.
        collections.deque(tensors, maxlen=0)
        return objects.broadcast(failure)

"""The reference policy, from which a KL penalty keeps the trained one."""

from klear_megatron.checkpoints.model_folder import ModelFolder
from klear_megatron.losses import KLConfig, drawn_tokens, kl_to_reference
from klear_megatron.policy.batch import Batch
from klear_megatron.policy.model import Model
from klear_megatron.rl.config import RLConfig


class Reference:
    """A second, forward-only model in the layout of the policy. Collective, as `Model` is.

    Raises:
        UserError: its weights are not those of the policy's model, or cannot be read.
    """

    def __init__(self, config: RLConfig, folder: ModelFolder, penalty: KLConfig) -> None:
        self._model = Model(config.policy, folder, temperature=config.sampling.temperature)
        self._model.load(penalty.reference or config.policy.path)
        self._penalty = penalty

    def compare(self, batch: Batch) -> tuple[Batch, dict[str, float]]:
        """The batch with `ref_log_probs` for the loss, or with the penalty taken off the
        advantages; and the mean estimate over the responses' tokens, by the old policy."""
        ref_log_probs, _ = self._model.log_probs(batch)
        fields = batch.fields
        mask = drawn_tokens(fields)
        kl = kl_to_reference(fields["old_log_probs"], ref_log_probs, self._penalty.estimator) * mask
        metrics = {"rollout/kl_to_reference": (kl.sum() / mask.sum().clamp(min=1)).item()}
        if self._penalty.within == "loss":
            return batch.with_fields(ref_log_probs=ref_log_probs), metrics
        advantages = fields["advantages"] - self._penalty.coeff * kl
        return batch.with_fields(advantages=advantages), metrics


def make_reference(config: RLConfig, folder: ModelFolder) -> Reference | None:
    """Collective. The reference, if the config has a penalty; after the learner, whose seed sets
    the random states."""
    return Reference(config, folder, config.loss.kl) if config.loss.kl else None

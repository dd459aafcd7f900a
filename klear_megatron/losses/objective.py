"""What one optimizer step minimises: per-token losses, normalised over the whole mini-batch.

Denominators are counted once, on the whole mini-batch, before any forward pass. Each micro-batch
contributes plain sums divided by them, so loss, gradients and metrics do not depend on how the
mini-batch is divided among ranks and micro-batches.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from klear_megatron.errors import UserError
from klear_megatron.losses.clipped import CLIPPING_METRICS
from klear_megatron.losses.corrections import (
    finite_log_probs,
    importance_weight,
    trained_tokens,
)
from klear_megatron.losses.entropy_ratio import ENTROPY_CLIPPED
from klear_megatron.losses.inputs import Fields, LossInputs, Sequences
from klear_megatron.losses.kl import KLConfig, kl_to_reference
from klear_megatron.losses.ratio import ratio_of
from klear_megatron.losses.registry import LossConfig, resolve_loss
from klear_megatron.observability import Metric

METRICS = (
    Metric(
        "loss",
        "nats",
        "what is minimised; in SFT the negative log-likelihood, mean over the trained tokens",
        "in SFT, rises for long; in RL it is no sign of progress",
    ),
    Metric("policy_loss", "", "the policy loss without the SFT term, by `loss.aggregation`"),
    Metric(
        "sft_loss",
        "nats",
        "negative log-likelihood of correct responses, mean over their trained tokens; 0 if none",
    ),
    Metric(
        "entropy",
        "nats",
        "of the policy over the vocabulary, mean over trained tokens",
        "falls towards 0: responses become all alike; or rises without end: they become noise",
    ),
    Metric(
        "kl_to_old",
        "nats",
        "from the policy that drew the responses to the trained one, estimated as r - 1 - log r, "
        "mean over trained tokens",
        "above 0.1: the weights move too far within a step",
    ),
    Metric(
        "kl_to_reference",
        "nats",
        "with `loss.kl` in the loss: from the trained policy to the reference, by its estimator, "
        "mean over trained tokens",
        "grows without end: the penalty is too weak, or is meant to be",
    ),
    Metric(
        "ratio_min",
        "ratio",
        "smallest ratio of a trained token's new and old probability",
        "below 0.005 with `max_staleness`: set `loss.beta_low` to 0",
    ),
    Metric(
        "ratio_max",
        "ratio",
        "largest ratio of a trained token's new and old probability",
        "above 10 in most steps",
    ),
    Metric(
        "tis_weight",
        "ratio",
        "with a correction of the mismatch: weight of the policy loss, mean over trained tokens",
        "below 0.9 or above 1.1: trainer and servers compute other probabilities",
    ),
    Metric(
        "tis_clipped",
        "share",
        "with a correction of the mismatch: trained tokens whose weight is at a bound",
        "above 0.01 without `max_staleness`",
    ),
    *CLIPPING_METRICS,
    ENTROPY_CLIPPED,
)
"""Of the objectives and losses here. A loss of the user's own may have others."""


@dataclass(frozen=True)
class Result:
    """What a part of a mini-batch contributes."""

    loss: Tensor
    """Scalar; the parts of a mini-batch add up to its loss."""
    sums: dict[str, Tensor]
    """Metrics that add up over the parts, as scalars without gradient."""
    extremes: dict[str, Tensor] = field(default_factory=dict)
    """Values [T] whose smallest and largest over the mini-batch become NAME_min, NAME_max."""
    clipped: Tensor | None = None
    """[T] int8: 1 where the token is trained and clipped below, 2 where above, else 0; None for a
    loss that does not say."""


class Objective(Protocol):
    """What `Learner.train_step` minimises."""

    @property
    def entropy_gradient(self) -> bool:
        """Whether the loss differentiates the entropies, which have a gradient only then."""

    def denominators(self, fields: Fields, sequences: Sequences) -> dict[str, float]:
        """Counted on the whole mini-batch."""

    def __call__(
        self,
        log_probs: Tensor,
        entropy: Tensor,
        fields: Fields,
        sequences: Sequences,
        denominators: Mapping[str, float],
    ) -> Result:
        """The contribution of T tokens: log_probs, entropy and every field are [T].

        T may be 0 where other ranks hold the tokens of the sequences.
        """


class SFTObjective:
    """Mean negative log-likelihood of the tokens where `loss_mask` is 1."""

    entropy_gradient = False

    def denominators(self, fields: Fields, sequences: Sequences) -> dict[str, float]:
        return {"tokens": max(float(fields["loss_mask"].sum()), 1.0)}

    def __call__(
        self,
        log_probs: Tensor,
        entropy: Tensor,
        fields: Fields,
        sequences: Sequences,
        denominators: Mapping[str, float],
    ) -> Result:
        weight = fields["loss_mask"] / denominators["tokens"]
        loss = -(log_probs * weight).sum()
        return Result(loss, {"loss": loss.detach(), "entropy": (entropy.detach() * weight).sum()})


class PolicyObjective:
    """A policy loss plus alpha times the SFT term on correct responses (Eq. 7, 13-14), minus the
    entropy bonus, plus the KL penalty.

    Policy loss, bonus and penalty are aggregated as the config says. The SFT term is a mean over
    the trained tokens of correct responses, and metrics are means over all trained tokens.

    Fields: `loss_mask` is 1 on the response tokens to train, `correct` is 1 on those of correct
    responses; `advantages` and `old_log_probs` are the loss's; `rollout_log_probs`, the servers'
    own, are needed for corrections of the mismatch. A token that is not trained, because its
    `rollout_log_probs` is not finite or a mask leaves it out, counts nowhere, the SFT term
    included. `ref_log_probs` are the reference's, and `old_entropy` is the entropy before the first
    update on these responses; only losses that use them need them.
    """

    def __init__(self, config: LossConfig) -> None:
        self._config = config
        self._token_loss = resolve_loss(config)
        self.entropy_gradient = config.entropy_coeff > 0

    def denominators(self, fields: Fields, sequences: Sequences) -> dict[str, float]:
        mask = trained_tokens(fields, sequences, self._config)
        return {
            "sequences": max(float((sequences.sums(mask) > 0).sum()), 1.0),
            "tokens": max(float(mask.sum()), 1.0),
            "correct_tokens": max(float((mask * fields["correct"]).sum()), 1.0),
        }

    def __call__(
        self,
        log_probs: Tensor,
        entropy: Tensor,
        fields: Fields,
        sequences: Sequences,
        denominators: Mapping[str, float],
    ) -> Result:
        mask = trained_tokens(fields, sequences, self._config)
        weight = mask / denominators["tokens"]
        inputs = _loss_inputs(log_probs, entropy.detach(), fields, sequences, mask)
        token_loss = self._token_loss(inputs)
        values, metrics = token_loss.values, dict(token_loss.metrics)
        if self._config.corrects_mismatch:
            correction, clipped = importance_weight(inputs, self._config)
            values = values * correction
            metrics |= {"tis_weight": correction, "tis_clipped": clipped}
        aggregation = self._aggregation_weight(inputs, denominators)
        policy_loss = (values * aggregation).sum()
        sft_weight = mask * fields["correct"] / denominators["correct_tokens"]
        sft_loss = -(log_probs * sft_weight).sum()
        loss = policy_loss + self._config.sft_alpha * sft_loss
        if self._config.entropy_coeff:
            loss = loss - self._config.entropy_coeff * (entropy * aggregation).sum()
        if (penalty := self._config.kl) is not None and penalty.within == "loss":
            kl = self._kl(inputs, penalty)
            loss = loss + penalty.coeff * (kl * aggregation).sum()
            metrics["kl_to_reference"] = kl.detach()

        log_ratio = (log_probs.detach() - inputs.old_log_probs) * mask
        ratio = ratio_of(log_ratio, torch.zeros_like(log_ratio))
        metrics |= {
            "entropy": inputs.entropy,
            # Non-negative estimate of KL(old || new) from samples of old: r - 1 - log r.
            "kl_to_old": ratio - 1 - log_ratio,
        }
        sums = {
            "loss": loss.detach(),
            "policy_loss": policy_loss.detach(),
            "sft_loss": sft_loss.detach(),
            **{name: (values * weight).sum() for name, values in metrics.items()},
        }
        return Result(loss, sums, {"ratio": ratio}, _clipped(token_loss.metrics, mask))

    @staticmethod
    def _kl(inputs: LossInputs, penalty: KLConfig) -> Tensor:
        if inputs.ref_log_probs is None:
            raise UserError("loss.kl: the batch has no ref_log_probs")
        return kl_to_reference(inputs.log_probs, inputs.ref_log_probs, penalty.estimator)

    def _aggregation_weight(self, inputs: LossInputs, denominators: Mapping[str, float]) -> Tensor:
        """[T] What each token's loss is multiplied by before all are summed."""
        mask, sequences = inputs.mask, inputs.sequences
        match self._config.aggregation:
            case "token_mean":
                return mask / denominators["tokens"]
            case "sequence_mean":
                lengths = sequences.spread(sequences.sums(mask)).clamp(min=1)
                return mask / (lengths * denominators["sequences"])
            case "sequence_sum":
                return mask / (self._config.sum_divisor * denominators["sequences"])


def _clipped(metrics: Mapping[str, Tensor], mask: Tensor) -> Tensor | None:
    if "clipped_low" not in metrics or "clipped_high" not in metrics:
        return None
    sides = metrics["clipped_low"].to(torch.int8) + 2 * metrics["clipped_high"].to(torch.int8)
    return sides * (mask > 0)


def _loss_inputs(
    log_probs: Tensor, entropy: Tensor, fields: Fields, sequences: Sequences, mask: Tensor
) -> LossInputs:
    old, rollout = fields["old_log_probs"], fields.get("rollout_log_probs")
    if rollout is not None:
        rollout = finite_log_probs(rollout, old)
    return LossInputs(
        log_probs=log_probs,
        old_log_probs=old,
        advantages=fields["advantages"],
        mask=mask,
        sequences=sequences,
        entropy=entropy,
        rollout_log_probs=rollout,
        ref_log_probs=fields.get("ref_log_probs"),
        old_entropy=fields.get("old_entropy"),
    )

"""Megatron's mixture-of-experts router, with a load-balancing loss that no layout changes."""

from typing import Any

from megatron.core.tensor_parallel import reduce_from_tensor_model_parallel_region
from megatron.core.transformer.moe.moe_utils import (
    MoEAuxLossAutoScaler,
    save_to_aux_losses_tracker,
    switch_load_balancing_loss_func,
)
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor


class Router(TopKRouter):  # type: ignore[misc]
    """Adds `moe_aux_loss_coeff` x tokens x load-balancing loss of each micro-batch to the loss.

    `tokens` counts the micro-batch's tokens over all ranks, without padding. The caller divides the
    coefficient by the tokens of the mini-batch, which makes the sum a token-weighted mean over
    micro-batches. Megatron-Core multiplies by the tokens of one rank instead, which weakens the
    loss with every tensor- or context-parallel rank.
    """

    def _apply_aux_loss(
        self,
        probs: Tensor,
        scores_for_aux_loss: Tensor,
        routing_map: Tensor,
        with_padding_mask: bool = False,
    ) -> Any:
        coefficient = self.get_aux_loss_coeff("aux_loss")
        if coefficient == 0:
            return probs
        chosen = reduce_from_tensor_model_parallel_region(routing_map.sum(0), self.tp_cp_group)
        tokens = (chosen.sum() / self.topk).clamp(min=1)  # none in a pack of padding alone
        # This rank's share; the shares of all ranks add up, and so do their gradients.
        loss = tokens * switch_load_balancing_loss_func(
            probs=scores_for_aux_loss,
            tokens_per_expert=chosen,
            total_num_tokens=tokens,
            topk=self.topk,
            num_experts=self.config.num_moe_experts,
            moe_aux_loss_coeff=1.0,
        )
        save_to_aux_losses_tracker(
            "load_balancing_loss", loss, self.layer_number, self.config.num_layers
        )
        return MoEAuxLossAutoScaler.apply(probs, coefficient * loss)

"""Megatron's GPTModel whose output is per-token log-probabilities instead of logits."""

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from transformers import PretrainedConfig

from klear_megatron.models.architecture import get_architecture, padded_vocab_size
from klear_megatron.models.log_probs import vocab_parallel_log_probs
from klear_megatron.models.spec import layer_spec
from klear_megatron.platform.device import this_device


def packed_sequences(cu_seqlens: Tensor, max_seqlen: int) -> PackedSeqParams:
    """Where the sequences of a pack begin and end, in the form that attention takes.

    Args:
        cu_seqlens: [sequences + 1] int32, starting with 0, over all context-parallel ranks.
        max_seqlen: tokens of the longest sequence. It is rounded up to a power of two, because
            Megatron-Core caches rotary embeddings by this length and would miss at every other one.
    """
    bound = 1 << (max_seqlen - 1).bit_length()
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=bound,
        max_seqlen_kv=bound,
    )


class LanguageModel(GPTModel):  # type: ignore[misc]
    """One pipeline stage (or virtual stage) of a causal language model.

    With `labels` [1, tokens] the last stage returns [2, tokens] float32: the log-probability of
    each label and the entropy of the distribution it was drawn from, both at `temperature`. The
    entropy has a gradient only while `entropy_gradient` is set.
    Without labels it returns the logits [1, tokens, padded vocabulary / TP].
    """

    def __init__(
        self,
        config: TransformerConfig,
        hf: PretrainedConfig,
        *,
        temperature: float = 1.0,
        vp_stage: int | None = None,
    ) -> None:
        super().__init__(
            config,
            layer_spec(config, vp_stage),
            vocab_size=padded_vocab_size(hf.vocab_size, config.tensor_model_parallel_size),
            max_sequence_length=hf.max_position_embeddings,
            pre_process=parallel_state.is_pipeline_first_stage(
                ignore_virtual=False, vp_stage=vp_stage
            ),
            post_process=parallel_state.is_pipeline_last_stage(
                ignore_virtual=False, vp_stage=vp_stage
            ),
            position_embedding_type="rope",
            share_embeddings_and_output_weights=hf.tie_word_embeddings,
            vp_stage=vp_stage,
        )
        self.unpadded_vocab_size = hf.vocab_size
        self.temperature = temperature
        self.entropy_gradient = False
        # Hugging Face's own frequencies, so every kind of RoPE scaling means the same here.
        inv_freq, _ = get_architecture(hf).rotary(hf)
        self.rotary_pos_emb.inv_freq = inv_freq.to(this_device())

        if self.post_process:
            # Megatron-Core has already built the layer; ours only has another forward.
            assert type(self.output_layer) is ColumnParallelLinear, "what LogProbLayer extends"
            self.output_layer.__class__ = LogProbLayer

    def forward(self, *args: Any, padding_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        """GPTModel's forward; `padding_mask` [1, tokens] is true where there is no token."""
        if padding_mask is not None and self.config.sequence_parallel and not self.pre_process:
            # Megatron-Core scatters it on the first pipeline stage only.
            padding_mask = scatter_to_sequence_parallel_region(padding_mask.T.contiguous()).T
        output: Tensor = super().forward(*args, padding_mask=padding_mask, **kwargs)
        return output

    def _postprocess(
        self, hidden_states: Tensor, *args: Any, labels: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        if labels is None or not self.post_process:
            return super()._postprocess(hidden_states, *args, labels=labels, **kwargs)
        shared = self.share_embeddings_and_output_weights
        return self.output_layer(
            hidden_states,
            self.shared_embedding_or_output_weight() if shared else None,
            labels=labels.squeeze(0),
            vocab_size=self.unpadded_vocab_size,
            temperature=self.temperature,
            entropy_gradient=self.entropy_gradient,
        )


class LogProbLayer(ColumnParallelLinear):  # type: ignore[misc]
    """Megatron's output layer; given labels, it never holds the logits of all tokens at once.

    It is a separate module because Megatron gathers a module's weights when that module is called.
    """

    def forward(
        self, hidden: Tensor, weight: Tensor | None = None, *args: Any, **log_prob_options: Any
    ) -> Any:
        """With `labels` [tokens]: hidden [tokens, 1, H] -> [2, tokens]; otherwise Megatron's."""
        if "labels" not in log_prob_options:
            return super().forward(hidden, weight, *args, **log_prob_options)
        if self.config.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True)
        else:
            hidden = copy_to_tensor_model_parallel_region(hidden)
        weight = self.weight if weight is None else weight
        return torch.stack(
            vocab_parallel_log_probs(
                hidden.squeeze(1), weight, group=self.tp_group, **log_prob_options
            )
        )

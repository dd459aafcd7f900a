"""Core attention over packed sequences in plain torch, with zig-zag context parallelism.

Without a GPU it stands in for Transformer Engine's `TEDotProductAttention` with
`qkv_format="thd"`. Sequences of one pack never attend to each other.
"""

import math
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


class PackedAttention(MegatronModule):  # type: ignore[misc]
    """Causal attention within each sequence of a pack.

    With context parallelism of size n every sequence is cut into 2n chunks and rank r holds chunks
    r and 2n-1-r of each, so that all ranks have the same work.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *_: Any,
        softmax_scale: float | None = None,
        pg_collection: Any = None,
        **__: Any,
    ) -> None:
        super().__init__(config=config)
        self.cp = pg_collection.cp
        self.scale = softmax_scale or 1 / math.sqrt(config.kv_channels)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """query [tokens, heads, dim], key and value [tokens, groups, dim] -> [tokens, heads * dim].

        `tokens` are this rank's; `packed_seq_params.cu_seqlens_q` counts those of all
        context-parallel ranks.
        """
        assert packed_seq_params is not None, "the policy always packs"
        lengths = packed_seq_params.cu_seqlens_q.diff().tolist()
        if self.cp.size() == 1:
            outputs = [
                self._attend(q, k, v, is_causal=True)
                for q, k, v in zip(
                    query.split(lengths), key.split(lengths), value.split(lengths), strict=True
                )
            ]
        else:
            outputs = self._context_parallel(query, key, value, lengths)
        return torch.cat(outputs).flatten(1)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, **mask: Any) -> Tensor:
        q, k, v = (x.transpose(0, 1)[None] for x in (query, key, value))
        out = scaled_dot_product_attention(q, k, v, scale=self.scale, enable_gqa=True, **mask)
        return out[0].transpose(0, 1)

    def _context_parallel(
        self, query: Tensor, key: Tensor, value: Tensor, lengths: list[int]
    ) -> list[Tensor]:
        size, rank = self.cp.size(), self.cp.rank()
        local = [length // size for length in lengths]
        # Its backward sums the gradients of keys and values over the ranks that used them.
        gathered = gather_from_sequence_parallel_region(
            torch.cat([key, value], -1), tensor_parallel_output_grad=True, group=self.cp
        )
        by_rank = [shard.split(local) for shard in gathered.chunk(size)]
        outputs = []
        for i, queries in enumerate(query.split(local)):
            first, second = zip(*(shard[i].chunk(2) for shard in by_rank), strict=True)
            chunks = torch.cat([*first, *reversed(second)])
            for number, q in zip((rank, 2 * size - 1 - rank), queries.chunk(2), strict=True):
                start, end = number * len(q), (number + 1) * len(q)
                k, v = chunks[:end].chunk(2, -1)
                positions = torch.arange(end, device=q.device)
                mask = positions[start:, None] >= positions
                outputs.append(self._attend(q, k, v, attn_mask=mask))
        return outputs

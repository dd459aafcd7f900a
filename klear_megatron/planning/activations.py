"""Bytes that autograd saves between a micro-batch's forward and its backward, on one rank.

Counted tensor by tensor, for plain PyTorch's kernels and for Transformer Engine's. The first are
what Megatron-Core runs without a GPU, and are measured in tests. The second follow Transformer
Engine's source; docs/planning.md says what they were compared with.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from klear_megatron.planning.layout import Chunk, Layout
from klear_megatron.planning.model import PlannedModel
from klear_megatron.planning.work import Work
from klear_megatron.policy.config import ModelConfig
from klear_megatron.policy.kernels import Kernels

_KEPT_PROBABILITIES = 2**27  # as klear_megatron/models/log_probs.py
_CHUNK_LOGITS = 2**26
_LOSS_BYTES_PER_TOKEN = 13
"""A mask and three float32 numbers, of GPPO; other losses save about as much."""


@dataclass(frozen=True)
class Recompute:
    """What backward computes again."""

    full: bool
    modules: frozenset[str]
    """The parts of a layer, if not the whole."""


@dataclass(frozen=True)
class LayerBytes:
    """One layer's saved bytes, by what it is needed for."""

    attention: int
    """Up to the residual sum after attention."""
    feed_forward: int
    again: int
    """What is computed again in the layer's backward, and lives while that lasts."""
    first_half_again: int
    """The part of `again` that belongs to attention."""

    @property
    def kept(self) -> int:
        return self.attention + self.feed_forward


class Activations:
    """The saved bytes of one rank's layers, for one micro-batch at a time."""

    def __init__(
        self,
        model: PlannedModel,
        layout: Layout,
        transformer: dict[str, Any],
        *,
        element: int,
        full_recompute: bool,
        selective: Sequence[str],
    ) -> None:
        self.model, self.layout = model, layout
        self.element = element
        self.engine = transformer["transformer_impl"] == "transformer_engine"
        self.input_element = 1 if transformer["fp8"] else element
        """Of the inputs that matrix products keep for their weights' gradients."""
        self.recompute = Recompute(full_recompute, frozenset(selective))

    @classmethod
    def of(
        cls, config: ModelConfig, model: PlannedModel, layout: Layout, kernels: Kernels
    ) -> "Activations":
        """The activations of a run with this config and these kernels."""
        granularity = config.recompute_granularity
        modules = kernels.transformer["recompute_modules"]
        return cls(
            model,
            layout,
            kernels.transformer,
            element=4 if config.dtype == "float32" else 2,
            full_recompute=granularity == "full",
            selective=modules if granularity == "selective" else (),
        )

    def layer(self, work: Work) -> LayerBytes:
        """One layer's bytes, of a micro-batch with its padding."""
        m, tp, cp = self.model, self.layout.tp, self.layout.cp
        tokens = work.tokens // cp
        sequence = tokens // tp
        attention, again = self._attention(work, tokens, sequence)
        mlp_input = sequence * m.hidden * self.input_element
        experts = self._experts(sequence) if m.num_experts else self._mlp(tokens)
        norms = self._norm(sequence)
        kept = "moe" if m.num_experts else "mlp"
        if kept in self.recompute.modules:
            # The checkpoint keeps the input, and a mixture of experts its padding mask.
            mask = sequence if m.num_experts else 0
            halves = (attention + again[0], norms + mlp_input + mask, experts)
        else:
            halves = (attention + again[0], norms + mlp_input + experts, 0)
        return LayerBytes(halves[0], halves[1], halves[2] + again[1], again[1])

    def _norm(self, sequence: int) -> int:
        """What a norm of the hidden states keeps: its input, their scale, and in plain PyTorch
        also the normalised input; both in float32."""
        if self.engine:
            return sequence * (self.model.hidden * self.element + 4)
        return sequence * (8 * self.model.hidden + 4)

    def _attention(self, work: Work, tokens: int, sequence: int) -> tuple[int, tuple[int, int]]:
        """(saved outside the core attention, (saved by it, computed again))."""
        m, e, tp, cp = self.model, self.element, self.layout.tp, self.layout.cp
        queries = tokens * m.heads // tp * m.head_dim
        keys = tokens * m.groups // tp * m.head_dim
        norms = self._norm(sequence) + sequence * m.hidden * self.input_element
        heads = tokens * m.heads // tp
        if self.engine:
            head_norms = (queries * e + 4 * (heads + tokens * m.groups // tp)) if m.qk_norm else 0
            outside = norms + head_norms
            outside += queries if self.input_element < e else 0  # its FP8 copy for the projection
            inside = (queries + 2 * keys + queries + keys) * e  # projected, and rotated
            output = queries * e + 4 * heads
            if "core_attn" in self.recompute.modules:
                return outside, (inside + queries * e, output)
            return outside, (inside + output, 0)
        values_view = (queries + 2 * keys) * e  # a view of it keeps the whole projection
        rotary = 4 * tokens * m.head_dim * e
        outside = norms + rotary + queries * e  # and the output's copy
        holds_projection = cp == 1 or (m.qk_norm and e == 4)
        if m.qk_norm:
            outside += 4 * (queries + keys) + 4 * (heads + tokens * m.groups // tp)
            outside += 4 * queries + (4 * keys if e < 4 else 0)
        gathered = 2 * keys * cp * e
        masks = sum((n // (2 * cp)) ** 2 * (2 * cp + 1) for n in work.lengths) * e
        output = queries * e + 4 * heads
        if cp == 1:
            inside, again = queries * e + keys * e + values_view + output, output
        else:
            inside = queries * e + gathered + masks + output
            inside += values_view if holds_projection else 0
            again = gathered + masks + output
        if "core_attn" in self.recompute.modules:
            inputs = (queries + keys) * e + values_view
            return outside, (inputs, again)
        return outside, (inside, 0)

    def _mlp(self, tokens: int) -> int:
        """Without its input."""
        width = tokens * self.model.ffn // self.layout.tp
        if self.engine:  # the fused activation keeps its input; then the second product's input
            return width * (2 * self.element + self.input_element)
        return 5 * width * self.element

    def _experts(self, sequence: int) -> int:
        """Without the layer's input, with tokens spread evenly over the experts."""
        m, e = self.model, self.element
        chosen = sequence * m.experts_per_token
        router = sequence * m.num_experts * 5 + chosen * (8 + 4 + 8)
        received = chosen * self.layout.etp
        width = received * m.expert_ffn // self.layout.etp
        if self.engine:
            kept = 0 if "moe_act" in self.recompute.modules else self.input_element
            per_expert = width * (2 * e + kept)
            return router + received * (m.hidden * self.input_element + 4) + per_expert
        return router + received * (m.hidden * e + 4) + 6 * width * e

    def checkpoint(self, work: Work) -> int:
        """What full recomputation keeps of a layer: its input, and its padding mask."""
        return self._sequence(work) * self.model.hidden * self.element

    def first(self, work: Work) -> int:
        """What the embedding keeps."""
        tokens = work.tokens // self.layout.cp
        return tokens * (8 + (self.layout.tp > 1))

    def final_norm(self, work: Work) -> int:
        return self._norm(self._sequence(work))

    def log_probs(self, work: Work, tensor_rank: int = 0) -> int:
        """What the output layer and the loss keep."""
        tokens = work.tokens // self.layout.cp
        rows, padded = self._vocabulary_rows(tensor_rank)
        chunk = min(max(1, _CHUNK_LOGITS // padded), tokens)
        chunks = min(_KEPT_PROBABILITIES // (chunk * padded), -(-tokens // chunk))
        probabilities = 4 * rows * min(tokens, chunks * chunk)
        hidden = tokens * self.model.hidden * self.element
        return hidden + probabilities + tokens * (12 + _LOSS_BYTES_PER_TOKEN)

    def log_prob_buffers(self, work: Work) -> int:
        """What exists only while log-probabilities are computed: one chunk's logits in the
        weights' dtype, in float32 and as exponentials, and the weight's gradient in float32."""
        tokens = work.tokens // self.layout.cp
        _, padded = self._vocabulary_rows(0)
        chunk = min(max(1, _CHUNK_LOGITS // padded), tokens)
        logits = chunk * padded * (8 + (self.element if self.element < 4 else 0))
        gradient = padded * self.model.hidden * (4 + (self.element if self.element < 4 else 0))
        return logits + gradient

    def _vocabulary_rows(self, tensor_rank: int) -> tuple[int, int]:
        """This rank's rows of the vocabulary without padding, and with it."""
        padded = self.model.embedding(self.layout.tp).numel // self.model.hidden // self.layout.tp
        rows = min(padded, self.model.vocabulary - tensor_rank * padded)
        return max(rows, 0), padded

    def _sequence(self, work: Work) -> int:
        return work.tokens // self.layout.cp // self.layout.tp

    def chunk(self, chunk: Chunk, work: Work, tensor_rank: int = 0) -> tuple[int, int]:
        """One micro-batch's saved bytes in a pipeline stage's chunk: (at the end of its forward,
        the most in its backward)."""
        layers, layer = len(chunk.layers), self.layer(work)
        ends = self.first(work) if chunk.first else 0
        top = self.final_norm(work) + self.log_probs(work, tensor_rank) if chunk.last else 0
        if self.recompute.full:
            saved = layers * self.checkpoint(work) + self._shared_by_checkpoints(work)
            # The first norm's input is the checkpoint itself, where both are float32.
            shared = self.checkpoint(work) if self.element == 4 and not self.engine else 0
            again = layer.kept + layer.again - shared if layers else 0
            return ends + saved + top, ends + saved + again
        saved = layers * layer.kept
        again = layer.again
        if layer.first_half_again and layer.again == layer.first_half_again:
            again -= layer.feed_forward  # gone by then
        return ends + saved + top, ends + saved + max(again, 0)

    def _shared_by_checkpoints(self, work: Work) -> int:
        """The rotary embeddings in float32 and the padding mask: once for all layers."""
        tokens = work.tokens // self.layout.cp
        longest = 1 << (max(work.lengths) - 1).bit_length()
        rotary = 0 if self.engine else 4 * self.model.head_dim * max(longest // self.layout.cp, 1)
        return rotary + tokens

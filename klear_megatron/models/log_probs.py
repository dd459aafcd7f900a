"""Log-probabilities and entropy from hidden states, vocabulary-parallel and chunked over tokens.

No [tokens x vocabulary] tensor is ever alive, forward or backward: logits exist for one chunk of
tokens at a time. Backward needs the probabilities. A fixed amount of memory keeps those of the
first tokens; the rest are computed again. Shape suffixes: T tokens, H hidden, V this rank's share
of the vocabulary, C the tokens of one chunk.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_CHUNK_LOGITS = 2**26
"""Logits alive at a time: 256 MiB in float32."""
_KEPT_PROBABILITIES = 2**27
"""Most probabilities kept from forward to backward: 512 MiB in float32."""


def vocab_parallel_log_probs(
    hidden_TH: Tensor,
    weight_VH: Tensor,
    *,
    labels: Tensor,
    vocab_size: int,
    temperature: float = 1.0,
    entropy_gradient: bool = False,
    group: dist.ProcessGroup,
) -> tuple[Tensor, Tensor]:
    """log softmax(hidden @ weight.T / temperature)[label], and the entropy of that softmax.

    Args:
        hidden_TH: the same on every rank of `group`; the caller reduces its gradient over `group`.
        weight_VH: this rank's rows of the padded output weight. Padding rows take no part.
        labels: [T] int64 token ids.
        vocab_size: size of the whole vocabulary, without padding.
        entropy_gradient: whether the entropies are differentiable, which makes backward slower.

    Returns:
        log-probabilities [T] float32, differentiable, and entropies [T] float32.
    """
    first = group.rank() * weight_VH.shape[0]
    rows = max(0, min(weight_VH.shape[0], vocab_size - first))
    result: tuple[Tensor, Tensor] = _LogProbs.apply(
        hidden_TH,
        weight_VH,
        labels - first,
        rows,
        temperature,
        group,
        # Inside the autograd function, gradients are always off.
        _KEPT_PROBABILITIES if torch.is_grad_enabled() else 0,
        entropy_gradient,
    )
    return result


class _LogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TH: Tensor,
        weight_VH: Tensor,
        labels_T: Tensor,
        rows: int,
        temperature: float,
        group: dist.ProcessGroup,
        kept_probabilities: int,
        entropy_gradient: bool,
    ) -> tuple[Tensor, Tensor]:
        chunk = min(max(1, _CHUNK_LOGITS // weight_VH.shape[0]), len(labels_T))
        buffer_CV = _buffer(weight_VH, chunk, rows)
        log_probs, entropies, normalizers = [], [], []
        keep = kept_probabilities // (chunk * weight_VH.shape[0])
        kept: list[Tensor] = []
        for hidden_CH, labels_C in zip(hidden_TH.split(chunk), labels_T.split(chunk), strict=True):
            logits_CV = _logits(hidden_CH, weight_VH, temperature, buffer_CV)
            maximum_C = _maximum(logits_CV)
            if group.size() > 1:
                dist.all_reduce(maximum_C, dist.ReduceOp.MAX, group=group)
            logits_CV -= maximum_C[:, None]
            mine_C, index_C = _mine(labels_C, rows)
            label_C = logits_CV.gather(1, index_C[:, None]).squeeze(1) if rows else maximum_C
            label_C = label_C.masked_fill(~mine_C, 0)
            exp_CV = logits_CV.exp()
            sums = torch.stack([exp_CV.sum(1), logits_CV.mul_(exp_CV).sum(1), label_C])
            if group.size() > 1:
                dist.all_reduce(sums, group=group)
            total_C, weighted_C, label_C = sums
            log_probs.append(label_C - total_C.log())
            entropies.append(total_C.log() - weighted_C / total_C)
            normalizers.append(maximum_C + total_C.log())
            if len(kept) < keep:
                kept.append(exp_CV.div_(total_C[:, None]))
            del exp_CV  # so that it is not alive together with the next one
        entropy = torch.cat(entropies)
        normalizer = torch.cat(normalizers)
        ctx.save_for_backward(hidden_TH, weight_VH, labels_T, normalizer, entropy, *kept)
        ctx.chunk, ctx.rows, ctx.temperature = chunk, rows, temperature
        # Autograd cannot tell: who stacks both results and uses one gets zeros for the other.
        ctx.entropy_gradient = entropy_gradient
        if not entropy_gradient:
            ctx.mark_non_differentiable(entropy)
        return torch.cat(log_probs), entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden_TH, weight_VH, labels_T, normalizer_T, entropy_T, *kept = ctx.saved_tensors
        rows = ctx.rows
        buffer_CV = _buffer(weight_VH, ctx.chunk, rows)
        grad_hidden_TH = torch.empty_like(hidden_TH)
        grad_weight_VH = torch.zeros_like(weight_VH, dtype=torch.float32)
        for number, start in enumerate(range(0, len(labels_T), ctx.chunk)):
            here = slice(start, start + ctx.chunk)
            grad_C = grads[0][here] / ctx.temperature
            if number < len(kept):
                probs_CV = kept[number]
            else:
                logits_CV = _logits(hidden_TH[here], weight_VH, ctx.temperature, buffer_CV)
                probs_CV = logits_CV.sub_(normalizer_T[here, None]).exp_()
            # d log p[label] / d logits = onehot(label) - p
            factor_C = -grad_C
            if ctx.entropy_gradient:
                # d entropy / d logits = -p * (log p + entropy)
                grad_entropy_C = grads[1][here] / ctx.temperature
                factor_C = factor_C - grad_entropy_C * entropy_T[here]
                entropy_part_CV = probs_CV.xlogy(probs_CV).mul_(-grad_entropy_C[:, None])
            grad_CV = probs_CV.mul_(factor_C[:, None])
            if ctx.entropy_gradient:
                grad_CV += entropy_part_CV
            mine_C, index_C = _mine(labels_T[here], rows)
            if rows:
                grad_CV.scatter_add_(1, index_C[:, None], (grad_C * mine_C)[:, None])
            grad_logits_CV = grad_CV.to(weight_VH.dtype)
            grad_hidden_TH[here] = grad_logits_CV @ weight_VH[:rows]
            if weight_VH.dtype == torch.float32:  # accumulated in place
                grad_weight_VH[:rows].addmm_(grad_logits_CV.T, hidden_TH[here])
            else:
                grad_weight_VH[:rows] += grad_logits_CV.T @ hidden_TH[here]
        return grad_hidden_TH, grad_weight_VH.to(weight_VH.dtype), *[None] * 6


def _buffer(weight_VH: Tensor, chunk: int, rows: int) -> Tensor:
    """Memory for a chunk's logits, reused: on a CPU, allocating it takes longer than computing."""
    return weight_VH.new_empty(chunk, rows)


def _logits(hidden_CH: Tensor, weight_VH: Tensor, temperature: float, buffer_CV: Tensor) -> Tensor:
    """[C, rows] float32; the caller may change it, and the next chunk may reuse its memory."""
    rows = buffer_CV.shape[1]
    logits_CV = torch.mm(hidden_CH, weight_VH[:rows].T, out=buffer_CV[: len(hidden_CH)]).float()
    return logits_CV if temperature == 1 else logits_CV.div_(temperature)


def _maximum(logits_CV: Tensor) -> Tensor:
    if logits_CV.shape[1] == 0:  # a rank that holds nothing but padding
        return logits_CV.new_full(logits_CV.shape[:1], -torch.inf)
    return logits_CV.amax(1)


def _mine(labels_C: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Which labels this rank's rows hold, and a valid index for every label."""
    mine_C = (labels_C >= 0) & (labels_C < rows)
    return mine_C, labels_C.clamp(0, max(rows - 1, 0))

"""Chunked, vocabulary-parallel log-probabilities agree with log_softmax over whole logits."""

from typing import Any

import pytest
import torch
import torch.distributed as dist

from klear_megatron.models import log_probs, padded_vocab_size
from tests.allocations import peak_allocation
from tests.distributed.ranks import run_ranks
from tests.models import tiny

TOKENS, HIDDEN, VOCAB = 37, 24, 131


def _inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator)
    weight = torch.randn(VOCAB, HIDDEN, generator=generator)
    labels = torch.randint(0, VOCAB, (TOKENS,), generator=generator)
    labels[:2] = torch.tensor([0, VOCAB - 1])
    return hidden, weight, labels


def _chunked(chunk_logits: int, kept: int, temperature: float) -> list[Any]:
    """log-probs, entropy, gradients of hidden (summed over ranks) and of this rank's weights; with
    a loss of log-probs alone, and with one of the entropy too."""
    return [_gradients(chunk_logits, kept, temperature, flag) for flag in (False, True)]


def _gradients(chunk_logits: int, kept: int, temperature: float, entropy_gradient: bool) -> Any:
    log_probs._CHUNK_LOGITS, log_probs._KEPT_PROBABILITIES = chunk_logits, kept
    group = dist.group.WORLD
    hidden, weight, labels = _inputs()
    padding = padded_vocab_size(VOCAB, group.size()) - VOCAB
    # Padding rows that would win every softmax if they took part in it.
    padded = torch.nn.functional.pad(weight, (0, 0, 0, padding), value=100.0)
    hidden.requires_grad_()
    mine = padded.chunk(group.size())[group.rank()].clone().requires_grad_()
    answer, entropy = log_probs.vocab_parallel_log_probs(
        hidden,
        mine,
        labels=labels,
        vocab_size=VOCAB,
        temperature=temperature,
        entropy_gradient=entropy_gradient,
        group=group,
    )
    # As the model's last stage hands them on: stacked.
    answer, entropy = torch.stack([answer, entropy])
    _loss(answer, entropy, entropy_gradient).backward()
    dist.all_reduce(hidden.grad)
    return answer.detach(), entropy.detach(), hidden.grad, mine.grad


def _loss(answer: torch.Tensor, entropy: torch.Tensor, of_entropy: bool) -> torch.Tensor:
    loss = (answer * torch.arange(TOKENS)).sum()
    return loss + (entropy * torch.arange(TOKENS).flip(0)).sum() if of_entropy else loss


# 3 ranks share 384 rows; the last rank has only padding. The kept probabilities cover all chunks,
# none, all but a few tokens, or the first of four chunks.
@pytest.mark.parametrize(
    ("world_size", "chunk_logits", "kept"),
    [(1, 2**24, 2**24), (1, 256, 0), (2, 1, 30 * 128), (3, 2000, 2000)],
)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_values_and_gradients(world_size, chunk_logits, kept, temperature):
    for of_entropy, ranks in enumerate(
        zip(*run_ranks(world_size, _chunked, chunk_logits, kept, temperature), strict=True)
    ):
        hidden, weight, labels = (x.double() if x.is_floating_point() else x for x in _inputs())
        hidden.requires_grad_()
        weight.requires_grad_()
        logits = hidden @ weight.T / temperature
        log_softmax = logits.log_softmax(-1)
        # The rounding error of a logit becomes the relative error of its probability.
        rounding = torch.finfo(torch.float32).eps * float(logits.abs().max())
        expected = log_softmax.gather(1, labels[:, None])[:, 0]
        expected_entropy = -(log_softmax.exp() * log_softmax).sum(-1)
        _loss(expected, expected_entropy, bool(of_entropy)).backward()
        for ours, entropy, hidden_grad, _ in ranks:
            assert tiny.relative_error(ours, expected.detach()) < 1e-6
            assert tiny.relative_error(entropy, expected_entropy.detach()) < 1e-5
            assert tiny.relative_error(hidden_grad, hidden.grad) < rounding
        weight_grad = torch.cat([grad for *_, grad in ranks])
        assert tiny.relative_error(weight_grad[:VOCAB], weight.grad) < rounding
        assert not weight_grad[VOCAB:].any()


def _memory_without_backward() -> int:
    log_probs._CHUNK_LOGITS = 2**20  # 4 MiB
    vocabulary, tokens = 2**16, 2**10  # 256 MiB of probabilities in all
    hidden, weight = torch.randn(tokens, 8), torch.randn(vocabulary, 8, requires_grad=True)

    @torch.no_grad()
    def forward() -> None:
        log_probs.vocab_parallel_log_probs(
            hidden,
            weight,
            labels=torch.zeros(tokens, dtype=torch.int64),
            vocab_size=vocabulary,
            group=dist.group.WORLD,
        )

    return peak_allocation(forward)


def test_without_backward_no_probabilities_are_kept():
    (peak,) = run_ranks(1, _memory_without_backward)
    # A chunk's logits, their exponentials and their products, and what is per token.
    assert peak < 4 * 2**22

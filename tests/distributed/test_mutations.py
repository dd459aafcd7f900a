"""The layouts' test is worth something: each normalisation and reduction, broken, is caught.

Every mutation breaks one thing in the running package and names a layout in which it matters.
"""

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.distributed.distributed_data_parallel import DistributedDataParallel

from klear_megatron.losses import PolicyObjective, Sequences, SFTObjective
from klear_megatron.models import attention, language_model, spec
from klear_megatron.policy import build, learner, micro_batches, model, packing
from tests.distributed import reference
from tests.distributed.comparison import deviations
from tests.distributed.ranks import run_ranks

# Named like the function in it, which hides it from `import`.
finalize_module = importlib.import_module("megatron.core.distributed.finalize_model_grads")


def denominator_per_micro_batch() -> None:
    """Of a context-parallel rank's slice, where there are several of those."""
    for kind in (SFTObjective, PolicyObjective):

        def call(self: Any, *args: Any, original: Any = kind.__call__) -> Any:
            *inputs, _ = args
            fields, sequences = args[2:4]
            return original(self, *inputs, self.denominators(fields, sequences))

        kind.__call__ = call


def denominator_per_rank() -> None:
    for kind in (SFTObjective, PolicyObjective):

        def denominators(
            self: Any, fields: Any, sequences: Any, original: Any = kind.denominators
        ) -> Any:
            (lengths,) = {
                tuple(b.lengths)
                for b in reference.BATCHES
                if b.fields["loss_mask"] is fields["loss_mask"]
            }
            ranks = parallel_state.get_data_parallel_world_size()
            plan = packing.plan_micro_batches(lengths, ranks, 64)
            mine = {i for pack in plan[parallel_state.get_data_parallel_rank()] for i in pack}
            rows = torch.cat(
                [torch.full((n,), i in mine, dtype=torch.bool) for i, n in enumerate(lengths)]
            )
            mine_only = {name: values[rows] for name, values in fields.items()}
            return original(self, mine_only, Sequences(sequences.ids[rows], sequences.count))

        kind.denominators = denominators


def one_denominator_for_both_terms() -> None:
    original = PolicyObjective.denominators

    def denominators(self: Any, *args: Any) -> Mapping[str, float]:
        both = original(self, *args)
        return both | {"correct_tokens": both["tokens"]}

    PolicyObjective.denominators = denominators


def mean_over_data_parallel_ranks() -> None:
    original = build.transformer_config

    def transformer_config(*args: Any) -> Any:
        config = original(*args)
        config.calculate_per_token_loss = False
        return config

    build.transformer_config = transformer_config


def gradients_not_reduced_over_data_parallel_ranks() -> None:
    DistributedDataParallel.finish_grad_sync = lambda self, **_: None


def tied_embeddings_not_reduced_over_stages() -> None:
    finalize_module._allreduce_word_embedding_grads = lambda *_: None


def norms_not_reduced_over_tensor_parallel_ranks() -> None:
    finalize_module._allreduce_non_tensor_model_parallel_grads = lambda *_: None


def norms_not_marked_for_sequence_parallelism() -> None:
    original = spec.RMSNorm.__init__

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        self.weight.sequence_parallel = False

    spec.RMSNorm.__init__ = init


def hidden_gradient_not_reduced_over_vocabulary() -> None:
    original = language_model.gather_from_sequence_parallel_region

    def gather(hidden: Any, **_: Any) -> Any:
        return original(hidden, tensor_parallel_output_grad=False)

    language_model.gather_from_sequence_parallel_region = gather


def keys_not_reduced_over_context_parallel_ranks() -> None:
    original = attention.gather_from_sequence_parallel_region

    def gather(keys: Any, *, group: Any, **_: Any) -> Any:
        return original(keys, tensor_parallel_output_grad=False, group=group)

    attention.gather_from_sequence_parallel_region = gather


def sequences_attend_to_each_other() -> None:
    original = model.build_micro_batch

    def one_sequence(*args: Any, **kwargs: Any) -> Any:
        micro = original(*args, **kwargs)
        cu_seqlens = micro.cu_seqlens[[0, -1]]
        fields = vars(micro) | {"cu_seqlens": cu_seqlens, "max_seqlen": int(cu_seqlens[-1])}
        return micro_batches.MicroBatch(**fields)

    model.build_micro_batch = one_sequence


def metrics_of_one_rank() -> None:
    learner.is_logging_rank = lambda: torch.distributed.get_rank() == 0


def sequences_summed_on_one_context_parallel_rank() -> None:
    learner.sum_over_context_parallel_ranks = lambda sums: sums


def no_gradient_of_the_entropy() -> None:
    PolicyObjective.entropy_gradient = property(lambda self: False, lambda self, _: None)


SIZE = "{}_parallel_size".format
TP, PP, CP = SIZE("tensor_model"), SIZE("pipeline_model"), SIZE("context")
SFT, GPPO, SEQUENCE_WIDE = ("untied", "sft"), ("tied", "gppo"), ("untied", "sequence_wide")
MUTATIONS = [
    (denominator_per_micro_batch, 1, {}, SFT),
    (denominator_per_micro_batch, 1, {}, GPPO),
    (denominator_per_micro_batch, 2, {CP: 2}, SFT),
    (denominator_per_rank, 2, {}, SFT),
    (denominator_per_rank, 2, {}, GPPO),
    (one_denominator_for_both_terms, 1, {}, GPPO),
    (mean_over_data_parallel_ranks, 2, {}, SFT),
    (mean_over_data_parallel_ranks, 2, {CP: 2}, SFT),
    (gradients_not_reduced_over_data_parallel_ranks, 2, {}, SFT),
    (gradients_not_reduced_over_data_parallel_ranks, 2, {CP: 2}, SFT),
    (tied_embeddings_not_reduced_over_stages, 2, {PP: 2}, GPPO),
    (norms_not_reduced_over_tensor_parallel_ranks, 2, {TP: 2}, SFT),
    (norms_not_marked_for_sequence_parallelism, 2, {TP: 2}, SFT),
    (hidden_gradient_not_reduced_over_vocabulary, 2, {TP: 2}, SFT),
    (keys_not_reduced_over_context_parallel_ranks, 2, {CP: 2}, SFT),
    (sequences_attend_to_each_other, 1, {}, SFT),
    (metrics_of_one_rank, 2, {PP: 2}, SFT),
    (sequences_summed_on_one_context_parallel_rank, 2, {CP: 2}, SEQUENCE_WIDE),
    (no_gradient_of_the_entropy, 1, {}, SEQUENCE_WIDE),
]


def _mutated(mutation: Any, folder: Path, parallel: dict[str, Any], case: Any) -> list[str]:
    mutation()
    return deviations(folder, {"parallel": parallel}, [case])


@pytest.mark.parametrize(("mutation", "world_size", "parallel", "case"), MUTATIONS)
def test_is_caught(mutation, world_size, parallel, case, folder):
    assert any(run_ranks(world_size, _mutated, mutation, folder, parallel, case))

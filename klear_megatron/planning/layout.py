"""Which rank is where: Megatron's order of ranks, and the layers of each pipeline stage."""

from dataclasses import dataclass

from klear_megatron.policy.config import ParallelConfig


@dataclass(frozen=True)
class Chunk:
    """A pipeline stage, or one of its virtual stages."""

    layers: range
    first: bool
    """Whether it has the embedding."""
    last: bool
    """Whether it has the last norm and the output weight."""


@dataclass(frozen=True)
class Place:
    """The coordinates of one rank."""

    tensor: int
    context: int
    data: int
    """Among the ranks that hold the same shards of other than experts' weights and work on other
    sequences."""
    pipeline: int
    expert_data: int
    """Among the ranks that hold the same shards of the same experts."""
    expert: int


@dataclass(frozen=True)
class Layout:
    """Parallel sizes, over a number of ranks.

    Raises:
        UserError: the ranks cannot be divided so.
    """

    parallel: ParallelConfig
    ranks: int

    def __post_init__(self) -> None:
        self.parallel.data_parallel_size(self.ranks)

    @property
    def tp(self) -> int:
        return self.parallel.tensor_model_parallel_size

    @property
    def cp(self) -> int:
        return self.parallel.context_parallel_size

    @property
    def pp(self) -> int:
        return self.parallel.pipeline_model_parallel_size

    @property
    def vpp(self) -> int:
        return self.parallel.virtual_pipeline_model_parallel_size or 1

    @property
    def ep(self) -> int:
        return self.parallel.expert_model_parallel_size

    @property
    def etp(self) -> int:
        return self.parallel.expert_tensor_size

    @property
    def dp(self) -> int:
        return self.parallel.data_parallel_size(self.ranks)

    @property
    def shards(self) -> int:
        """Ranks that share the optimizer's state of other than experts' weights."""
        return self.dp * self.cp

    @property
    def expert_shards(self) -> int:
        """Ranks that share the optimizer's state of an expert."""
        return self.ranks // (self.pp * self.ep * self.etp)

    def place(self, rank: int) -> Place:
        """Megatron's order: tensor, context, data, pipeline; for experts: tensor, expert, data,
        pipeline."""
        tensor = rank % self.tp
        context = rank // self.tp % self.cp
        data = rank // (self.tp * self.cp) % self.dp
        pipeline = rank // (self.tp * self.cp * self.dp)
        expert = rank // self.etp % self.ep
        expert_data = rank // (self.etp * self.ep) % self.expert_shards
        return Place(tensor, context, data, pipeline, expert_data, expert)

    def chunks(self, stage: int, layers: int) -> list[Chunk]:
        """The virtual stages of a pipeline stage of a model with so many layers."""
        sizes = self._layers_per_stage(layers)
        starts = [(v, sum(sizes) // self.vpp * v) for v in range(self.vpp)]
        chunks = []
        for v, start in starts:
            begin = start + sum(sizes[:stage]) // self.vpp
            end = begin + sizes[stage] // self.vpp
            first = stage == 0 and v == 0
            last = stage == self.pp - 1 and v == self.vpp - 1
            chunks.append(Chunk(range(begin, end), first, last))
        return chunks

    def _layers_per_stage(self, layers: int) -> list[int]:
        first = self.parallel.num_layers_in_first_pipeline_stage
        last = self.parallel.num_layers_in_last_pipeline_stage
        others = self.pp - (first is not None) - (last is not None)
        each = (layers - (first or 0) - (last or 0)) // max(others, 1)
        sizes = [each] * self.pp
        if first is not None:
            sizes[0] = first
        if last is not None:
            sizes[-1] = last
        return sizes

"""Settings of the policy: the model, how it is laid out over ranks, and its optimizer."""

from pathlib import Path
from typing import Any, Literal, Protocol

from pydantic import Field, PositiveInt, model_validator

from klear_megatron.config import Section
from klear_megatron.config.imports import import_module
from klear_megatron.errors import UserError


class ModelSizes(Protocol):
    """A model's config, such as a `ModelFolder` has."""

    @property
    def config(self) -> Any:
        """The Hugging Face config."""

    @property
    def num_experts(self) -> int:
        """Experts per mixture-of-experts layer; 0 for a dense model."""


class ParallelConfig(Section):
    """Megatron's parallel sizes. Data parallelism takes the ranks that are left over."""

    tensor_model_parallel_size: PositiveInt = 1
    """Ranks that each layer's matrices are cut over."""
    pipeline_model_parallel_size: PositiveInt = 1
    """Stages that the layers are divided into."""
    virtual_pipeline_model_parallel_size: PositiveInt | None = None
    """Parts of each pipeline stage, which take turns so that stages wait less."""
    num_layers_in_first_pipeline_stage: PositiveInt | None = None
    """Layers of the first stage, over all its virtual stages; fewer make room for the embedding.
    Stages without a number of their own share the remaining layers equally."""
    num_layers_in_last_pipeline_stage: PositiveInt | None = None
    """Layers of the last stage; fewer make room for the output weight and the loss."""
    context_parallel_size: PositiveInt = 1
    """Ranks that each sequence is cut over."""
    expert_model_parallel_size: PositiveInt = 1
    """Ranks that share the experts, taken from the tensor-, context- and data-parallel ranks."""
    expert_tensor_parallel_size: PositiveInt | None = None
    """Ranks that each expert's matrices are cut over; by default tensor_model_parallel_size."""
    context_parallel_comm_type: Literal["p2p", "all_gather", "a2a"] = "p2p"
    """How Transformer Engine exchanges keys and values; plain PyTorch gathers them. For packed
    sequences every release supports p2p, recent ones all_gather and a2a, none a2a+p2p."""
    overlap_grad_reduce: bool = False
    """Reduce gradients over data-parallel ranks while backward is still computing others."""
    overlap_param_gather: bool = False
    """Gather updated weights over data-parallel ranks while forward already uses the first ones."""

    @model_validator(mode="after")
    def _virtual_needs_pipeline(self) -> "ParallelConfig":
        virtual = self.virtual_pipeline_model_parallel_size
        if virtual is not None and (virtual < 2 or self.pipeline_model_parallel_size < 2):
            raise ValueError(
                f"virtual_pipeline_model_parallel_size {virtual} needs to be at least 2 and "
                f"pipeline_model_parallel_size ({self.pipeline_model_parallel_size}) at least 2"
            )
        return self

    @model_validator(mode="after")
    def _uneven_stages_fit_the_pipeline(self) -> "ParallelConfig":
        pp, vpp = self.pipeline_model_parallel_size, self.virtual_pipeline_model_parallel_size or 1
        for name in ("num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage"):
            layers = getattr(self, name)
            if layers is not None and (pp < 2 or layers % vpp):
                raise ValueError(
                    f"{name} {layers} needs pipeline_model_parallel_size ({pp}) of at least 2, and "
                    f"to be divisible by virtual_pipeline_model_parallel_size ({vpp})"
                )
        return self

    @model_validator(mode="after")
    def _gather_needs_reduce(self) -> "ParallelConfig":
        if self.overlap_param_gather and not self.overlap_grad_reduce:
            raise ValueError("overlap_param_gather: true needs overlap_grad_reduce: true")
        return self

    @model_validator(mode="after")
    def _other_cut_needs_expert_parallelism(self) -> "ParallelConfig":
        # Megatron reduces experts' gradients separately only with expert parallelism.
        tp, expert_tp = self.tensor_model_parallel_size, self.expert_tensor_parallel_size
        if expert_tp not in (None, tp) and self.expert_model_parallel_size == 1:
            raise ValueError(
                f"expert_tensor_parallel_size {expert_tp} other than tensor_model_parallel_size "
                f"{tp} needs expert_model_parallel_size of at least 2"
            )
        return self

    @property
    def expert_tensor_size(self) -> int:
        """Ranks that each expert's matrices are cut over."""
        return self.expert_tensor_parallel_size or self.tensor_model_parallel_size

    @property
    def _heads_cut_by_context(self) -> int:
        return self.context_parallel_size if self.context_parallel_comm_type == "a2a" else 1

    @property
    def model_parallel_size(self) -> int:
        """Ranks that hold one copy of the model and work on the same tokens: TP x PP x CP."""
        return (
            self.tensor_model_parallel_size
            * self.pipeline_model_parallel_size
            * self.context_parallel_size
        )

    def data_parallel_size(self, world_size: int) -> int:
        """Number of data-parallel ranks.

        Raises:
            UserError: the world size is not divisible by the parallel sizes.
        """
        if world_size % self.model_parallel_size:
            raise UserError(
                f"policy.parallel: world size {world_size} is not divisible by TP x PP x CP = "
                f"{self.tensor_model_parallel_size} x {self.pipeline_model_parallel_size} x "
                f"{self.context_parallel_size} = {self.model_parallel_size}; start a multiple of "
                f"{self.model_parallel_size} ranks or choose smaller sizes"
            )
        pp, ep = self.pipeline_model_parallel_size, self.expert_model_parallel_size
        experts = pp * ep * self.expert_tensor_size
        if world_size % experts:
            raise UserError(
                f"policy.parallel: world size {world_size} is not divisible by PP x EP x expert TP "
                f"= {pp} x {ep} x {self.expert_tensor_size} = {experts}"
            )
        return world_size // self.model_parallel_size

    def check_model(self, folder: ModelSizes) -> None:
        """Checks that the model can be cut into these sizes.

        Raises:
            UserError: a dimension of the model is not divisible by a size.
        """
        hf = folder.config
        if self.expert_model_parallel_size > 1 and not folder.num_experts:
            raise UserError(
                "policy.parallel.expert_model_parallel_size: the model has no experts; leave it at "
                "1"
            )
        tp, ep = self.tensor_model_parallel_size, self.expert_model_parallel_size
        for field, name, size in (
            ("num_attention_heads", "tensor_model_parallel_size", tp),
            ("num_key_value_heads", "tensor_model_parallel_size", tp),
            ("intermediate_size", "tensor_model_parallel_size", tp),
            ("num_experts", "expert_model_parallel_size", ep),
            ("moe_intermediate_size", "expert_tensor_parallel_size", self.expert_tensor_size),
            # All-to-all hands out heads instead of tokens.
            ("num_key_value_heads", "context_parallel_comm_type", tp * self._heads_cut_by_context),
        ):
            if getattr(hf, field, 0) % size:
                raise UserError(
                    f"policy.parallel.{name}: the model's {field} = {getattr(hf, field)} is not "
                    f"divisible by {size}"
                )
        self._check_stages(hf.num_hidden_layers)

    def _check_stages(self, layers: int) -> None:
        pp, vpp = self.pipeline_model_parallel_size, self.virtual_pipeline_model_parallel_size or 1
        first, last = (
            self.num_layers_in_first_pipeline_stage,
            self.num_layers_in_last_pipeline_stage,
        )
        if first is None and last is None and layers % (pp * vpp):
            raise UserError(
                f"policy.parallel.pipeline_model_parallel_size: the model's num_hidden_layers = "
                f"{layers} is not divisible by PP x VPP = {pp * vpp}; "
                "num_layers_in_first_pipeline_stage and num_layers_in_last_pipeline_stage make "
                "stages of other sizes"
            )
        stages = pp - (first is not None) - (last is not None)
        rest = layers - (first or 0) - (last or 0)
        fits = rest > 0 and rest % (stages * vpp) == 0 if stages else rest == 0
        if not fits:
            raise UserError(
                f"policy.parallel: of the model's num_hidden_layers = {layers}, {rest} are left "
                f"by num_layers_in_first_pipeline_stage ({first}) and "
                f"num_layers_in_last_pipeline_stage ({last}), which cannot be divided over the "
                f"other stages x VPP = {stages} x {vpp}"
            )


class OptimizerConfig(Section):
    """Adam with decoupled weight decay, and its learning-rate schedule, in optimizer steps."""

    lr: float = Field(gt=0)
    """Highest learning rate, which the schedule reaches after the warm-up."""
    min_lr: float = Field(0.0, ge=0)
    """Learning rate at the end of the decay."""
    lr_decay_style: Literal["constant", "linear", "cosine"] = "constant"
    """How the learning rate falls from `lr` to `min_lr` until the last step."""
    lr_warmup_steps: int = Field(0, ge=0)
    """Optimizer steps over which lr rises from 0 in a line. The first of them has lr 0, as in
    Megatron-LM and transformers: it changes no weight, only Adam's averages."""
    weight_decay: float = Field(0.1, ge=0)
    """Decoupled weight decay, per unit of learning rate."""
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    """Decay of the mean of the gradients."""
    adam_beta2: float = Field(0.999, ge=0, lt=1)
    """Decay of the mean of their squares."""
    adam_eps: float = Field(1e-8, gt=0)
    """Added to the root of the mean square, so that nothing is divided by 0."""
    clip_grad: float = Field(1.0, ge=0)
    """Largest global gradient norm; 0 does not clip."""
    offload_fraction: float = Field(0.0, ge=0, le=1)
    """Share of Adam's state that the host keeps in its memory and steps."""


class CheckpointConfig(Section):
    """How checkpoints are written, and how many are kept."""

    asynchronous: bool = False
    """Write in the background while training goes on."""
    keep_last: PositiveInt | None = None
    """How many of the newest checkpoints to keep; all by default."""
    keep_every: PositiveInt | None = None
    """Also keep the checkpoints of steps divisible by this."""

    @model_validator(mode="after")
    def _every_needs_last(self) -> "CheckpointConfig":
        if self.keep_every is not None and self.keep_last is None:
            raise ValueError("keep_every without keep_last: all are kept anyway; set both")
        return self


def import_extensions(config: "ModelConfig") -> None:
    """Imports the user's own modules.

    Raises:
        UserError: one cannot be imported.
    """
    for module in config.imports:
        import_module(module, "policy.imports")


class ModelConfig(Section):
    """A model, and how it is laid out and computed."""

    path: Path
    """Weights to start from: a Hugging Face checkpoint with config, safetensors and tokenizer; or a
    checkpoint of Megatron-LM, Megatron-Bridge, slime or this package, with `hf`; or the name
    of a model on the Hugging Face hub, taken from its cache or downloaded."""
    hf: Path | None = None
    """Hugging Face checkpoint with the config and tokenizer of a Megatron `path`. RL's servers
    start from it; the policy's weights are pushed to them before the first step."""
    imports: tuple[str, ...] = ()
    """Modules of your own to import first, such as one that registers an architecture."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Dtype of weights and activations. Optimizer state and gradient sums are always float32."""
    tokens_per_micro_batch: PositiveInt = 16384
    """Sequences are packed up to this many tokens per context-parallel rank; a longer sequence is
    a micro-batch by itself."""
    recompute_granularity: Literal["full", "selective"] | None = None
    """Recompute whole layers in backward, or only `recompute_modules`, instead of keeping them."""
    recompute_modules: tuple[Literal["core_attn", "layernorm", "mlp", "moe", "moe_act"], ...] = (
        "core_attn",
    )
    """What selective recomputation computes again in backward."""
    fp8: Literal["delayed", "tensorwise", "blockwise", "mxfp8"] | None = None
    """FP8 recipe for the layers' matrix products; the output layer stays in `dtype`."""
    fp8_param_gather: bool = False
    """Also keep and gather the layers' weights in FP8; master weights stay float32."""
    moe_aux_loss_coeff: float = Field(0.0, ge=0)
    """Weight of the mixture-of-experts load-balancing loss, summed over layers. As in Megatron, it
    is computed per micro-batch and averaged over tokens, so gradients depend slightly on packing,
    but not on the ranks that share a micro-batch."""
    parallel: ParallelConfig = ParallelConfig()

    @property
    def hf_folder(self) -> Path:
        """Where the config and the tokenizer are."""
        return self.hf or self.path

    @model_validator(mode="after")
    def _fp8_needs_bfloat16(self) -> "ModelConfig":
        if self.fp8 and self.dtype != "bfloat16":
            raise ValueError(f"fp8: {self.fp8} needs dtype: bfloat16, not {self.dtype}")
        if self.fp8_param_gather and not self.fp8:
            raise ValueError("fp8_param_gather needs fp8 to name a recipe")
        return self

    @model_validator(mode="after")
    def _megatron_has_the_combination(self) -> "ModelConfig":
        modules = {"layernorm", "moe_act"} & set(self.recompute_modules)
        if self.fp8 == "delayed" and self.recompute_granularity == "selective" and modules:
            raise ValueError(
                f"fp8: delayed cannot recompute {', '.join(sorted(modules))}; choose another "
                "recipe or other recompute_modules"
            )
        if self.fp8_param_gather and self.fp8 == "mxfp8" and self.parallel.overlap_param_gather:
            raise ValueError(
                "fp8_param_gather with fp8: mxfp8 cannot go with parallel.overlap_param_gather"
            )
        return self


class PolicyConfig(ModelConfig):
    """The model that is trained, its optimizer and its checkpoints."""

    chat_template: str | None = None
    """A chat template in place of the tokenizer's: a file, or the Jinja text itself. Checkpoints
    have it, too."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    optimizer: OptimizerConfig

    @model_validator(mode="after")
    def _offloading_needs_bfloat16_weights(self) -> "PolicyConfig":
        if self.fp8_param_gather and self.optimizer.offload_fraction:
            raise ValueError("fp8_param_gather cannot go with optimizer.offload_fraction")
        return self

"""The losses that a config can name, with their options."""

import inspect
import traceback
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any

from pydantic import ConfigDict, Discriminator, Field, Tag, TypeAdapter, field_validator

from klear_megatron.config import Section, validate
from klear_megatron.config.imports import describe_failure, import_object
from klear_megatron.errors import UserError, nearest
from klear_megatron.losses.cispo import CISPOConfig, cispo_loss
from klear_megatron.losses.config import PolicyLossConfig
from klear_megatron.losses.dppo import DPPOConfig, dppo_loss
from klear_megatron.losses.gmpo import GMPOConfig, gmpo_loss
from klear_megatron.losses.gppo import CEGPPOConfig, GPPOConfig, gppo_loss
from klear_megatron.losses.gspo import GSPOConfig, gspo_loss
from klear_megatron.losses.inputs import LossInputs, TokenLoss
from klear_megatron.losses.ppo_clip import PPOClipConfig, ppo_clip_loss
from klear_megatron.losses.reinforce import REINFORCEConfig, reinforce_loss
from klear_megatron.losses.sapo import SAPOConfig, sapo_loss

_LOSSES: dict[str, Callable[..., TokenLoss]] = {
    "gppo": gppo_loss,
    "ce_gppo": gppo_loss,
    "ppo_clip": ppo_clip_loss,
    "cispo": cispo_loss,
    "sapo": sapo_loss,
    "dppo": dppo_loss,
    "gspo": gspo_loss,
    "gmpo": gmpo_loss,
    "reinforce": reinforce_loss,
}


class CustomLossConfig(PolicyLossConfig):
    """A loss of the user's own: `f(inputs)`, or `f(inputs, options)` with a type hint that says
    which `Section` the options are. Further keys of this section are those options."""

    model_config = ConfigDict(extra="allow")

    name: str
    """The function, as `package.module:function` or `path/to/file.py:function`."""

    @property
    def uses_old_entropy(self) -> bool:
        return True  # it may

    @field_validator("name")
    @classmethod
    def _is_a_path(cls, name: str) -> str:
        if ":" not in name:
            raise ValueError(
                f"there is no loss {name!r} (your own would be package.module:function or "
                f"file.py:function); {nearest(name, _LOSSES)}"
            )
        return name


def _tag(value: Any) -> str:
    """Which member of `LossConfig` a value is to become."""
    name = value.get("name", "gppo") if isinstance(value, dict) else getattr(value, "name", "gppo")
    return name if isinstance(name, str) and name in _LOSSES else "custom"


LossConfig = Annotated[
    Annotated[GPPOConfig, Tag("gppo")]
    | Annotated[CEGPPOConfig, Tag("ce_gppo")]
    | Annotated[PPOClipConfig, Tag("ppo_clip")]
    | Annotated[CISPOConfig, Tag("cispo")]
    | Annotated[GSPOConfig, Tag("gspo")]
    | Annotated[GMPOConfig, Tag("gmpo")]
    | Annotated[SAPOConfig, Tag("sapo")]
    | Annotated[DPPOConfig, Tag("dppo")]
    | Annotated[REINFORCEConfig, Tag("reinforce")]
    | Annotated[CustomLossConfig, Tag("custom")],
    Field(discriminator=Discriminator(_tag)),
]
"""The options of the loss that `name` names, gppo by default."""


def default_losses() -> list[LossConfig]:
    """Every loss of the package, with its default options."""
    loss: TypeAdapter[LossConfig] = TypeAdapter(LossConfig)
    return [loss.validate_python({"name": name}) for name in _LOSSES]


def resolve_loss(config: LossConfig) -> Callable[[LossInputs], TokenLoss]:
    """The loss that a config names, its options filled in.

    Raises:
        UserError: a custom loss cannot be imported, is no function of one or two arguments, or has
            other options than the config gives it.
    """
    if isinstance(config, CustomLossConfig):
        return _custom_loss(config)
    return partial(_LOSSES[config.name], config=config)


def _custom_loss(config: CustomLossConfig) -> Callable[[LossInputs], TokenLoss]:
    loss = import_object(config.name, "loss.name")
    if not callable(loss):
        raise UserError(f"loss.name: {config.name!r} is not a function")
    parameters = list(inspect.signature(loss, eval_str=True).parameters.values())
    given = config.model_extra or {}
    if len(parameters) == 1:
        if given:
            raise UserError(f"loss.{min(given)}: {config.name} has no options")
        return partial(_loss_per_token, loss, config.name)
    section = parameters[1].annotation if len(parameters) == 2 else None
    if not (inspect.isclass(section) and issubclass(section, Section)):
        raise UserError(
            f"loss.name: {config.name!r} has to be f(inputs) or f(inputs, options: Options), where "
            "Options is a klear_megatron.config.Section"
        )
    options = validate(section, given, f"loss: options of {config.name}:")
    with_options = partial(loss, **{parameters[1].name: options})
    return partial(_loss_per_token, with_options, config.name)


def _loss_per_token(
    loss: Callable[[LossInputs], TokenLoss], name: str, inputs: LossInputs
) -> TokenLoss:
    """What the loss returns; raises UserError if it fails, or if that is not one value per token,
    since a mean would be spread over all tokens in silence, or has no gradient."""
    try:
        value = loss(inputs)
    except Exception as error:
        # A sum over sequences fails if another rank has ended, for which no loss is to blame.
        if "/torch/distributed/" in traceback.extract_tb(error.__traceback__)[-1].filename:
            raise
        raise UserError(f"loss.name: {name} failed: {describe_failure(name, error)}") from error
    if not isinstance(value, TokenLoss):
        raise UserError(f"loss.name: {name} returned {type(value).__name__}, not a TokenLoss")
    if value.values.shape != inputs.log_probs.shape:
        raise UserError(
            f"loss.name: {name} returned values of shape {tuple(value.values.shape)} for "
            f"{len(inputs.log_probs)} tokens; return one value per token, which `loss.aggregation` "
            "adds up"
        )
    if inputs.log_probs.requires_grad and not value.values.requires_grad:
        raise UserError(
            f"loss.name: {name} returned values without a gradient, so nothing would be learned "
            "from them; compute them from inputs.log_probs, without detach or torch.no_grad"
        )
    return value

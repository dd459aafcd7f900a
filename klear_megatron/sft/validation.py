"""The loss of held-out conversations, measured between steps."""

from klear_megatron.checkpoints.model_folder import ModelFolder
from klear_megatron.observability import Phases, Progress, say
from klear_megatron.policy.batch import Batch
from klear_megatron.policy.model import Model
from klear_megatron.sft.config import SFTConfig
from klear_megatron.sft.data import read_validation
from klear_megatron.training import run


class Validation:
    """The validations of a run: none, or after the steps that its config says. Collective.

    Raises:
        UserError: as `read_examples`.
    """

    def __init__(self, config: SFTConfig, folder: ModelFolder, last_step: int) -> None:
        self._examples = read_validation(config, folder)
        self._every = config.validation.every if config.validation is not None else 0
        self._batch_size, self._last_step = config.batch_size, last_step

    def after(self, step: int, model: Model, phases: Phases) -> dict[str, float]:
        """Collective. `val/loss` if a validation is due: the negative log-likelihood in nats, mean
        over all trained tokens."""
        examples = self._examples
        if examples is None or (step % self._every and step != self._last_step):
            return {}
        loss = tokens = 0.0
        with (
            phases("evaluate"),
            Progress("  validate", len(examples), enabled=run.is_main_rank(), keep=False) as shown,
        ):
            for start in range(0, len(examples), self._batch_size):
                rows = range(start, min(start + self._batch_size, len(examples)))
                sequences, masks = zip(*(examples[row] for row in rows), strict=True)
                batch = Batch.from_sequences(sequences, loss_mask=masks)
                log_probs, _ = model.log_probs(batch)
                loss -= float((log_probs * batch.fields["loss_mask"]).double().sum())
                tokens += float(batch.fields["loss_mask"].sum())
                shown.advance(len(rows))
        if run.is_main_rank():
            say(f"step {step}: validation loss {loss / tokens:.4f}")
        return {"val/loss": loss / tokens}

"""The buffers of a checkpoint: one safetensors file per leader, under `buffer/` in its folder.

The tensors hold the tokens and log-probabilities of all finished responses one after another; the
header's `held` says in JSON what they are.
"""

import itertools
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from klear_megatron.data import LoadedPrompts
from klear_megatron.errors import UserError
from klear_megatron.platform.files import sync_to_disk
from klear_megatron.rewards import Reward
from klear_megatron.rl.buffer import Buffer, Slot
from klear_megatron.rl.config import RLConfig
from klear_megatron.rl.groups import Group, compared
from klear_megatron.rollout import Response, Share

_KEPT = ("finish_reason", "weight_version", "spans")


@dataclass(frozen=True)
class Held:
    """What a checkpoint keeps of one leader's buffer."""

    slots: list[Slot[Group]]
    replaced: list[Slot[Group]]
    """Given up since the last step took its groups; the next step counts them."""
    rows: list[int]
    """The prompts to ask next."""


def held_by(buffer: Buffer[Group], rows: Iterable[int]) -> Held:
    """A snapshot, in which slots do not change any more."""
    copies = [Slot(slot.row, slot.group, slot.informative) for slot in buffer.slots]
    return Held(copies, list(buffer.replaced), list(rows))


def path_of(checkpoint: Path, leader: int) -> Path:
    """The file of this leader in the folder of a checkpoint."""
    return checkpoint / "buffer" / f"leader_{leader}.safetensors"


def write(path: Path, held: Held, config: RLConfig) -> None:
    """Writes the file, and its folder. It is complete on the disk when this returns.

    Raises:
        UserError: the disk is full, or refuses for another reason.
    """
    responses = [
        response
        for slot in [*held.replaced, *held.slots]
        if slot.group is not None
        for response in slot.group.responses
    ]
    tensors = {
        "token_ids": _joined([response.token_ids for response in responses], torch.int32),
        "log_probs": _joined([response.log_probs for response in responses], torch.float32),
    }
    header = {
        "settings": _settings(config),
        "replaced": [_entry(slot) for slot in held.replaced],
        "slots": [_entry(slot) for slot in held.slots],
        "rows": held.rows,
    }
    try:
        path.parent.mkdir(exist_ok=True)
        save_file(tensors, path, {"held": json.dumps(header)})
        sync_to_disk(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: the buffer cannot be saved: {error}") from error


def read(
    path: Path, config: RLConfig, prompts: LoadedPrompts, text_of: Callable[[list[int]], str]
) -> Held:
    """What `write` wrote.

    Args:
        text_of: decodes the tokens of a response.

    Raises:
        UserError: the file is missing or damaged, or was written with other settings.
    """
    try:
        with safe_open(path, "pt") as file:
            header = json.loads(file.metadata()["held"])
            tokens = iter(file.get_tensor("token_ids").tolist())
            log_probs = iter(file.get_tensor("log_probs").tolist())
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path}: the buffer of this checkpoint cannot be read: {error}; resume from another "
            "checkpoint (move this one away), or choose another run_dir"
        ) from error
    _check(path, header["settings"], config)

    def slot_of(entry: dict[str, Any]) -> Slot[Group]:
        slot: Slot[Group] = Slot(entry["row"])
        if (responses := entry["responses"]) is None:
            return slot
        drawn = [
            Response(
                list(itertools.islice(tokens, one["tokens"])),
                list(itertools.islice(log_probs, one["tokens"])),
                one["finish_reason"],
                one["weight_version"],
                tuple((version, end) for version, end in one["spans"]),
            )
            for one in responses
        ]
        texts = [text_of(response.token_ids) for response in drawn]
        rewards = [Reward(**one["reward"]) for one in responses]
        row = slot.row
        prompt, prompt_ids = prompts.prompts[row], prompts.token_ids[row]
        slot.group = compared(prompt, prompt_ids, drawn, texts, rewards, config.advantages)
        slot.informative = slot.group.informative
        return slot

    # In the order of the tensors.
    replaced = [slot_of(entry) for entry in header["replaced"]]
    return Held(replaced=replaced, slots=list(map(slot_of, header["slots"])), rows=header["rows"])


def deal(all_held: Sequence[Held], per_step: int, share: Share) -> Held:
    """One leader's part of what was held by all leaders of a run, which may have been more or
    fewer.

    No group gets to a later step than it would have been taken by: the first `per_step` slots of
    all leaders together go to the next step, and so on.
    """
    before = len(all_held)
    in_steps = [
        (*divmod(position, len(range(leader, per_step, before))), leader, slot)
        for leader, held in enumerate(all_held)
        for position, slot in enumerate(held.slots)
    ]
    in_steps.sort(key=lambda one: one[:3])
    slots = [one[3] for one in in_steps]
    replaced = [slot for held in all_held for slot in held.replaced]
    in_turn = itertools.zip_longest(*(held.rows for held in all_held))
    rows = [row for turn in in_turn for row in turn if row is not None]
    mine = slice(share.leader, None, share.leaders)
    steps = [slots[i : i + per_step] for i in range(0, len(slots), per_step)]
    return Held([slot for step in steps for slot in step[mine]], replaced[mine], rows[mine])


def _settings(config: RLConfig) -> dict[str, Any]:
    """The settings that the buffered groups depend on. Their advantages are computed anew."""
    return {
        "max_staleness": config.max_staleness,
        "prompts_per_step": config.prompts_per_step,
        "responses_per_prompt": config.responses_per_prompt,
        "overlong": config.overlong and config.overlong.model_dump(),
        **{f"sampling.{key}": value for key, value in config.sampling.model_dump().items()},
    }


def _check(path: Path, before: dict[str, Any], config: RLConfig) -> None:
    for key, now in _settings(config).items():
        then = before.get(key)
        if then != now:
            raise UserError(
                f"{key}: was {then} when {path} was written and is {now}, but the groups there "
                "were made for that; change it back, or choose another run_dir"
            )


def _entry(slot: Slot[Group]) -> dict[str, Any]:
    if slot.group is None:
        return {"row": slot.row, "responses": None}
    return {
        "row": slot.row,
        "responses": [
            {
                "tokens": len(response.token_ids),
                "reward": asdict(reward),
                **{name: getattr(response, name) for name in _KEPT},
            }
            for response, reward in zip(slot.group.responses, slot.group.rewards, strict=True)
        ],
    }


def _joined(lists: Sequence[Sequence[float]], dtype: torch.dtype) -> Tensor:
    return torch.cat([torch.empty(0, dtype=dtype), *(torch.tensor(x, dtype=dtype) for x in lists)])

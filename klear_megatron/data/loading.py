"""Loads and encodes the prompts that a config names."""

from array import array
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from klear_megatron.data.chat_template import check_template
from klear_megatron.data.config import PromptsConfig
from klear_megatron.data.encoding import cut_prompt, encode_prompt
from klear_megatron.data.files import Row
from klear_megatron.data.rows import Prompt, parse_prompt, parse_rows
from klear_megatron.errors import UserError
from klear_megatron.platform.fingerprints import fingerprint


@dataclass(frozen=True)
class LoadedPrompts:
    """Prompts with their token ids, and counts of the rows that were dropped or cut."""

    prompts: list[Prompt]
    token_ids: list[list[int]]
    bad_rows: list[UserError]
    """The errors of malformed rows, which were skipped."""
    too_long: int
    """Prompts that were dropped or cut."""

    def fingerprint(self) -> str:
        """Tells these prompts, their ground truths and their tokens from others."""
        return fingerprint(
            part
            for prompt, ids in zip(self.prompts, self.token_ids, strict=True)
            for part in (
                array("q", ids).tobytes(),
                repr((prompt.data_source, prompt.ground_truth)).encode(errors="surrogatepass"),
            )
        )

    def notes(self, config: PromptsConfig, name: str) -> list[str]:
        """Lines for the user about the rows that were dropped or cut, one per kind.

        Args:
            name: the user's name for this data.
        """
        notes = []
        if self.bad_rows:
            notes.append(f"{name}: {len(self.bad_rows)} malformed rows skipped; {self.bad_rows[0]}")
        if self.too_long:
            done = "dropped" if config.too_long == "drop" else "cut"
            limit = config.max_prompt_length
            notes.append(f"{name}: {self.too_long} prompts longer than {limit} tokens {done}")
        return notes


def load_prompts(config: PromptsConfig, tokenizer: PreTrainedTokenizerBase) -> LoadedPrompts:
    """Reads and encodes the prompts of a config.

    Raises:
        UserError: the data cannot be read, a row is malformed and may not be skipped, or no prompt
            is short enough.
    """
    check_template(tokenizer)
    bad_rows: list[UserError] = []
    skip = bad_rows.append if config.bad_rows == "skip" else None
    limit = config.max_prompt_length
    kept, kept_ids, too_long = [], [], 0
    shortest = 0

    def encode(row: Row, index: int) -> tuple[Prompt, list[int]]:
        prompt = parse_prompt(row, index, config)
        return prompt, encode_prompt(tokenizer, prompt.messages)

    for _, (prompt, ids) in parse_rows(
        config.path, encode, skip, subset=config.subset, split=config.split
    ):
        if len(ids) > limit:
            too_long += 1
            shortest = min(shortest or len(ids), len(ids))
            if config.too_long == "drop":
                continue
            prompt, ids = cut_prompt(tokenizer, prompt, limit)
        kept.append(prompt)
        kept_ids.append(ids)
    if not kept and not too_long:
        raise UserError(f"{config.path}: all rows are malformed; the first:\n{bad_rows[0]}")
    if not kept:
        raise UserError(
            f"max_prompt_length: no prompt has at most {limit} tokens; the shortest has {shortest}"
        )
    return LoadedPrompts(kept, kept_ids, bad_rows, too_long)

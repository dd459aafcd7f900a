"""Encoded conversations on disk, written in parts by several processes.

Millions of long conversations do not fit in memory as lists. Each part is a memory-mapped Arrow
file: a process holds only the rows it reads, and the processes of one host share them.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from klear_megatron.data.chat_template import check_template
from klear_megatron.data.config import ConversationsConfig
from klear_megatron.data.encoding import encode_conversation
from klear_megatron.data.files import Row
from klear_megatron.data.rows import parse_conversation, parse_rows
from klear_megatron.errors import UserError
from klear_megatron.observability import Progress
from klear_megatron.platform.fingerprints import fingerprint

_SCHEMA = pa.schema(
    [
        ("index", pa.int64()),
        ("tokens", pa.list_(pa.int32())),
        ("trained", pa.list_(pa.int8())),
    ]
)
_ROWS_AT_ONCE = 256


@dataclass
class EncodedPart:
    """The outcome for the rows of one part."""

    kept: int = 0
    too_long: int = 0
    bad_rows: int = 0


def encode_part(
    config: ConversationsConfig,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    part: int,
    parts: int,
) -> EncodedPart:
    """Encodes every `parts`-th conversation, starting from number `part`, into a file.

    Raises:
        UserError: the data cannot be read, or a row is malformed and may not be skipped.
    """
    check_template(tokenizer)
    done = EncodedPart()

    def skip(_: UserError) -> None:
        done.bad_rows += 1

    def encode(row: Row, index: int) -> tuple[int, list[int], list[int]]:
        conversation = parse_conversation(row, index, config)
        return index, *encode_conversation(tokenizer, conversation.messages, conversation.tools)

    def encoded() -> Iterator[dict[str, Any]]:
        for _, (index, tokens, trained) in parse_rows(
            config.path,
            encode,
            skip if config.bad_rows == "skip" else None,
            subset=config.subset,
            split=config.split,
            part=part,
            parts=parts,
        ):
            if len(tokens) > config.max_length:
                done.too_long += 1
            else:
                done.kept += 1
                yield {"index": index, "tokens": tokens, "trained": trained}

    with (
        pa.OSFile(str(folder / f"{part}.arrow"), "wb") as file,
        pa.ipc.new_stream(file, _SCHEMA) as writer,
        Progress("encode", None, enabled=part == 0, keep=False) as progress,
    ):
        rows = encoded()
        while batch := list(islice(rows, _ROWS_AT_ONCE)):
            writer.write_table(pa.Table.from_pylist(batch, _SCHEMA))
            progress.advance(len(batch) * parts)
    return done


class EncodedConversations:
    """The conversations of all parts in the order of the data, whatever the number of parts."""

    def __init__(self, folder: Path, parts: int) -> None:
        tables = [
            pa.ipc.open_stream(pa.memory_map(str(folder / f"{part}.arrow"))).read_all()
            for part in range(parts)
        ]
        self._table = pa.concat_tables(tables)
        self._order: NDArray[np.int64] = np.argsort(self._table["index"].to_numpy())

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, row: int) -> tuple[NDArray[np.int32], NDArray[np.int8]]:
        """The token ids, and the mask: 1 for trained tokens, 0 for others."""
        place = int(self._order[row])
        return self._values("tokens", place), self._values("trained", place)

    def fingerprint(self) -> str:
        """Tells these conversations from others: by the lengths of all, and the tokens and masks of
        a thousand, evenly spaced."""
        lengths = pc.list_value_length(self._table["tokens"]).to_numpy()[self._order]
        some = range(0, len(self), max(len(self) // 1000, 1))
        return fingerprint(
            (lengths.tobytes(), *(values.tobytes() for row in some for values in self[row]))
        )

    def _values(self, column: str, place: int) -> NDArray[Any]:
        values: pa.Array = self._table[column][place].values
        # torch requires a writable array
        return values.to_numpy(zero_copy_only=False, writable=True)

"""Prompts as text, as words, and as vectors."""

import functools
import hashlib
import itertools
import re
import zlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from klear_megatron.data import Prompt

_WORD = re.compile(r"\w+")
DIMENSIONS = 128


def query_of(prompt: Prompt) -> str:
    """The text of all messages with white space collapsed; equal prompts have equal queries."""
    return " ".join(" ".join(message["content"] for message in prompt.messages).split())


def digest(query: str) -> bytes:
    """A 16-byte digest of a query; no two queries of a data set share one in practice."""
    return hashlib.blake2b(query.encode(errors="surrogatepass"), digest_size=16).digest()


def words_of(query: str) -> list[str]:
    """Runs of letters and digits, in lower case."""
    return _WORD.findall(query.lower())


def ngrams(words: Sequence[str], n: int) -> set[str]:
    """All runs of n words; a shorter text is one run."""
    return {" ".join(words[i : i + n]) for i in range(max(1, len(words) - n + 1)) if words}


def hashed_vector(words: Sequence[str]) -> NDArray[np.float32]:
    """[DIMENSIONS], of length 1: counts of words and pairs of words, hashed (Weinberger 2009)."""
    counts = [0] * DIMENSIONS
    for text in itertools.chain(words, map(" ".join, itertools.pairwise(words))):
        place, sign = _hash(text)
        counts[place] += sign
    vector = np.array(counts, np.float32)
    norm: np.float32 = np.linalg.norm(vector)
    return vector / norm if norm else vector


@functools.lru_cache(1 << 16)
def _hash(text: str) -> tuple[int, int]:
    """The dimension in which a text is counted, and the sign of the count."""
    number = zlib.crc32(text.encode(errors="surrogatepass"))
    return number % DIMENSIONS, 1 if number >> 31 else -1

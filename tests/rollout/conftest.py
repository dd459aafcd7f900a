"""Two real SGLang servers of a tiny Qwen3, shared by the tests of this folder."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from klear_megatron.rollout import Generator, RolloutConfig, Servers, serving
from tests.models import tiny

CONFIG = RolloutConfig(
    num_servers=2,
    dtype="float32",
    mem_fraction_static=0.05,
    max_running_requests=64,
    start_timeout_s=240,
    sync_timeout_s=60,
    # Small, so that a push takes several buckets.
    sync_bucket_bytes=200_000,
    extra_args=["--max-total-tokens", "20000", "--skip-tokenizer-init"],
)


@dataclass(frozen=True)
class SharedServers:
    running: Servers
    config: RolloutConfig
    checkpoint: Path

    @property
    def urls(self) -> list[str]:
        return self.running.urls

    def generator(self, urls: list[str] | None = None) -> Generator:
        return Generator(
            urls or self.urls, self.config, vocab_size=tiny.VOCAB, stop_token_ids=[tiny.VOCAB - 1]
        )


@pytest.fixture(scope="session")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SharedServers]:
    folder = tmp_path_factory.mktemp("servers")
    checkpoint = tiny.write(folder / "qwen3", tiny.qwen3(num_hidden_layers=2))
    with serving(CONFIG, checkpoint, folder / "logs") as running:
        yield SharedServers(running, CONFIG, checkpoint)

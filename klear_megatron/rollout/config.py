"""Settings for the SGLang servers and for sampling."""

import sys
from pathlib import Path
from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt, field_validator

from klear_megatron.config import Section


class SamplingConfig(Section):
    """How responses are drawn."""

    temperature: float = Field(1.0, ge=0)
    """0 is greedy."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Draw from the most likely tokens whose probabilities sum to this; 1 draws from all."""
    max_response_length: PositiveInt = 32768
    """Tokens; a longer response is cut off there and counts as truncated."""


class RolloutConfig(Section):
    """The SGLang servers: started for this run on this host, or already running elsewhere."""

    urls: list[str] = Field(default_factory=list)
    """Servers that run or start elsewhere, such as `http://node7:30000`. They are waited for, and
    none are started here."""
    num_servers: PositiveInt = 1
    """Servers to start on this host."""
    tensor_parallel_size: PositiveInt = 1
    """Ranks per server. Servers of `urls` are asked for theirs."""
    base_gpu_id: int | None = Field(None, ge=0)
    """First GPU of the first server; by default the first one that no rank of the trainer uses."""
    host: str = "127.0.0.1"
    """Address the servers listen on."""
    port: int | None = Field(None, ge=1, le=65535)
    """Port of the first server; the others use the ports after it. By default, free ports."""
    python: Path = Path(f"{sys.prefix}-rollout") / "bin" / "python"
    """Python interpreter of the environment that has SGLang."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Dtype of the servers' weights and activations."""
    context_length: PositiveInt | None = None
    """Tokens of prompt and response together; by default, the model's own limit."""
    mem_fraction_static: PositiveFloat = Field(0.8, le=1)
    """Share of the device memory for weights and KV cache."""
    max_running_requests: PositiveInt = 256
    """Sequences that one server generates at the same time."""
    extra_args: list[str] = Field(default_factory=list)
    """More arguments for `sglang.launch_server`, passed on unchanged."""
    start_timeout_s: PositiveFloat = 900.0
    """Seconds until a server has to answer, whether it is started here or is one of `urls`."""
    request_timeout_s: PositiveFloat = 300.0
    """Seconds that the responses to one prompt may take, and `token_timeout_s` more for each token
    of `max_response_length`. Time in which requests wait at the server, as for room in its KV
    cache, does not count."""
    token_timeout_s: float = Field(0.2, ge=0)
    """Seconds per token of `max_response_length`, beside `request_timeout_s`."""
    sync_timeout_s: PositiveFloat = 300.0
    """Seconds that sending one bucket of weights may take."""
    sync_bucket_bytes: PositiveInt = 128 * 2**20
    """Size of the buckets in which weights are broadcast. Each sending rank and each rank of a
    server keeps two; a larger tensor makes one of them as large as itself."""

    @field_validator("urls")
    @classmethod
    def _are_addresses(cls, urls: list[str]) -> list[str]:
        for url in urls:
            if not url.startswith(("http://", "https://")):
                raise ValueError(f"{url}: not an address; write it as http://HOST:PORT")
        return [url.rstrip("/") for url in urls]

    def describe_servers(self) -> str:
        """A line on the servers, for a dry run."""
        if self.urls:
            return f"servers: {len(self.urls)} that run already; they are not asked now"
        return f"servers: {self.num_servers}, each with TP {self.tensor_parallel_size}"


class ServeConfig(Section):
    """Settings of `klear-megatron serve`."""

    model: Path
    """Hugging Face checkpoint, or the name of one on the hub."""
    run_dir: Path
    """Folder for the servers' logs."""
    rollout: RolloutConfig = RolloutConfig()
    seed: int = 0
    """Seed of the servers' sampling."""
    announce: Path | None = None
    """File to write the servers' addresses to, as a JSON list, once all of them answer."""

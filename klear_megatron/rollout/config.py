"""Settings of the SGLang servers and of what they are asked to generate."""

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
    max_response_length: PositiveInt = 32768
    """In tokens; a longer response is cut there and counts as truncated."""


class RolloutConfig(Section):
    """The SGLang servers: started for this run on this host, or running already."""

    urls: list[str] = Field(default_factory=list)
    """Servers that run already, such as `http://node7:30000`; none are started then."""
    num_servers: PositiveInt = 1
    tensor_parallel_size: PositiveInt = 1
    """Ranks of one server."""
    base_gpu_id: int | None = Field(None, ge=0)
    """First GPU of the first server; by default the first one that no rank of the trainer uses."""
    host: str = "127.0.0.1"
    """Address the servers listen on."""
    port: int | None = Field(None, ge=1, le=65535)
    """Of the first server, the others follow; free ports are taken if not given."""
    python: Path = Path(f"{sys.prefix}-rollout") / "bin" / "python"
    """Interpreter of the environment that SGLang is installed in."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    context_length: PositiveInt | None = None
    """Prompt and response together; the model's own if not given."""
    mem_fraction_static: PositiveFloat = Field(0.8, le=1)
    """Share of the device's memory for weights and KV cache."""
    max_running_requests: PositiveInt = 256
    """Sequences that one server generates at a time."""
    extra_args: list[str] = Field(default_factory=list)
    """Further arguments of `sglang.launch_server`, as they are."""
    start_timeout_s: PositiveFloat = 900.0
    request_timeout_s: PositiveFloat = 3600.0
    """Longest time that one prompt's responses may take."""
    sync_timeout_s: PositiveFloat = 300.0
    """Longest time that one bucket of weights may take to arrive."""
    sync_bucket_bytes: PositiveInt = 512 * 2**20
    """Weights are broadcast in buckets of about this size."""

    @field_validator("urls")
    @classmethod
    def _are_addresses(cls, urls: list[str]) -> list[str]:
        for url in urls:
            if not url.startswith(("http://", "https://")):
                raise ValueError(f"{url}: no address; write it as http://HOST:PORT")
        return [url.rstrip("/") for url in urls]


class ServeConfig(Section):
    """Serving a checkpoint: `klear-megatron serve`."""

    model: Path
    """Hugging Face checkpoint."""
    run_dir: Path
    """Gets the servers' logs."""
    rollout: RolloutConfig = RolloutConfig()
    seed: int = 0

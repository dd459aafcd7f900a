"""What an SGLang server imports from `sgl_kernel` on a CPU, of which no such wheel is published.

SGLang 0.5.21 imports these names whenever SGLANG_USE_CPU_ENGINE is set, and calls only the first
of them in plain text generation; all other CPU kernels it uses only if they are there.
"""

from collections.abc import Callable
from typing import Any, NoReturn

import torch


def assign_req_to_token_pool_cpu(
    requests: torch.Tensor,
    req_to_token: torch.Tensor,
    starts: torch.Tensor,
    ends: torch.Tensor,
    cache_locations: torch.Tensor,
    _pool_length: int,
) -> None:
    """Row by row: req_to_token[request, start:end] = the next (end - start) cache locations."""
    position = 0
    for request, start, end in zip(requests.tolist(), starts.tolist(), ends.tolist(), strict=True):
        locations = cache_locations[position : position + end - start]
        req_to_token[request, start:end] = locations.to(req_to_token.dtype)
        position += end - start


def _unavailable(name: str) -> Callable[..., NoReturn]:
    def kernel(*args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError(f"sgl_kernel.{name} has no CPU build in this environment")

    return kernel


copy_all_layer_kv_cache_cpu = _unavailable("copy_all_layer_kv_cache_cpu")
rotate_input_ids_cpu = _unavailable("rotate_input_ids_cpu")
fill_accept_out_cache_loc_cpu = _unavailable("fill_accept_out_cache_loc_cpu")
fill_bonus_tokens_cpu = _unavailable("fill_bonus_tokens_cpu")
assign_draft_cache_locs_contiguous_cpu = _unavailable("assign_draft_cache_locs_contiguous_cpu")
assign_extend_cache_locs_cpu = _unavailable("assign_extend_cache_locs_cpu")
build_tree_kernel_efficient_cpu = _unavailable("build_tree_kernel_efficient_cpu")
verify_tree_greedy_cpu = _unavailable("verify_tree_greedy_cpu")

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from klear_megatron.policy.config import OptimizerConfig, PolicyConfig
from klear_megatron.policy.kernels import Installed, choose_kernels, choose_offload

LAPTOP = Installed(None, transformer_engine=False, apex=False)
H100 = Installed((9, 0), transformer_engine=True, apex=True)
BARE_H100 = Installed((9, 0), transformer_engine=False, apex=False)
B200 = Installed((10, 0), transformer_engine=True, apex=False)
A100 = Installed((8, 0), transformer_engine=True, apex=False)
RTX_5090 = Installed((12, 0), transformer_engine=True, apex=False)


def _choose(installed: Installed, *, experts: bool = False, **settings: Any) -> Any:
    config = PolicyConfig.model_validate({"path": Path("x"), "optimizer": {"lr": 1e-6}, **settings})
    return choose_kernels(config, installed, experts=experts)


@pytest.mark.parametrize(
    ("recipe", "machines"),
    [
        ("delayed", [H100, B200, RTX_5090]),
        ("tensorwise", [H100, B200, RTX_5090]),
        ("blockwise", [H100, B200, RTX_5090]),
        ("mxfp8", [B200]),
    ],
)
def test_fp8_where_the_hardware_has_it_and_one_line_where_not(recipe, machines):
    for installed in (LAPTOP, BARE_H100, A100, H100, B200, RTX_5090):
        kernels = _choose(installed, fp8=recipe, fp8_param_gather=True)
        has = installed in machines
        assert (kernels.transformer["fp8"] == "hybrid") is has
        assert kernels.fp8_param_gather is kernels.transformer["fp8_param"] is has
        assert not has or kernels.transformer["fp8_recipe"] == recipe
        assert kernels.mxfp8_param_gather is (has and recipe == "mxfp8")
        assert kernels.token_multiple == (1 if not has else 32 if recipe == "mxfp8" else 16)
        assert len([line for line in kernels.warnings if f"policy.fp8: {recipe}" in line]) == (
            0 if has else 1
        )


def test_layers_come_from_transformer_engine_where_it_is():
    engine = _choose(H100, experts=True).transformer
    assert engine["transformer_impl"] == "transformer_engine"
    assert engine["apply_rope_fusion"]
    assert engine["moe_grouped_gemm"]
    assert engine["cp_comm_type"] == "p2p"
    bare = _choose(BARE_H100, experts=True)
    assert bare.transformer["transformer_impl"] == "local"
    assert not bare.transformer["apply_rope_fusion"]
    assert not bare.transformer["moe_grouped_gemm"]
    engine_line, apex_line = bare.warnings
    assert "Transformer Engine is not installed" in engine_line
    assert "Apex is not installed" in apex_line


def test_apexs_gradient_accumulation_where_nvidias_apex_is():
    assert _choose(H100).transformer["gradient_accumulation_fusion"]
    assert _choose(H100).warnings == []
    kernels = _choose(B200)
    assert not kernels.transformer["gradient_accumulation_fusion"]
    (line,) = kernels.warnings
    assert "Apex is not installed" in line


def test_a_laptop_gets_plain_pytorch_without_a_word_and_no_gpu_kernel():
    kernels = _choose(LAPTOP, experts=True)
    assert kernels.warnings == []
    assert not any(value is True for value in kernels.transformer.values())


def test_recomputation_and_offloading_that_cannot_be_had_are_said():
    modules = {"recompute_granularity": "selective", "recompute_modules": ["layernorm", "mlp"]}
    assert _choose(H100, **modules).transformer["recompute_modules"] == ["layernorm", "mlp"]
    kernels = _choose(LAPTOP, **modules)
    assert kernels.transformer["recompute_modules"] == ["mlp"]
    assert [line.split(":")[0] for line in kernels.warnings] == ["policy.recompute_modules"]
    half = OptimizerConfig(lr=1e-6, offload_fraction=0.5)
    fraction, (line,) = choose_offload(half, LAPTOP)
    assert fraction == 0
    assert line.startswith("policy.optimizer.offload_fraction")
    assert choose_offload(half, H100) == (0.5, [])
    # What is not there to be recomputed: Megatron would refuse the whole run.
    modules["recompute_modules"] = ["layernorm", "moe_act"]
    assert _choose(H100, **modules, experts=True).transformer["recompute_modules"] == [
        "layernorm",
        "moe_act",
    ]
    dense = _choose(H100, **modules)
    assert dense.transformer["recompute_modules"] == ["layernorm"]
    (line,) = dense.warnings
    assert "moe_act needs a mixture of experts" in line


def test_fp8_over_float32_weights_is_refused():
    with pytest.raises(ValidationError, match="needs dtype: bfloat16, not float32"):
        _choose(H100, fp8="delayed", dtype="float32")

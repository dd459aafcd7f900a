"""Reports what is installed, which backend each part would use, and any problems."""

import importlib.util
import subprocess
import sys

from klear_megatron.doctor.gpu import GpuSoftware, find_gpu_software, version
from klear_megatron.errors import UserError
from klear_megatron.planning import hardware_here
from klear_megatron.rewards.config import CodeRewardConfig
from klear_megatron.rewards.sandbox.sandbox import check_sandbox
from klear_megatron.rollout.config import RolloutConfig

_SGLANG_TIMEOUT_S = 60
_SGLANG_VERSIONS = """
import importlib.metadata as m
nccl = [d.version for d in m.distributions() if d.name.startswith("nvidia-nccl-cu")]
print(m.version("sglang"), m.version("torch"), *nccl)
"""


def examine() -> list[str]:
    """Prints the findings and returns the problems, each with what is wrong and what to do."""
    problems: list[str] = []
    _say("Python", sys.version.split()[0])
    has_gpu = _examine_torch(problems)
    _examine_required(
        "megatron-core", "the policy: parallel layers, schedules, optimizer", problems
    )
    software = find_gpu_software()
    _examine_transformer_engine(software, has_gpu, problems)
    has_apex = _examine_apex(problems)
    has_engine = has_gpu and software.engine_works
    _say("layers", "Transformer Engine" if has_engine else "PyTorch (SDPA, RMSNorm)")
    _say(
        "optimizer",
        "Transformer Engine's fused Adam"
        if has_engine
        else "Apex's fused Adam"
        if has_gpu and has_apex
        else "PyTorch's Adam",
    )
    _examine_planning(problems)
    _examine_required("math-verify", "math rewards", problems)
    _examine_bubblewrap(problems)
    servers_nccl = _examine_sglang(problems)
    return problems + software.problems(servers_nccl)


def _say(what: str, finding: str) -> None:
    print(f"{what:20} {finding}")


def _examine_required(distribution: str, purpose: str, problems: list[str]) -> None:
    found = version(distribution)
    _say(distribution, f"{found or 'not installed'} ({purpose})")
    if found is None:
        problems.append(f"{distribution} is not installed: run `make setup`")


def _examine_torch(problems: list[str]) -> bool:
    import torch

    gpus = torch.cuda.device_count()
    names = ", ".join(sorted({torch.cuda.get_device_name(i) for i in range(gpus)}))
    device = f"{gpus} GPU(s): {names}; NCCL" if gpus else "no GPU: everything on the CPU over gloo"
    _say("torch", f"{torch.__version__} ({device})")
    if not gpus and torch.version.cuda:
        problems.append(
            f"torch is built for CUDA {torch.version.cuda} but sees no GPU: check the driver "
            "(`nvidia-smi`) and CUDA_VISIBLE_DEVICES"
        )
    return gpus > 0


def _examine_transformer_engine(software: GpuSoftware, has_gpu: bool, problems: list[str]) -> None:
    use = "fused layers and FP8" if has_gpu else "needs a GPU; not used here"
    _say("transformer-engine", f"{software.engine or 'not installed'} ({use})")
    if software.engine is None and has_gpu:
        problems.append(
            "there is a GPU but no Transformer Engine: layers are plain PyTorch and FP8 is not "
            "available; run `make setup`"
        )


def _examine_apex(problems: list[str]) -> bool:
    if importlib.util.find_spec("apex") is None:
        _say("apex", "not installed (optional: fused kernels where Transformer Engine has none)")
        return False
    # `apex` on PyPI is an unrelated web toolkit; NVIDIA's Apex is installed from source.
    if importlib.util.find_spec("apex.multi_tensor_apply") is None:
        _say("apex", "not NVIDIA's")
        problems.append(
            "the installed `apex` is not NVIDIA's but another project of the same name: "
            "`pip uninstall apex`, and build NVIDIA's from its repository if you want it"
        )
        return False
    _say("apex", "NVIDIA's (fused kernels)")
    return True


def _examine_planning(problems: list[str]) -> None:
    try:
        here = hardware_here()
    except UserError as error:
        _say("planning", "the GPU's numbers are not known")
        problems.append(str(error))
        return
    _say(
        "planning",
        f"{here.memory / 2**30:.1f} GiB, {here.flops.bfloat16 / 1e12:.2f} TFLOP/s in bfloat16, "
        f"{here.bandwidth / 1e9:.0f} GB/s ({here.sources})",
    )


def _examine_bubblewrap(problems: list[str]) -> None:
    try:
        check_sandbox(CodeRewardConfig())
    except UserError as error:
        _say("bubblewrap", "not installed, or does not work (code rewards: the sandbox)")
        problems.append(str(error))
        return
    _say("bubblewrap", "works (code rewards: the sandbox)")


def _examine_sglang(problems: list[str]) -> str | None:
    """Returns the version of NCCL in SGLang's environment."""
    python = RolloutConfig().python
    if not python.is_file():
        _say("sglang", f"no environment at {python.parent.parent}")
        problems.append(
            f"SGLang's environment is not at {python.parent.parent}: run `make setup`, or set "
            "rollout.python"
        )
        return None
    found = subprocess.run(
        [str(python), "-c", _SGLANG_VERSIONS],
        capture_output=True,
        text=True,
        timeout=_SGLANG_TIMEOUT_S,
        check=False,
    )
    if found.returncode:
        _say("sglang", f"broken in {python.parent.parent}")
        problems.append(f"SGLang is not installed in {python.parent.parent}: run `make setup`")
        return None
    sglang, torch_version, *nccl = found.stdout.split()
    _say("sglang", f"{sglang} with torch {torch_version} in {python.parent.parent} (rollouts)")
    return nccl[0] if nccl else None

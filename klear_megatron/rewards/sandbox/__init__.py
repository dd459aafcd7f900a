"""Runs untrusted programs so that they can do nothing but compute."""

from klear_megatron.rewards.sandbox.sandbox import Sandbox, SandboxError, check_sandbox, memory_file

__all__ = ["Sandbox", "SandboxError", "check_sandbox", "memory_file"]

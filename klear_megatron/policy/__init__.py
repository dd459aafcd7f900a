"""The trained policy on Megatron-Core."""

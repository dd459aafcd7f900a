"""The formats on disk: Hugging Face folders and Megatron's distributed checkpoints."""

"""Shapes of published models, for tests that plan and check but never build them."""

from transformers import Qwen3Config


def qwen3_8b(max_position_embeddings: int) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=151936,
        hidden_size=4096,
        intermediate_size=12288,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=max_position_embeddings,
        architectures=["Qwen3ForCausalLM"],
        tie_word_embeddings=False,
    )

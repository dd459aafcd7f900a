"""A tokenizer has to fit its model."""

import pytest
from transformers import AutoTokenizer

from klear_megatron.checkpoints.model_folder import ModelFolder
from klear_megatron.errors import UserError
from tests.models import tiny


def test_token_that_the_model_has_no_row_for_is_refused_with_its_id_and_the_vocabulary(tmp_path):
    tiny.qwen3().save_pretrained(tmp_path)
    tiny.write_tokenizer(tmp_path)
    assert len(ModelFolder(tmp_path).tokenizer) == tiny.VOCAB  # as many as there are rows

    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.add_tokens(["<tool>", "</tool>"])
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"'</tool>' has the id 332, but .*vocab_size is 331"):
        _ = ModelFolder(tmp_path).tokenizer

import pytest
import torch

from klear_megatron.policy.batch import Batch


def test_select_takes_sequences_with_their_fields():
    batch = Batch.from_sequences([[1, 2], [3], [4, 5, 6]], mask=[[0, 1], [2], [3, 4, 5]])
    chosen = batch.select([2, 0])
    assert chosen.tokens.tolist() == [4, 5, 6, 1, 2]
    assert chosen.lengths == [3, 2]
    assert chosen.fields["mask"].tolist() == [3, 4, 5, 0, 1]
    assert chosen.fields["mask"].dtype == torch.float32
    assert chosen.tokens.dtype == torch.int64


def test_fields_are_as_long_as_the_tokens():
    with pytest.raises(ValueError, match=r"mask: \(2,\), not \(3,\)"):
        Batch.from_sequences([[1, 2], [3]], mask=[[0, 1], []])
    batch = Batch.from_sequences([[1, 2], [3]])
    with pytest.raises(ValueError, match="advantages"):
        batch.with_fields(advantages=torch.zeros(4))

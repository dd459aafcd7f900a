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
    assert chosen.tokens.dtype == torch.int32


def test_a_value_per_response_is_that_of_its_tokens_and_0_on_its_prompt():
    batch = Batch(
        torch.arange(9, dtype=torch.int32),
        [3, 2, 4],
        {"mask": torch.ones(9)},
        {"advantages": torch.tensor([0.5, -1.0, 2.0]), "mask": torch.zeros(3)},
        [1, 2, 0],
    )
    assert batch.fields["advantages"].tolist() == [0, 0.5, 0.5, 0, 0, 2, 2, 2, 2]
    assert batch.fields["advantages"].dtype == torch.float32
    assert batch.fields["mask"].tolist() == [1] * 9
    assert sorted(batch.fields) == ["advantages", "mask"]
    assert len(batch.fields) == 2
    chosen = batch.select([2, 0])
    assert chosen.fields["advantages"].tolist() == [2, 2, 2, 2, 0, 0.5, 0.5]
    assert chosen.with_fields(advantages=torch.ones(7)).fields["advantages"].tolist() == [1] * 7


def test_fields_are_as_long_as_the_tokens():
    with pytest.raises(ValueError, match=r"mask: \(2,\), not \(3,\)"):
        Batch.from_sequences([[1, 2], [3]], mask=[[0, 1], []])
    batch = Batch.from_sequences([[1, 2], [3]])
    with pytest.raises(ValueError, match="advantages"):
        batch.with_fields(advantages=torch.zeros(4))
    with pytest.raises(ValueError, match=r"advantages: \(3,\), not \(2,\)"):
        Batch(batch.tokens, batch.lengths, {}, {"advantages": torch.zeros(3)}, [1, 1])
    with pytest.raises(ValueError, match="0 prompt lengths, not 2"):
        Batch(batch.tokens, batch.lengths, {}, {"advantages": torch.zeros(2)})

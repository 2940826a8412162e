import pytest
import torch

from lit_modules.data.classification import ClassificationData
from mixers import SpecError


def test_the_label_is_the_first_mark_and_every_mark_is_there_once():
    data = ClassificationData(num_classes=4, seq_len=24)
    batch = data.batch(0, 0, batch_size=64, level=0)
    tokens, real = batch["tokens"], batch["padding_mask"]
    assert torch.equal(real, tokens != 0)
    assert torch.equal(real, real.sum(1, keepdim=True) > torch.arange(24))
    assert len(set(real.sum(1).tolist())) > 3 and real.sum(1).min() >= 12
    for row, label in zip(tokens.tolist(), batch["label"].tolist(), strict=True):
        marks = [token for token in row if 1 <= token <= 4]
        assert sorted(marks) == [1, 2, 3, 4]
        assert marks[0] == label + 1
    assert tokens.max() < data.vocab_size
    assert set(batch["label"].tolist()) == {0, 1, 2, 3}


@pytest.mark.parametrize("options", [{"num_classes": 1}, {"num_noise": 0}, {"seq_len": 7}])
def test_sizes_that_contradict_each_other(options):
    with pytest.raises(SpecError, match=next(iter(options))):
        ClassificationData(**options)

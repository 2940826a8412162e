import pytest

from lit_modules.data.stream import REPEATED, BatchStream, FixedBatches
from mixers import SpecError


def test_a_stream_goes_on_from_epoch_to_epoch_and_from_its_state():
    stream = BatchStream(lambda number: number, length=3)
    assert len(stream) == 3
    assert list(stream) == [0, 1, 2]
    epoch = iter(stream)
    assert [next(epoch), next(epoch)] == [3, 4]
    resumed = BatchStream(lambda number: number, length=3)
    resumed.load_state_dict(stream.state_dict())
    assert next(iter(resumed)) == 5


def test_a_stream_of_other_data_is_refused_where_both_are_known():
    def stream(digest):
        return BatchStream(lambda number: number, length=3, digest=digest, source="the text in a")

    state = stream("one").state_dict() | {"next": 2}
    with pytest.raises(SpecError, match="^the text in a changed since the checkpoint was written: .*--data.paths"):
        stream("another").load_state_dict(state)
    for digest, known in (("one", state), (None, state), ("one", {"next": 2})):  # the last as they were once
        resumed = stream(digest)
        resumed.load_state_dict(known)
        assert next(iter(resumed)) == 2


def test_all_ranks_get_equally_many_fixed_batches_and_every_batch_is_some_ranks():
    batches = [{"name": name} for name in "abcde"]
    shares = [list(FixedBatches(batches, rank=rank, world_size=3)) for rank in range(3)]
    assert [[batch["name"] for batch in share] for share in shares] == [["a", "d"], ["b", "e"], ["c", "c"]]
    counted = [batch for share in shares for batch in share if not batch.get(REPEATED)]
    assert sorted(batch["name"] for batch in counted) == list("abcde")
    assert list(FixedBatches(batches)) == batches
    assert list(FixedBatches(batches[:1], rank=2, world_size=3)) == [{"name": "a", REPEATED: True}]

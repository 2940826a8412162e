from lit_modules.data.stream import REPEATED, BatchStream, FixedBatches


def test_a_stream_goes_on_from_epoch_to_epoch_and_from_its_state():
    stream = BatchStream(lambda number: number, length=3)
    assert len(stream) == 3
    assert list(stream) == [0, 1, 2]
    epoch = iter(stream)
    assert [next(epoch), next(epoch)] == [3, 4]
    resumed = BatchStream(lambda number: number, length=3)
    resumed.load_state_dict(stream.state_dict())
    assert next(iter(resumed)) == 5


def test_all_ranks_get_equally_many_fixed_batches_and_every_batch_is_some_ranks():
    batches = [{"name": name} for name in "abcde"]
    shares = [list(FixedBatches(batches, rank=rank, world_size=3)) for rank in range(3)]
    assert [[batch["name"] for batch in share] for share in shares] == [["a", "d"], ["b", "e"], ["c", "c"]]
    counted = [batch for share in shares for batch in share if not batch.get(REPEATED)]
    assert sorted(batch["name"] for batch in counted) == list("abcde")
    assert list(FixedBatches(batches)) == batches
    assert list(FixedBatches(batches[:1], rank=2, world_size=3)) == [{"name": "a", REPEATED: True}]

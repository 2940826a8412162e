"""Run by .ci/run apart: litdata asks for torchvision, which it does not need here, and which must fit torch."""

import io
from itertools import islice

import pytest
import torch

from lit_modules.data.batches import IGNORED
from mixers import SpecError
from tests.lit_modules.data.test_tokens import pieces

litdata = pytest.importorskip(
    "litdata", exc_type=ImportError, reason="not among the test extra: it asks for torchvision"
)


def write_chunks(folder):
    """64 documents, each of which repeats one id, in chunks of about 500 bytes."""
    from litdata.streaming.writer import BinaryWriter

    writer = BinaryWriter(str(folder), chunk_bytes=512, item_loader=litdata.TokensLoader())
    for i in range(64):
        writer.add_item(i, torch.cat([torch.full((30 + i,), 1 + i), torch.zeros(1, dtype=torch.long)]).to(torch.uint16))
    writer.done()
    writer.merge(1)


@pytest.fixture
def folder(tmp_path):
    write_chunks(tmp_path / "chunks")
    return tmp_path / "chunks"


def test_blocks_are_read_and_gone_on_with_by_any_number_of_workers(tokens, folder):
    data = tokens(paths=str(folder))
    loader = data.train_dataloader()
    batches = iter(loader)
    for batch in islice(batches, 5):
        assert batch["tokens"].shape == (1, 128)
        for ids, targets in pieces(batch):
            assert len({*ids} - {0}) <= 1
            assert ids[1:] == targets[:-1] or targets[-2] == IGNORED or ids[-1] == 0
    kept = io.BytesIO()
    torch.save(loader.state_dict(), kept)
    state = torch.load(io.BytesIO(kept.getvalue()), weights_only=True)
    later = list(islice(batches, 4))
    for num_workers in (0, 2):
        resumed = tokens(paths=str(folder), num_workers=num_workers).train_dataloader()
        resumed.load_state_dict(state)
        for ours, theirs in zip(later, resumed, strict=False):
            assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert len(data.val_dataloader()) >= 1
    (folder / "index.json").write_text((folder / "index.json").read_text() + "\n")
    with pytest.raises(SpecError, match="the documents of data 'tokens' changed"):
        tokens(paths=str(folder)).train_dataloader().load_state_dict(state)


def test_a_missing_chunk_is_named_before_it_is_waited_for(tokens, folder):
    (folder / "chunk-0-3.bin").unlink()
    with pytest.raises(SpecError, match="litdata cannot open .*chunks: chunk-0-3.bin is missing"):
        tokens(paths=str(folder))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_chunk_that_cannot_be_read_is_one_line(tokens, folder, num_workers):
    for chunk in folder.glob("*.bin"):
        chunk.write_bytes(chunk.read_bytes()[:100])
    loader = tokens(paths=str(folder), num_workers=num_workers).train_dataloader()
    with pytest.raises(SpecError, match="litdata cannot read .*chunks: .*chunk-0-") as raised:
        next(iter(loader))
    assert "\n" not in str(raised.value)

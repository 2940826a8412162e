import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lit_modules.routing_figure import routing_figure
from lit_modules.routing_monitor import RoutingMonitor, one_sequence, visible


def test_it_writes_usage_thresholds_histograms_and_a_picture(tmp_path, make_trainer, make_model, make_mqar):
    logger = TensorBoardLogger(tmp_path, name="board")
    model = make_model(mixer=[{"name": "ham", "num_heads": 2, "head_dim": 8}, "attention"])
    trainer = make_trainer(max_steps=5, logger=logger, callbacks=[RoutingMonitor()], num_sanity_val_steps=1)
    trainer.fit(model, make_mqar())
    logger.experiment.flush()
    events = EventAccumulator(logger.log_dir, size_guidance={"histograms": 0, "images": 0})
    events.Reload()
    tags = events.Tags()
    for name in ("kv_usage", "layer0/kv_usage", "layer0/head1/kv_usage", "layer0/head0/tau"):
        assert f"routing/{name}" in tags["scalars"]
    assert tags["histograms"] == ["routing/layer0/scores"]
    assert tags["images"] == ["routing/sequence"]
    (image,) = events.Images("routing/sequence")  # not for the sanity check
    assert image.step == 5 and image.width > 500
    (usage,) = events.Scalars("routing/layer0/head1/kv_usage")
    assert usage.value == pytest.approx(model.last_usage["kv_usage/layer0/head1"])


def test_without_routers_or_tensorboard_nothing_happens(tmp_path, make_trainer, make_model, make_mqar):
    logger = TensorBoardLogger(tmp_path, name="board")
    make_trainer(max_steps=1, logger=logger, callbacks=[RoutingMonitor()]).fit(make_model(mixer="gdn"), make_mqar())
    events = EventAccumulator(logger.log_dir).Reload().Tags()
    assert not [tag for kind in ("scalars", "histograms", "images") for tag in events[kind] if "routing" in tag]
    trainer = make_trainer(max_steps=1, callbacks=[RoutingMonitor()])
    trainer.fit(make_model(), make_mqar())
    assert trainer.global_step == 1


def batch_of(kind):
    tokens = torch.randint(0, 33, (1, 12))
    if kind == "packed":
        return {"tokens": tokens, "cu_seqlens": torch.tensor([0, 3, 12], dtype=torch.int32)}, slice(3, 12)
    if kind == "padded":
        return {"tokens": tokens, "padding_mask": torch.arange(12)[None] < 9}, slice(0, 9)
    return {"tokens": tokens}, slice(0, 10)


@pytest.mark.parametrize("kind", ["packed", "padded", "plain"])
def test_one_sequence_is_cut_out_where_it_is(make_model, kind):
    batch, part = batch_of(kind)
    model = make_model().eval()
    with torch.no_grad():
        routing = model.decode(batch | {"targets": batch["tokens"]}).routing
    tokens, cut = one_sequence(batch, [*routing, None], max_tokens=10)
    assert torch.equal(tokens, batch["tokens"][0, part])
    assert cut[-1] is None
    assert torch.equal(cut[0].scores, routing[0].scores[:1, part])
    assert cut[1].stored.shape == cut[1].g.shape == (1, part.stop - part.start, 2)


@pytest.mark.parametrize("router", ["cosine", "random", "recency", "static", "all", "none"])
@pytest.mark.parametrize("kv_usage", [0.0, 0.3, 1.0])
def test_a_picture_of_any_router(make_model, router, kv_usage):
    model = make_model(router=router, kv_usage=kv_usage).eval()
    with torch.no_grad():
        routing = model.decoder(torch.randint(0, 33, (2, 12))).routing
    figure = routing_figure([None, *routing], labels=[visible(c) for c in "a b\n\t\0cdefghij"[:12]])
    figure.canvas.draw()
    assert [label.get_text() for label in figure.axes[2].get_xticklabels()][:4] == ["a", "␣", "b", "↵"]
    assert "layer 1" in figure.axes[1].get_title(loc="left")

from pathlib import Path

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lit_modules.averaging import WeightAverage
from lit_modules.callbacks import SampleText
from lit_modules.data.text import TextData
from lit_modules.routing_figure import routing_figure
from lit_modules.routing_monitor import RoutingMonitor, numbers, one_sequence, visible


class Gallery(CSVLogger):
    """A logger like W&B's, with pictures and texts."""

    def __init__(self, folder):
        super().__init__(folder, name="gallery")
        self.shown = {}

    def log_image(self, key, images, step=None, **options):
        self.shown[key] = images, step

    def log_text(self, key, columns=None, data=None, step=None, **options):
        self.shown[key] = data, step


@pytest.fixture
def text(tmp_path):
    (tmp_path / "a.txt").write_text("a line of text\n" * 400)
    return TextData(paths=[str(tmp_path / "a.txt")], seq_len=32, batch_tokens=64)


def test_every_logger_shows_the_same(tmp_path, make_trainer, make_model, text):
    board = TensorBoardLogger(tmp_path, default_hp_metric=False)
    table, gallery = CSVLogger(tmp_path), Gallery(tmp_path)
    model = make_model(vocab_size=256, mixer=[{"name": "ham", "num_heads": 2, "head_dim": 8}, "attention"])
    callbacks = [RoutingMonitor(), SampleText(num_tokens=4)]
    options = {"max_steps": 6, "val_check_interval": 3, "log_every_n_steps": 1, "num_sanity_val_steps": 1}
    make_trainer(**options, logger=[board, table, gallery], callbacks=callbacks, gradient_clip_val=1.0).fit(model, text)

    events = EventAccumulator(board.log_dir, size_guidance={"images": 0, "tensors": 0}).Reload()
    scalars = events.Tags()["scalars"]
    routing = {"kv_usage", "layer0/kv_usage", "layer0/head1/kv_usage", "tau", "layer0/score_middle"}
    stats = {"learning_rate", "gradient_norm", "tokens", "tokens_per_second", "peak_memory_gb"}
    expected = {f"val_routing/{name}" for name in routing} | {f"trainer/{name}" for name in stats}
    expected |= {f"{part}/{name}" for part in ("train", "val") for name in ("loss", "bits_per_byte", "kv_usage")}
    assert expected <= {*scalars}
    for logger in (table, gallery):
        header = Path(logger.log_dir, "metrics.csv").read_text().splitlines()[0]
        assert {*scalars} <= {*header.split(",")}

    assert not [name for name in scalars if "tau" in name and name != "val_routing/tau"]  # one budget, one curve
    assert sorted(scalars).index("train/loss") < 6  # on the first screen
    (usage,) = [x.value for x in events.Scalars("val_routing/layer0/head1/kv_usage") if x.step == 5]
    assert usage == pytest.approx(model.last_usage["kv_usage/layer0/head1"])
    pictures = events.Images("val_routing/sequence")
    assert [picture.step for picture in pictures] == [2, 5]  # not for the sanity check
    assert pictures[0].width >= 1500 and pictures[0].height > pictures[0].width / 3
    (pixels,), step = gallery.shown["val_routing/sequence"]
    assert pixels.shape[1] == pictures[0].width and step == 5
    assert Path(table.log_dir, "val_routing/sequence.png").stat().st_size > 0
    sample = Path(table.log_dir, "sample.txt").read_text()
    assert "line of text" in sample and gallery.shown["sample"] == ([[sample]], 5)
    assert "sample/text_summary" in events.Tags()["tensors"]


@pytest.mark.parametrize(
    ("scope", "names"),
    [
        ("model", {"tau"}),
        ("layer", {"layer0/tau", "layer1/tau"}),
        ("head", {f"layer{i}/head{h}/tau" for i in (0, 1) for h in (0, 1)}),
    ],
)
def test_a_threshold_is_there_once(make_model, scope, names):
    model = make_model(mixer={"name": "ham", "num_heads": 2, "head_dim": 8, "scope": scope})
    with torch.no_grad():
        model.decoder(torch.randint(0, 33, (4, 12)))
        routing = model.eval().decoder(torch.randint(0, 33, (2, 12))).routing
    assert {name for name in numbers(routing, {}) if "tau" in name} == names


def test_without_routers_or_loggers_nothing_happens(tmp_path, make_trainer, make_model, make_mqar):
    logger = TensorBoardLogger(tmp_path, name="board")
    make_trainer(max_steps=1, logger=logger, callbacks=[RoutingMonitor()]).fit(make_model(mixer="gdn"), make_mqar())
    events = EventAccumulator(logger.log_dir).Reload().Tags()
    assert not [tag for kind in ("scalars", "histograms", "images") for tag in events[kind] if "routing" in tag]
    trainer = make_trainer(max_steps=1, callbacks=[RoutingMonitor()])
    trainer.fit(make_model(), make_mqar())
    assert trainer.global_step == 1


def test_what_is_shown_is_of_the_weights_that_are_validated(tmp_path, make_trainer, make_model, text):
    """Not of those that training goes on with, where weights are averaged."""
    read = {"validation": [], "monitor": []}

    class Noting(RoutingMonitor):
        def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
            if batch_idx == 0:
                read["validation"].append([routed.scores for routed in pl_module.decode(batch).routing])

        def on_validation_end(self, trainer, pl_module):
            read["monitor"].append([routed.scores for routed in self.routing])
            super().on_validation_end(trainer, pl_module)

    model = make_model(vocab_size=256, learning_rate=0.1)
    callbacks = [WeightAverage(0.9), Noting()]
    options = dict(max_steps=6, val_check_interval=3, limit_val_batches=2, logger=CSVLogger(tmp_path))
    make_trainer(**options, callbacks=callbacks).fit(model, text)
    assert len(read["monitor"]) == len(read["validation"]) == 2
    for seen, expected in zip(read["monitor"], read["validation"], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(seen, expected, strict=True))


def test_tokens_are_counted_on_after_a_resume(tmp_path, make_trainer, make_model, make_mqar):
    counted = {}
    for name, steps, path in (("first", 3, None), ("second", 5, tmp_path / "a.ckpt"), ("whole", 5, None)):
        trainer = make_trainer(max_steps=steps, log_every_n_steps=1, limit_val_batches=0)
        trainer.fit(make_model(), make_mqar(curriculum=None), ckpt_path=path, weights_only=True)
        counted[name] = trainer.callback_metrics["trainer/tokens"]
        if path is None:
            trainer.save_checkpoint(tmp_path / "a.ckpt")
    assert counted["second"] == counted["whole"] == counted["first"] * 5 / 3


def batch_of(kind):
    tokens = torch.randint(0, 33, (1, 12))
    if kind == "packed":
        return {"tokens": tokens, "cu_seqlens": torch.tensor([0, 3, 12], dtype=torch.int32)}, slice(3, 12)
    if kind == "padded":
        return {"tokens": tokens, "padding_mask": torch.arange(12)[None] < 9}, slice(0, 9)
    if kind == "padded before":
        return {"tokens": tokens, "padding_mask": torch.arange(12)[None] > 8}, slice(9, 12)
    return {"tokens": tokens}, slice(0, 10)


@pytest.mark.parametrize("kind", ["packed", "padded", "padded before", "plain"])
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

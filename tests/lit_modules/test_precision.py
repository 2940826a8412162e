import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision

from lit_modules.callbacks import CalibrateThresholds


@pytest.mark.parametrize("router", ["learned", pytest.param("demand", marks=pytest.mark.slow)])
def test_float16_with_a_scaled_loss(make_trainer, make_model, make_mqar, router):
    """What 16-mixed is on a GPU; for a CPU Lightning takes bfloat16 instead unless it is given the plug-in."""
    model = make_model(router=router, budget={"name": "any", "allocate": False})
    plugin = MixedPrecision("16-mixed", "cpu")
    trainer = make_trainer(
        max_steps=4, plugins=plugin, gradient_clip_val=1.0, callbacks=[CalibrateThresholds(batches=2)]
    )
    before = model.decoder.head.weight.clone()
    trainer.fit(model, make_mqar())
    assert trainer.global_step == 4 and plugin.scaler.get_scale() > 0
    assert not torch.equal(model.decoder.head.weight, before)
    assert all(x.isfinite().all() for x in model.state_dict().values())

from types import SimpleNamespace

import torch

from lit_modules.data.curriculum import Curriculum


def run(curriculum, *, accuracy, budget, steps=None):
    """The stage that each step's batch is drawn at, for `steps` of a budget."""
    seen = []
    module = SimpleNamespace(log=lambda *args: None)
    strategy = SimpleNamespace(reduce=lambda accuracy, reduce_op: accuracy)
    for step in steps or range(budget):
        seen.append(curriculum.level)
        trainer = SimpleNamespace(global_step=step + 1, estimated_stepping_batches=budget, strategy=strategy)
        curriculum.on_train_batch_end(trainer, module, {"accuracy": torch.tensor(accuracy(step))}, None, step)
    return seen


def test_without_progress_stages_get_equal_shares():
    seen = run(Curriculum([4, 8, 16], advance_at=0.85), accuracy=lambda step: 0.0, budget=12)
    assert seen == [4] * 4 + [8] * 4 + [16] * 4


def test_accuracy_ends_a_stage_and_the_steps_it_leaves_are_shared_by_the_rest():
    accuracy = {1: 0.86, 2: 0.84}.get
    seen = run(Curriculum([4, 8, 16], advance_at=0.85), accuracy=lambda s: accuracy(s, 0.0), budget=12)
    assert seen == [4] * 2 + [8] * 5 + [16] * 5


def test_the_last_stage_keeps_all_that_is_left():
    seen = run(Curriculum([4, 8], advance_at=0.85), accuracy=lambda step: 1.0, budget=10)
    assert seen == [4] + [8] * 9


def test_a_restored_curriculum_goes_on_where_it_was():
    def learned(step):
        return float(step == 2)

    expected = run(Curriculum([4, 8, 16], advance_at=0.85), accuracy=learned, budget=12)
    for cut in (3, 5, 8):
        before, after = (Curriculum([4, 8, 16], advance_at=0.85) for _ in range(2))
        run(before, accuracy=learned, budget=12, steps=range(cut))
        after.load_state_dict(before.state_dict())
        assert run(after, accuracy=learned, budget=12, steps=range(cut, 12)) == expected[cut:]
        assert after.history() == [(0, 4), (3, 8), (8, 16)]


def test_the_state_of_older_versions_is_read():
    curriculum = Curriculum([4, 8, 16, 32], advance_at=0.85)
    curriculum.load_state_dict({"stage": 2, "began": 30})
    assert curriculum.level == 16
    assert run(curriculum, accuracy=lambda step: 0.0, budget=60, steps=range(43, 46)) == [16, 16, 32]


def test_an_endless_budget_leaves_only_accuracy_to_advance():
    curriculum = Curriculum([4, 8], advance_at=0.85)
    run(curriculum, accuracy=lambda step: 0.5, budget=float("inf"), steps=range(1000, 1010))
    assert curriculum.level == 4

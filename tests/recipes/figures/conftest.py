import pytest

from recipes.__main__ import main
from tests.recipes.conftest import cheap_ends

MQAR = (
    "--data mqar --data.num_pairs 4 --data.num_test 24 --data.num_validation 8 --data.batch_size 8 --model.dim 16"
    " --steps 2 --trainer.enable_progress_bar false"
)


@pytest.fixture(scope="session")
def recall(tmp_path_factory):
    """A folder with runs/gdn-mqar-1 and the newer runs/ham-mqar-1, whose router gives no finite scores."""
    folder = tmp_path_factory.mktemp("recall")
    with pytest.MonkeyPatch.context() as patch, cheap_ends():
        patch.chdir(folder)
        assert main(f"fit --mixer gdn {MQAR}".split()) == 0
        assert main(f"fit --mixer ham --router all {MQAR}".split()) == 0
    return folder

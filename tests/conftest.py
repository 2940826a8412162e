"""Property tests draw the same examples every time; `pytest --hypothesis-profile=explore` draws new and more ones.

Without a GPU, Triton kernels run in Triton's interpreter; it has to be switched on before they are imported.
"""

import gc
import os

import pytest
import torch
from hypothesis import HealthCheck, settings

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

    from tests import interpreter

    interpreter.speed_up()
    from kernels.short_convolution import triton_heads

    triton_heads.STEPS = 2  # of a few tokens most of eight blocks are empty, and the interpreter runs them all

common = {"deadline": None, "database": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("ci", derandomize=True, max_examples=6, **common)
settings.register_profile("explore", max_examples=150, **common)
settings.load_profile("ci")

# The workers of `pytest -n` share the cores, and threads that wait for those of another worker make some small
# operations a hundred times slower.
os.environ["OMP_NUM_THREADS"] = "1"  # of processes that tests start
torch.set_num_threads(1)


def pytest_collection_finish():
    """What was imported stays: it need not be looked through for garbage again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)  # `bench` and `compare` change it

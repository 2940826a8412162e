"""Property tests draw the same examples every time; `pytest --hypothesis-profile=explore` draws new and more ones.

Without a GPU, Triton kernels run in Triton's interpreter; it has to be switched on before they are imported.
"""

import os

import torch
from hypothesis import HealthCheck, settings

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

common = {"deadline": None, "database": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("ci", derandomize=True, max_examples=15, **common)
settings.register_profile("explore", max_examples=150, **common)
settings.load_profile("ci")

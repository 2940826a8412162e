import pytest
import torch


@pytest.fixture(autouse=True)
def seed():
    torch.default_generator.manual_seed(0)  # torch.manual_seed takes 3 ms: it notes for CUDA who called

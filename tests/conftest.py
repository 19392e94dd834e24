import os

import pytest
import torch

# The tensors of the tests are tiny: threads cost more than they give (133 s against 12 s for one
# file on two busy cores). Recipes that run in a subprocess inherit the variable.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seed() -> None:
    """Every test starts from the same random state, whichever ran before it."""
    torch.manual_seed(0)

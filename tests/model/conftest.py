"""One random float64 model of every tiny configuration."""

import pytest

from hymba_tune.model import HymbaForCausalLM
from tests.model.models import CONFIGURATIONS, random_model, tiny_config


@pytest.fixture(scope="module", params=CONFIGURATIONS)
def model(request: pytest.FixtureRequest) -> HymbaForCausalLM:
    return random_model(tiny_config(request.param))

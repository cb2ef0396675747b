"""Settings that cannot be are refused, all at once."""

import pytest

from compose.errors import IncompatibleError
from compose.routers.train_settings import TrainSettings


def test_every_problem_is_told_at_once() -> None:
    with pytest.raises(IncompatibleError) as error:
        TrainSettings(batch_size=0, log_every=0, precision="fp8", weight_decay=-1, max_grad_norm=0, betas=(1.0, 0.9))
    for words in ("batch_size", "log_every", "model, bf16", "weight_decay", "max_grad_norm", "betas"):
        assert words in str(error.value)


def test_settings_are_plain_values() -> None:
    plain = TrainSettings(seed=3).to_json()
    assert plain["seed"] == 3
    assert plain["sampling"]["batch"] == "mixed"

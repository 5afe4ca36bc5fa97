"""Learning rates and averages over time."""

import pytest
import torch

from eclosion.config.schema import OptimizerConfig
from eclosion.training.ema import warmed_up
from eclosion.training.optim import learning_rate


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup", [0, 7])
def test_learning_rates_agree_with_diffusers(schedule, warmup):
    """The schedules that the tutorial uses, as an independent implementation computes them."""
    from diffusers.optimization import get_scheduler

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=3e-4)
    name = "constant_with_warmup" if schedule == "constant" else schedule
    theirs = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=50)
    config = OptimizerConfig(learning_rate=3e-4, lr_schedule=schedule, lr_warmup_steps=warmup)
    for step in range(50):
        assert learning_rate(config, step, 50) == pytest.approx(theirs.get_last_lr()[0], rel=1e-9, abs=1e-15)
        optimizer.step()
        theirs.step()


def test_a_warm_up_longer_than_the_run_only_rises():
    config = OptimizerConfig(learning_rate=1.0, lr_schedule="cosine", lr_warmup_steps=100)
    rates = [learning_rate(config, step, 10) for step in range(10)]
    assert rates == [step / 100 for step in range(10)]


def test_the_warm_up_of_an_average_agrees_with_diffusers():
    from diffusers.training_utils import EMAModel

    theirs = EMAModel([torch.nn.Parameter(torch.zeros(1))], decay=0.99, use_ema_warmup=False)
    for step in range(1, 2000, 37):
        assert warmed_up(0.99, step) == pytest.approx(theirs.get_decay(step + 1), rel=1e-12)

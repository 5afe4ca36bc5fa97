"""Learning rates and averages over time."""

import pytest
import torch

from eclosion.config.schema import OptimizerConfig
from eclosion.training.ema import warmed_up
from eclosion.training.optim import AdamW, grad_norm, learning_rate


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


def _networks():
    """Twice the same parameters, the last of which never gets a gradient."""
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(shape, generator=generator) for shape in [(5, 3), (7,), (2, 3, 3, 3), (4,)]]
    return [[torch.nn.Parameter(value.clone()) for value in values] for _ in range(2)]


@pytest.mark.parametrize("divisor", [None, 3.7])
def test_adamw_gives_the_bits_of_torch(divisor):
    """Parameters and moments, over steps of which some parameters get no gradient, and gradients are divided."""
    ours, theirs = _networks()
    config = OptimizerConfig(learning_rate=1e-2, betas=(0.8, 0.97), epsilon=1e-7, weight_decay=0.1)
    adamw = AdamW(ours, config)
    peer = torch.optim.AdamW(theirs, lr=1e-2, betas=(0.8, 0.97), eps=1e-7, weight_decay=0.1, fused=True)
    generator = torch.Generator().manual_seed(1)
    for step in range(12):
        for a, b in zip(ours[:-1], theirs[:-1], strict=True):
            gradient = torch.randn(a.shape, generator=generator)
            a.grad, b.grad = gradient.clone(), gradient.clone()
        if step % 3 == 1:
            ours[1].grad = theirs[1].grad = None
        adamw.lr = peer.param_groups[0]["lr"] = 1e-2 / (step + 1)
        scale = None if divisor is None else torch.tensor(divisor)
        peer.grad_scale, peer.found_inf = scale, torch.zeros(())
        adamw.step(scale)
        peer.step()
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)
        for slot, value in peer.state[b].items():
            assert torch.equal(adamw.slots[a][slot], value), slot
    assert [int(adamw.slots[a]["step"]) for a in ours] == [12, 8, 12, 0]


def test_adamw_leaves_everything_alone_when_told_of_an_overflow():
    ours, _ = _networks()
    adamw = AdamW(ours, OptimizerConfig())
    for p in ours:
        p.grad = torch.full_like(p, float("nan"))
    before = [p.detach().clone() for p in ours]
    adamw.step(torch.ones(()), torch.ones(()))
    for p, value in zip(ours, before, strict=True):
        assert torch.equal(p, value)
        assert not any(slot.any() for slot in adamw.slots[p].values())


def test_the_gradient_norm_is_that_of_torch():
    ours, _ = _networks()
    for p in ours[:-1]:
        p.grad = p.detach().clone()
    assert torch.equal(grad_norm(ours), torch.nn.utils.get_total_norm([p.grad for p in ours[:-1]]))

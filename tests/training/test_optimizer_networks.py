"""What the optimizer does for single networks, and to which of their parameters."""

import pytest
import torch

from eclosion import ConfigError, train
from eclosion.config.changes import kind_of
from eclosion.config.schema import OptimizerConfig, RunConfig
from eclosion.training.distributed import World
from eclosion.training.optim import AdamW
from eclosion.training.state import Stage


def make_run(optimizer, **train_options):
    return RunConfig(
        output="runs/none",
        data={"source": "butterflies"},
        train={"batch_size": 4, "duration": "20 steps", **train_options},
        optimizer={"weight_decay": 0.1, **optimizer},
        ema={"decays": []},
    )


def weights_after(run, name, *, steps=4):
    """Weights of a small network after some steps on large gradients, and the learning rates it had."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.SiLU(), torch.nn.Linear(8, 1))
    stage = Stage(name, net, run, world=World(), device=torch.device("cpu"), fp16=False)
    rates = []
    for step in range(steps):
        x = torch.randn(4, 3, generator=torch.Generator().manual_seed(step))
        stage.accumulate(100 * stage.net(x).square().mean(dim=1), torch.ones(4))
        stage.update(step, 20)
        rates.append(stage.optimizer.lr)
    return torch.cat([p.detach().flatten() for p in net.parameters()]), rates


OWN = {"learning_rate": 3e-2, "weight_decay": 0.4, "lr_warmup_steps": 3, "max_grad_norm": 0.2}


def test_a_network_with_options_of_its_own_trains_as_if_all_had_them():
    """Against a run in which they are the options of every network."""
    several = make_run({"learning_rate": 1e-3, "networks": {"unet_1": OWN}})
    alone = make_run({k: v for k, v in OWN.items() if k != "max_grad_norm"}, max_grad_norm=0.2)
    plain = make_run({"learning_rate": 1e-3})
    for run, other, name in ((several, alone, "unet_1"), (several, plain, "unet_0")):
        (ours, rates), (theirs, wanted) = weights_after(run, name), weights_after(other, name)
        assert rates == wanted
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("option", OWN)
def test_each_option_of_a_network_changes_what_it_learns(option):
    # a warm-up begins at rate 0, and Adam forgets the scale of its gradients, though not at once
    plain, _ = weights_after(make_run({"learning_rate": 1e-3}), "unet_1")
    other, _ = weights_after(make_run({"learning_rate": 1e-3, "networks": {"unet_1": {option: OWN[option]}}}), "unet_1")
    assert not torch.equal(plain, other)


def test_a_network_may_be_the_one_whose_gradients_are_left_as_they_are():
    off = make_run({"networks": {"unet_1": {"max_grad_norm": "off"}}}, max_grad_norm=0.1)
    free = make_run({}, max_grad_norm=None)
    assert torch.equal(weights_after(off, "unet_1")[0], weights_after(free, "unet_1")[0])
    assert not torch.equal(weights_after(off, "unet_1")[0], weights_after(off, "unet_0")[0])


@pytest.mark.parametrize("divisor", [None, 3.7])
def test_matrices_alone_decay_as_in_torch_with_two_groups(divisor):
    """Bit for bit, over steps in which some parameters get no gradient."""
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(shape, generator=generator) for shape in [(5, 3), (7,), (2, 3, 3, 3), (4,), (1, 6)]]
    ours, theirs = ([torch.nn.Parameter(value.clone()) for value in values] for _ in range(2))
    adamw = AdamW(ours, OptimizerConfig(learning_rate=1e-2, weight_decay=0.5, decay="matrices"))
    groups = [
        {"params": [p for p in theirs if p.ndim >= 2], "weight_decay": 0.5},
        {"params": [p for p in theirs if p.ndim < 2], "weight_decay": 0.0},
    ]
    peer = torch.optim.AdamW(groups, lr=1e-2, fused=True)
    for step in range(6):
        for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            gradient = torch.randn(a.shape, generator=generator)
            a.grad, b.grad = (None, None) if (step, i) in {(2, 1), (3, 0)} else (gradient.clone(), gradient.clone())
        scale = None if divisor is None else torch.tensor(divisor)
        peer.grad_scale, peer.found_inf = scale, torch.zeros(())
        adamw.step(scale)
        peer.step()
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)
    assert [int(adamw.slots[a]["step"]) for a in ours] == [5, 5, 6, 6, 6]


def test_a_network_that_there_is_not_is_refused_with_the_one_that_was_meant(make_config, tmp_path):
    config = make_config(tmp_path / "run", optimizer={"networks": {"unte": {"learning_rate": 1e-3}}})
    with pytest.raises(
        ConfigError, match=r"optimizer.networks: 'unte' is no network of this task. Did you mean 'unet'"
    ):
        train(config)


def test_options_of_single_networks_may_change_when_a_run_goes_on_if_the_user_says_so():
    for key in ("optimizer.decay", "optimizer.networks", "optimizer.networks.unet_1.learning_rate"):
        assert kind_of(key) == "schedule"
    assert kind_of("validate.every") == kind_of("checkpoint.keep_best") == "free"

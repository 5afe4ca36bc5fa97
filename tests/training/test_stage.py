"""One step of one network: clipping, AdamW, averages, and what happens when something is not finite."""

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from eclosion.config.schema import RunConfig
from eclosion.errors import CheckpointError
from eclosion.training.distributed import World
from eclosion.training.state import Stage

CPU = torch.device("cpu")


def make_run(**train):
    return RunConfig(
        output="runs/none",
        data={"source": "butterflies"},
        train={"batch_size": 4, "max_grad_norm": 0.1, **train},
        optimizer={"learning_rate": 1e-2, "weight_decay": 0.1},
        ema={"decays": [0.9, 0.5], "warmup": False},
    )


def make_stage(run=None, *, fp16=False, seed=0):
    torch.manual_seed(seed)
    net = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.SiLU(), torch.nn.Linear(8, 1))
    return Stage("unet", net, run or make_run(), world=World(), device=CPU, fp16=fp16)


def losses_of(stage, x):
    return stage.net(x).square().mean(dim=1)


def one_step(stage, x, *, step=0, num_steps=10):
    stage.accumulate(losses_of(stage, x), torch.ones(len(x)))
    stage.update(step, num_steps)


def inputs(seed=1):
    return torch.randn(4, 3, generator=torch.Generator().manual_seed(seed))


def test_a_step_is_clipping_then_adamw_then_the_averages():
    """Against torch's own clip_grad_norm_, an unfused AdamW, and the definition of the average."""
    stage = make_stage()
    theirs = copy.deepcopy(stage.module)
    averages = [copy.deepcopy(stage.module), copy.deepcopy(stage.module)]
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=1e-2, weight_decay=0.1, foreach=False)
    for step in range(5):
        one_step(stage, inputs(step), step=step)
        optimizer.zero_grad()
        theirs(inputs(step)).square().mean().backward()
        norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.1)
        optimizer.step()
        torch.testing.assert_close(stage.norm, norm)
        for average, decay in zip(averages, (0.9, 0.5), strict=True):
            for a, w in zip(average.parameters(), theirs.parameters(), strict=True):
                a.data = decay * a.data + (1 - decay) * w.data
    for ours, w in zip(stage.module.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(ours, w, rtol=1e-4, atol=1e-6)
    for ema, average in zip(stage.emas, averages, strict=True):
        for ours, a in zip(ema.net.parameters(), average.parameters(), strict=True):
            torch.testing.assert_close(ours, a, rtol=1e-4, atol=1e-6)


def test_a_skipped_image_has_no_gradient_and_does_not_count_in_the_loss():
    whole, part = make_stage(), make_stage()
    x = inputs()
    losses = losses_of(whole, x)
    (losses[:3].sum() / 4).backward()
    part.accumulate(losses_of(part, x), torch.tensor([1.0, 1, 1, 0]))
    for a, b in zip(whole.module.parameters(), part.module.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)
    part.update(0, 10)
    assert float(part.loss_count) == 3
    assert float(part.loss_sum) == pytest.approx(float(losses[:3].detach().sum()))


def poisoned(stage):
    """A step whose loss is not finite."""
    x = inputs()
    x[2, 0] = float("nan")
    one_step(stage, x, step=7)


def everything(stage):
    return {k: v.clone() for file in stage.tensors().values() for k, v in file.items()}


@pytest.mark.parametrize("device", ["cpu", "as on a GPU"])
def test_a_step_that_is_not_finite_touches_neither_weights_nor_optimizer_nor_averages(device):
    stage = make_stage()
    one_step(stage, inputs())
    if device != "cpu":
        stage.device = torch.device("cuda")  # decides only whether the host looks at the flag
    before = everything(stage)
    poisoned(stage)
    after = everything(stage)
    assert int(stage.failed_at) == 7
    for name, value in before.items():
        assert torch.equal(value, after[name]), name


def test_after_a_failure_nothing_is_updated_until_someone_looks():
    stage = make_stage()
    stage.device = torch.device("cuda")
    one_step(stage, inputs())
    poisoned(stage)
    before = everything(stage)
    one_step(stage, inputs(5), step=8)
    for name, value in everything(stage).items():
        assert torch.equal(value, before[name]), name
    assert int(stage.failed_at) == 7


class CountReads(TorchDispatchMode):
    """Counts how often a tensor's value is read on the host."""

    reads = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default):
            self.reads += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("fp16", [False, True])
def test_a_step_on_a_device_reads_no_scalar(fp16):
    stage = make_stage(fp16=fp16)
    one_step(stage, inputs())
    stage.device = torch.device("cuda")
    with CountReads() as counter:
        one_step(stage, inputs(3), step=1)
        assert counter.reads == 0
        float(stage.norm)  # the control: a read is seen
    assert counter.reads == 1


def test_the_device_path_computes_what_the_host_path_does():
    host, device = make_stage(), make_stage()
    device.device = torch.device("cuda")
    for step in range(4):
        one_step(host, inputs(step), step=step)
        one_step(device, inputs(step), step=step)
    for name, value in everything(host).items():
        torch.testing.assert_close(value, everything(device)[name], rtol=1e-6, atol=1e-7)


def test_a_float16_overflow_is_skipped_and_halves_the_scale():
    stage = make_stage(fp16=True)
    one_step(stage, inputs())
    before, scale = everything(stage), float(stage.scale.value)
    for p in stage.parameters:
        p.register_hook(lambda g: g * float("inf"))
    one_step(stage, inputs(2), step=1)
    after = everything(stage)
    assert float(stage.scale.value) == scale / 2
    assert int(stage.failed_at) == -1
    for name, value in before.items():
        if not name.startswith("loss_scale"):
            assert torch.equal(value, after[name]), name


def test_the_float16_scale_does_not_change_the_step():
    plain, scaled = make_stage(), make_stage(fp16=True)
    one_step(plain, inputs())
    one_step(scaled, inputs())
    for a, b in zip(plain.module.parameters(), scaled.module.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_the_float16_scale_doubles_after_two_thousand_good_steps():
    stage = make_stage(fp16=True)
    stage.scale.good_steps.fill_(1998)
    before = float(stage.scale.value)
    one_step(stage, inputs())
    assert float(stage.scale.value) == before
    one_step(stage, inputs(), step=1)
    assert float(stage.scale.value) == 2 * before


def test_state_goes_round_trip():
    stage, other = make_stage(fp16=True), make_stage(fp16=True, seed=9)
    for step in range(3):
        one_step(stage, inputs(step), step=step)
    saved = {f: {k: v.clone() for k, v in t.items()} for f, t in stage.tensors().items()}
    assert set(saved) == {"unet", "unet.ema", "unet.ema-0.5", "unet.optimizer"}
    other.load(saved)
    for s in (stage, other):
        one_step(s, inputs(3), step=3)
    for name, value in everything(stage).items():
        assert torch.equal(value, everything(other)[name]), name


def test_a_checkpoint_that_does_not_fit_is_refused_by_name():
    stage = make_stage()
    one_step(stage, inputs())
    saved = {f: dict(t) for f, t in stage.tensors().items()}
    saved["unet"]["0.weight"] = torch.zeros(8, 4)
    del saved["unet"]["2.bias"]
    saved["unet"]["extra"] = torch.zeros(1)
    with pytest.raises(CheckpointError) as error:
        make_stage().load(saved)
    assert str(error.value) == (
        "unet does not fit this run: 0.weight is [8, 4], wanted [8, 3]; 2.bias is missing; extra is not known."
    )


def test_a_frozen_network_does_not_move():
    stage = make_stage(make_run(freeze=["unet"]))
    assert not stage.trained
    assert not any(p.requires_grad for p in stage.module.parameters())
    assert not stage.module.training
    assert "unet" in stage.tensors()


def test_what_a_network_froze_itself_stays_as_it_is():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.SiLU(), torch.nn.Linear(8, 1))
    net[0].weight.requires_grad_(False)
    stage = Stage("unet", net, make_run(), world=World(), device=CPU, fp16=False)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    one_step(stage, inputs())
    moved = {name for name, p in net.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"0.bias", "2.weight", "2.bias"}
    assert {name.rpartition(".")[0] for name in stage.tensors()["unet.optimizer"]} == moved
    assert torch.equal(stage.emas[0].net[0].weight, before["0.weight"])

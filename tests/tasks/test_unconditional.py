"""The task of the tutorial: what it draws, what it compares, what it samples."""

import pytest
import torch
from torch.nn.functional import mse_loss

from eclosion.data.batch import Batch
from eclosion.errors import ConfigError, DataError
from eclosion.models.diffusers import DiffusersModel
from eclosion.registry import build
from eclosion.rng import generator
from eclosion.tasks.task import DataFacts
from eclosion.tasks.unconditional import Unconditional

SIZE = (16, 16)
TINY = DiffusersModel(
    preset=None,
    options={
        "block_out_channels": [16, 16],
        "down_block_types": ["DownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "UpBlock2D"],
        "norm_num_groups": 4,
        "layers_per_block": 1,
    },
)
CLASSES = ("red", "blue", "green")


def make_task(class_names=(), **options):
    torch.manual_seed(0)
    return Unconditional(model=TINY, **options).build(DataFacts(size=SIZE, class_names=class_names))


def make_batch(n=4, labels=False):
    image = torch.rand(n, 3, *SIZE, generator=torch.Generator().manual_seed(0)) * 2 - 1
    fields = {"image": image, **({"label": torch.arange(n) % 3} if labels else {})}
    return Batch(positions=range(n), weight=torch.ones(n), fields=fields)


def rngs(n=4, start=0):
    return [generator(0, "loss", "unet", p) for p in range(start, start + n)]


def test_the_loss_is_the_tutorials():
    """Written out as the tutorial has it, with diffusers' scheduler."""
    from diffusers import DDPMScheduler

    task = make_task(noise_schedule="linear", prediction_type="epsilon")
    batch = make_batch()
    drawn = task.draw("unet", batch, rngs())
    noisy = DDPMScheduler(num_train_timesteps=1000).add_noise(batch["image"], drawn.noise, drawn.t)
    with torch.no_grad():
        losses = task.loss("unet", batch, drawn)
        theirs = mse_loss(task.nets["unet"](noisy, drawn.t, return_dict=False)[0], drawn.noise)
    assert losses.shape == (4,)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses.mean(), theirs, rtol=1e-4, atol=1e-5)


def test_what_is_drawn_for_an_image_depends_on_its_own_generator():
    task = make_task(CLASSES, class_conditional=True, class_dropout=0.5)
    whole = task.draw("unet", make_batch(4, labels=True), rngs(4))
    batch = make_batch(4, labels=True)
    last = Batch(positions=[3], weight=torch.ones(1), fields={k: v[3:] for k, v in batch.fields.items()})
    alone = task.draw("unet", last, rngs(1, start=3))
    assert whole.t[3] == alone.t[0]
    assert torch.equal(whole.noise[3], alone.noise[0])
    assert whole.label[3] == alone.label[0]


def test_classes_are_hidden_as_often_as_asked():
    task = make_task(CLASSES, class_conditional=True, class_dropout=0.25)
    batch = make_batch(2000, labels=True)
    small = Batch(batch.positions, batch.weight, {"image": torch.zeros(2000, 3, 1, 1), "label": batch["label"]})
    label = task.draw("unet", small, rngs(2000)).label
    hidden = label == len(CLASSES)
    # four standard deviations of a binomial
    assert abs(float(hidden.float().mean()) - 0.25) < 4 * (0.25 * 0.75 / 2000) ** 0.5
    assert torch.equal(label[~hidden], batch["label"][~hidden])


def test_validation_draws_what_training_draws_and_hides_no_class():
    task = make_task(CLASSES, class_conditional=True, class_dropout=1.0)
    batch = make_batch(labels=True)
    ours, theirs = task.validation_draw("unet", batch, rngs()), task.draw("unet", batch, rngs())
    assert torch.equal(ours.t, theirs.t)
    assert torch.equal(ours.noise, theirs.noise)
    assert ours.label.tolist() == batch["label"].tolist()
    assert theirs.label.tolist() == [3, 3, 3, 3]


def test_a_list_of_one_guidance_and_one_sampler_is_that_of_the_one_network():
    task = make_task(CLASSES, class_conditional=True)
    conditions, ddim = task.conditions([0, 1]), build("samplers", {"name": "ddim", "num_inference_steps": 2})
    one = task.sample(conditions, rngs(2), sampler=ddim, guidance_scale=2.0)
    assert torch.equal(one, task.sample(conditions, rngs(2), sampler=[ddim], guidance_scale=[2.0]))
    assert task.samplers(ddim) == [ddim]
    with pytest.raises(ConfigError, match="guidance_scale has 2 numbers"):
        task.check_sampling(ddim, [1, 2])


def test_the_class_changes_the_loss():
    task = make_task(CLASSES, class_conditional=True, class_dropout=0.0)
    batch = make_batch(labels=True)
    drawn = task.draw("unet", batch, rngs())
    with torch.no_grad():
        losses = task.loss("unet", batch, drawn)
        other = Batch(batch.positions, batch.weight, {**batch.fields, "label": (batch["label"] + 1) % 3})
        moved = task.loss("unet", other, task.draw("unet", other, rngs()))
    assert not torch.allclose(losses, moved)


def test_without_classes_labels_are_not_looked_at():
    task = make_task(CLASSES)
    assert task.num_classes == 0
    assert task.draw("unet", make_batch(labels=True), rngs()).label is None


def test_guidance_of_two_goes_twice_as_far_from_the_null_class():
    """One step of DDIM from pure noise is the estimate itself, which is affine in the network's output."""
    task = make_task(CLASSES, class_conditional=True, clip_sample=False)
    one = build("samplers", {"name": "ddim", "num_inference_steps": 1})
    conditions = task.conditions([0, 1])

    def images(scale):
        return task.sample(conditions, rngs(2), sampler=one, guidance_scale=scale)

    # guidance_scale 0 is the null class alone; clamping to [-1, 1] must not hide the difference
    zero, plain, double = images(0.0), images(1.0), images(2.0)
    inside = (zero.abs() < 0.99) & (plain.abs() < 0.99) & (double.abs() < 0.99)
    assert inside.float().mean() > 0.05
    torch.testing.assert_close((double - zero)[inside], 2 * (plain - zero)[inside], rtol=1e-3, atol=1e-4)
    assert not torch.allclose(zero, plain)


def test_previews_go_through_the_classes_in_turn():
    task = make_task(CLASSES, class_conditional=True)
    assert task.conditions(range(5))["label"].tolist() == [0, 1, 2, 0, 1]
    told = Batch(range(2), torch.ones(2), {"label": torch.tensor([2, 2])})
    assert task.conditions(range(2), told)["label"].tolist() == [2, 2]
    assert "label" not in make_task().conditions(range(2), told)


def test_other_networks_can_take_the_place_of_its_own():
    task, other = make_task(), make_task()
    replaced = task.with_nets(other.nets)
    assert replaced.nets["unet"] is other.nets["unet"]
    assert task.nets["unet"] is not other.nets["unet"]


def test_classes_need_data_that_has_them():
    with pytest.raises(ConfigError, match="the data source has no labels"):
        make_task(class_conditional=True)
    task = make_task(CLASSES, class_conditional=True)
    with pytest.raises(DataError, match="needs 'label'"):
        task.draw("unet", make_batch(labels=False), rngs())


def test_the_noise_of_levels_that_end_in_noise_alone_is_not_learned():
    schedule = {"name": "cosine", "rescale_zero_terminal_snr": True}
    assert make_task(noise_schedule=schedule, prediction_type="v_prediction").schedule.zero_terminal_snr
    with pytest.raises(ConfigError, match="last level is noise alone"):
        make_task(noise_schedule=schedule, prediction_type="epsilon")


@pytest.mark.parametrize(("schedule", "kind"), [("cosine", "flow"), ("rectified_flow", "epsilon")])
def test_rectified_flow_and_its_prediction_go_together(schedule, kind):
    with pytest.raises(ConfigError, match="do not go together"):
        make_task(noise_schedule=schedule, prediction_type=kind)


def test_a_network_that_follows_embeddings_is_refused():
    with pytest.raises(ConfigError, match="unclip_unet follows embeddings"):
        build("tasks", {"name": "unconditional", "model": "unclip_unet"}).build(DataFacts(size=(16, 16)))

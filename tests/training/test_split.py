"""How a batch is split changes neither what is drawn nor the loss of an image."""

import pytest
import torch

from eclosion.config.load import load
from eclosion.data.loader import Loader
from eclosion.tasks.task import DataFacts
from eclosion.training.drawing import draw


def losses_by_position(config, *, micro_batch_size, world_size, steps=3):
    run = load({**config, "train": {**config["train"], "micro_batch_size": micro_batch_size}}).run
    samples = run.data.source.open()
    torch.manual_seed(0)
    task = run.task.build(DataFacts(size=run.data.size, class_names=samples.class_names))
    task.nets["unet"].eval()  # dropout is keyed by step and not by image
    found = {}
    for rank in range(world_size):
        loader = Loader(
            samples,
            run.data,
            seed=run.seed,
            batch_size=run.train.batch_size,
            micro_batch_size=micro_batch_size,
            rank=rank,
            world_size=world_size,
        )
        for step, micro_batches in zip(range(steps), loader.steps(0), strict=False):
            for i, batch in enumerate(micro_batches):
                drawn = draw(task, "unet", batch, run.seed, step, i, rank)
                with torch.no_grad():
                    losses = task.loss("unet", batch, drawn)
                for k, p in enumerate(batch.positions):
                    found[p] = (drawn.t[k], drawn.noise[k], batch["image"][k], losses[k])
    return [found[p] for p in sorted(found)]


@pytest.mark.parametrize(("micro", "world"), [(4, 1), (2, 1), (None, 2), (2, 2), (1, 4)])
def test_every_split_of_a_batch_gives_the_same_images_noise_and_losses(make_config, tmp_path, micro, world):
    config = make_config(tmp_path / "run")
    whole = losses_by_position(config, micro_batch_size=None, world_size=1)
    split = losses_by_position(config, micro_batch_size=micro, world_size=world)
    assert len(whole) == len(split) == 24
    for (t, noise, image, loss), (t2, noise2, image2, loss2) in zip(whole, split, strict=True):
        assert t == t2
        assert torch.equal(noise, noise2)
        assert torch.equal(image, image2)
        # a convolution may add in another order for another batch size
        torch.testing.assert_close(loss, loss2, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("micro", [4, 2])
def test_accumulation_gives_the_gradient_of_the_whole_batch(make_config, tmp_path, micro):
    """After one step of plain descent the weights must agree, whatever the split."""
    from safetensors.torch import load_file

    from eclosion import train

    def weights(name, micro_batch_size):
        config = make_config(
            tmp_path / name,
            train={"duration": "1 steps", "micro_batch_size": micro_batch_size},
            optimizer={"lr_warmup_steps": 0, "lr_schedule": "constant"},
            sample={"num_images": 0},
        )
        config["task"]["model"]["options"]["dropout"] = 0.0
        run = train(config)
        return load_file(run / "checkpoints" / "step-00000001" / "unet.optimizer.safetensors")

    whole, split = weights("whole", None), weights("split", micro)
    moments = [name for name in whole if name.endswith(".exp_avg")]
    assert moments
    for name in moments:
        torch.testing.assert_close(whole[name], split[name], rtol=1e-3, atol=1e-7)

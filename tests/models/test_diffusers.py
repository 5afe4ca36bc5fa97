"""Networks of diffusers by name: shapes, gradients, state, and options that are refused."""

import pytest
import torch
from safetensors.torch import load, save

from eclosion.errors import ConfigError
from eclosion.models.diffusers import PRESETS, DiffusersModel

NETS = {
    "tiny": (DiffusersModel(preset="tiny"), 32, 0),
    "tiny, with classes": (DiffusersModel(preset="tiny"), 32, 4),
    "tiny, not square": (DiffusersModel(preset="tiny"), (16, 32), 0),
    "small": (DiffusersModel(preset="small"), 16, 0),
    "transformer": (
        DiffusersModel(
            class_name="DiTTransformer2DModel",
            options={"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2, "patch_size": 4},
        ),
        16,
        5,
    ),
}


@pytest.mark.parametrize("name", NETS)
def test_a_network_keeps_shape_has_gradients_everywhere_and_goes_round_trip(name):
    part, size, classes = NETS[name]
    height, width = (size, size) if isinstance(size, int) else size
    torch.manual_seed(0)
    net = part.build(size=(height, width), num_classes=classes)
    x = torch.randn(2, 3, height, width)
    labels = {"class_labels": torch.tensor([0, classes - 1])} if classes else {}
    out = net(x, torch.tensor([3, 900]), **labels, return_dict=False)[0]
    assert out.shape == x.shape
    (out - torch.randn_like(out)).square().mean().backward()
    without = [n for n, p in net.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()]
    assert without == []

    torch.manual_seed(1)
    other = part.build(size=(height, width), num_classes=classes)
    other.load_state_dict(load(save(net.state_dict())))
    net.eval(), other.eval()
    with torch.no_grad():
        args = (x, torch.tensor([3, 900]))
        assert torch.equal(net(*args, **labels).sample, other(*args, **labels).sample)


@pytest.mark.parametrize(("preset", "millions"), [("tiny", 2.7), ("small", 15.7), ("tutorial", 113.7)])
def test_the_presets_have_the_sizes_that_are_told(preset, millions):
    assert set(PRESETS) == {"tiny", "small", "tutorial"}
    with torch.device("meta"):
        net = DiffusersModel(preset=preset).build(size=(64, 64))
    assert sum(p.numel() for p in net.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)


def test_an_unknown_class_is_refused_with_the_nearest():
    with pytest.raises(ConfigError, match=r"diffusers has no model 'UNet2dModel'. Did you mean 'UNet2DModel'\?"):
        DiffusersModel(class_name="UNet2dModel").build(size=(32, 32))


@pytest.mark.parametrize("name", ["DDPMPipeline", "DDPMScheduler", "__version__", "utils"])
def test_what_is_no_network_is_refused(name):
    with pytest.raises(ConfigError, match="diffusers has no model"):
        DiffusersModel(class_name=name).build(size=(32, 32))


def test_every_unknown_option_is_named_with_the_nearest():
    with pytest.raises(ConfigError) as error:
        DiffusersModel(options={"dropuot": 0.1, "layer_per_block": 2}).build(size=(32, 32))
    first, second = error.value.problems
    assert first.startswith("task.model.options.dropuot is not an option of UNet2DModel. Did you mean 'dropout'?")
    assert "Did you mean 'layers_per_block'?" in second


def test_options_that_do_not_fit_together_are_refused_in_one_line():
    with pytest.raises(ConfigError, match=r"task.model: UNet2DModel refuses its options: ") as error:
        DiffusersModel(options={"block_out_channels": [32, 64]}).build(size=(32, 32))
    assert "\n" not in str(error.value)


def test_what_the_data_decides_cannot_be_set_otherwise():
    with pytest.raises(ConfigError, match=r"task.model.options.sample_size is 64, and the data has 32. Leave it out."):
        DiffusersModel(options={"sample_size": 64}).build(size=(32, 32))


def test_classes_for_a_network_without_them_are_refused():
    part = DiffusersModel(class_name="UNet1DModel")
    with pytest.raises(ConfigError, match="UNet1DModel has no class embeddings"):
        part.build(size=(32, 32), num_classes=3)

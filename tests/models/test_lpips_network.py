"""LPIPS: the distances that the packages lpips and torchmetrics give with the same weights, which a test makes."""

import dataclasses
import hashlib
import importlib.util
from pathlib import Path

import pytest
import torch

from eclosion.errors import ConfigError, DataError, EnvironmentProblem, MissingExtraError
from eclosion.models import lpips
from eclosion.models.lpips import BACKBONES, CHUNK, lpips_network
from eclosion.models.weight_files import Published

# Ours -> torchvision's
NAMES = {"alex": "alexnet", "vgg": "vgg16", "squeeze": "squeezenet1_1"}
INSTALLED = {package: spec for package in lpips.PACKAGES if (spec := importlib.util.find_spec(package))}

pytestmark = pytest.mark.skipif(not INSTALLED, reason="no package with the heads is installed")


@pytest.fixture(scope="module")
def backbones(tmp_path_factory):
    """Files as torchvision publishes them, of its networks with random weights and without their last layers."""
    torchvision = pytest.importorskip("torchvision")
    root = tmp_path_factory.mktemp("backbones")
    drawn = torch.Generator().manual_seed(0)
    for net_type, name in NAMES.items():
        with torch.device("meta"):
            net = getattr(torchvision.models, name)()
        tensors = {
            name: torch.empty(like.shape).normal_(0, _spread(like), generator=drawn)
            for name, like in net.state_dict().items()
            if name.startswith("features.")
        }
        torch.save(tensors, root / f"{net_type}.pth")
    return root


def _spread(like):
    """What keeps features about as large from layer to layer."""
    return (2 / like[0].numel()) ** 0.5 if like.ndim == 4 else 0.1


@pytest.fixture
def alex(backbones):
    return lpips_network("alex", backbones / "alex.pth")


def pairs(number=3, size=(40, 52), seed=0):
    """Images, and others that are the more unlike them the later they come: each [B, 3, H, W] in [-1, 1]."""
    drawn = torch.Generator().manual_seed(seed)
    image, noise = torch.rand(2, number, 3, *size, generator=drawn) * 2 - 1
    share = torch.arange(1.0, number + 1).reshape(-1, 1, 1, 1) / (number + 1)
    return image, image * (1 - share) + noise * share


def with_weights(theirs, path):
    """A network of the same kind from another package, which calls its backbone net.slice<k>.<layer>."""
    tensors = torch.load(path, weights_only=True)
    for name, own in theirs.net.state_dict().items():
        own.copy_(tensors["features." + name.removeprefix("slices.").partition(".")[2]])
    return theirs


# what comes out


@pytest.mark.parametrize("net_type", ["squeeze", "alex", pytest.param("vgg", marks=pytest.mark.slow)])  # half a GB
@pytest.mark.filterwarnings("ignore:.*pretrained:UserWarning", "ignore:.*weight enum:UserWarning")
def test_distances_are_those_of_the_package_lpips(backbones, net_type):
    package = pytest.importorskip("lpips")
    path = backbones / f"{net_type}.pth"
    with torch.random.fork_rng():
        theirs = with_weights(package.LPIPS(net=net_type, pnet_rand=True, verbose=False), path)
    made, original = pairs()
    wanted = theirs(made, original).flatten()
    found = lpips_network(net_type, path)(made, original)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=0)
    assert wanted[0] > 1e-3
    assert (wanted.diff() > 0).all()  # the negative control: these weights tell pairs apart


@pytest.mark.slow  # its library takes seconds to load
@pytest.mark.parametrize("net_type", NAMES)
def test_distances_are_those_of_torchmetrics_also_where_there_is_next_to_nothing_to_see(backbones, net_type, tmp_path):
    theirs = pytest.importorskip("torchmetrics.functional.image.lpips")
    path = tmp_path / "faint.pth"
    tensors = torch.load(backbones / f"{net_type}.pth", weights_only=True)
    torch.save({name: tensor * (tensor.ndim == 4) * 0.1 for name, tensor in tensors.items()}, path)  # by each layer
    with torch.random.fork_rng():
        net = with_weights(theirs._LPIPS(net=net_type, pnet_rand=True), path)
    made, original = pairs()
    found = lpips_network(net_type, path)(made, original)
    torch.testing.assert_close(found, net(made, original).flatten(), rtol=1e-6, atol=0)


def test_an_image_is_at_no_distance_from_itself_and_as_far_one_way_as_the_other(alex):
    made, original = pairs()
    assert torch.equal(alex(made, made), torch.zeros(3))
    torch.testing.assert_close(alex(made, original), alex(original, made))


def test_a_distance_does_not_depend_on_what_comes_with_a_pair_or_on_the_precision_of_a_run(alex):
    number = 2 * CHUNK + 3
    made, original = pairs(number)
    through = []
    alex._net.register_forward_pre_hook(lambda _net, given: through.append(len(given[0])))
    wanted = alex(made, original)
    assert wanted.shape == (number,)
    assert torch.equal(torch.cat([alex(*one) for one in zip(made.split(1), original.split(1), strict=True)]), wanted)
    assert torch.equal(alex(made.flip(0), original.flip(0)).flip(0), wanted)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(alex(made, original), wanted)
    assert wanted.dtype == torch.float32
    assert set(through) == {CHUNK}  # matrix products of one shape: else other machines add in another order
    assert alex(made[:0], original[:0]).shape == (0,)


@pytest.mark.parametrize("net_type", NAMES)
def test_the_smallest_image_is_what_the_network_can_just_see(backbones, net_type):
    network, smallest = lpips_network(net_type, backbones / f"{net_type}.pth"), BACKBONES[net_type].smallest
    assert network(*pairs(1, (smallest, 80))).isfinite().all()
    with pytest.raises(RuntimeError):  # of torch, without the check
        network._net(*pairs(1, (smallest - 1, 80)))
    with pytest.raises(DataError, match=rf"^lpips: images are 80x{smallest - 1}, and net_type={net_type} sees none of"):
        network(*pairs(1, (smallest - 1, 80)))


def test_images_of_two_sizes_are_refused(alex):
    with pytest.raises(DataError, match=r"images are 52x40 and their originals 40x52, and must be of one size\.$"):
        alex(pairs()[0], pairs(size=(52, 40))[1])


# weights


def test_the_names_of_all_weights_are_torchvisions():
    models = pytest.importorskip("torchvision.models")
    for net_type, name in NAMES.items():
        with torch.device("meta"):
            ours = torch.nn.Sequential(*BACKBONES[net_type].layers()).state_dict(prefix="features.")
            theirs = getattr(models, name)().state_dict()
        assert {key: tensor.shape for key, tensor in theirs.items() if key.startswith("features.")} == {
            key: tensor.shape for key, tensor in ours.items()
        }
        urls = [str(one.url) for one in models.get_model_weights(name)]
        assert BACKBONES[net_type].weights.url in urls
        assert f"-{BACKBONES[net_type].weights.sha256}.pth" in BACKBONES[net_type].weights.url


def test_the_heads_of_each_package_are_the_ones_that_are_known():
    for package, spec in INSTALLED.items():
        for net_type, backbone in BACKBONES.items():
            file = Path(spec.origin).parent / lpips.PACKAGES[package].format(net_type)
            assert hashlib.sha256(file.read_bytes()).hexdigest() == backbone.heads


def test_it_says_whose_weights_it_has(backbones, alex, tmp_path, monkeypatch):
    digest = hashlib.sha256((backbones / "alex.pth").read_bytes()).hexdigest()
    assert (alex.weights, alex.resize, alex.net_type) == (digest[:16], "none", "alex")
    assert alex.notes == (
        "The weights of lpips are those of alex.pth, and not the standard ones: these scores compare with no published "
        "ones.",
    )
    monkeypatch.setitem(BACKBONES, "alex", _known(BACKBONES["alex"], digest))
    assert lpips_network("alex", backbones / "alex.pth").notes == ()
    heads = {f"lin{index}.model.1.weight": torch.ones(1, width, 1, 1) for index, width in enumerate(_widths("alex"))}
    torch.save(heads, tmp_path / "heads.pth")
    other = lpips_network("alex", backbones / "alex.pth", heads=tmp_path / "heads.pth")
    assert "The heads of lpips are those of heads.pth" in other.notes[0]
    assert other.weights == alex.weights
    assert other.fingerprint != alex.fingerprint == lpips_network("alex", backbones / "alex.pth").fingerprint


def _known(backbone, digest):
    return dataclasses.replace(backbone, weights=Published("http://127.0.0.1:9/alexnet.pth", digest))


def _widths(net_type):
    return BACKBONES[net_type].taps.values()


def test_weights_are_found_where_torch_keeps_downloads_and_else_told_where_to_put(backbones, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    digest = hashlib.sha256((backbones / "alex.pth").read_bytes()).hexdigest()
    monkeypatch.setitem(BACKBONES, "alex", _known(BACKBONES["alex"], digest))
    with pytest.raises(EnvironmentProblem) as caught:
        lpips_network("alex")
    said = str(caught.value)
    assert said.startswith(f"lpips with net_type=alex: alexnet.pth is not in {tmp_path}/hub/checkpoints and cannot be")
    assert said.endswith(
        "or give its path as weights. Meanwhile the metric clip_score with against=original and "
        "extractor=efficientnet_lite0 compares them."
    )
    kept = tmp_path / "hub" / "checkpoints" / "alexnet.pth"
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.symlink_to(backbones / "alex.pth")
    assert lpips_network("alex").weights == digest[:16]


def test_weights_of_another_network_are_refused(backbones, tmp_path):
    with pytest.raises(ConfigError) as caught:
        lpips_network("squeeze", backbones / "alex.pth")
    assert str(caught.value) == (
        f"lpips with net_type=squeeze: {backbones}/alex.pth has features.0.weight of shape [64, 3, 11, 11], and not "
        "[64, 3, 3, 3]: it is damaged, or of another network. Give squeezenet1_1-b8a52dc0.pth."
    )
    with pytest.raises(
        ConfigError, match=r"alex.pth has no lin0.model.1.weight: .* Give the heads for net_type=alex\.$"
    ):
        lpips_network("alex", backbones / "alex.pth", heads=backbones / "alex.pth")


def test_without_a_package_that_has_the_heads_it_names_the_extra(backbones, monkeypatch):
    monkeypatch.setattr(lpips, "find_spec", lambda package: None)
    with pytest.raises(MissingExtraError, match=r"^metric 'lpips' needs an optional library\. .*eclosion\[metrics\]"):
        lpips_network("alex", backbones / "alex.pth")


def test_making_it_moves_no_global_generator(backbones):
    before = torch.get_rng_state()
    lpips_network("squeeze", backbones / "squeeze.pth")
    assert torch.equal(torch.get_rng_state(), before)

"""Inception: the features that torch-fidelity and torchmetrics give of the same weights, which a test makes."""

import dataclasses
import hashlib

import pytest
import torch

from eclosion.errors import ConfigError, EnvironmentProblem
from eclosion.models import image_encoder, inception
from eclosion.models.image_encoder import ImageEncoder
from eclosion.models.inception import InceptionPreprocess, InceptionV3
from eclosion.models.weight_files import Published
from eclosion.registry import build

FEATURES = (64, 192, 768, 2048, "logits_unbiased", "logits")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file as the published one, of torch-fidelity's network with random weights; and that network."""
    theirs = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng():
        patch.setattr(theirs, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(theirs.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        net = theirs.FeatureExtractorInceptionV3("theirs", [str(name) for name in FEATURES])
    drawn = torch.Generator().manual_seed(0)
    for name, tensor in net.state_dict().items():
        if tensor.ndim == 4:  # so that what comes out differs as much as what comes in
            tensor.normal_(0, (2 / tensor[0].numel()) ** 0.5, generator=drawn)
        elif name.endswith(("running_var", "bn.weight")):
            tensor.uniform_(0.5, 1.5, generator=drawn)
        elif tensor.is_floating_point():
            tensor.normal_(0, 0.1, generator=drawn)
    torch.save(net.state_dict(), path)
    return path, net


@pytest.fixture(autouse=True)
def few(monkeypatch):
    """Two images at a time: the network is slow on one core."""
    monkeypatch.setitem(image_encoder.CHUNK, "cpu", 2)


def levels(number=2, size=(40, 52), seed=0):
    """Noise, on which a wrong filter shows most: uint8 [B, 3, H, W]."""
    return torch.randint(0, 256, (number, 3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def signed(pixels):
    return pixels / 127.5 - 1


def encoder_of(weights, features=2048, **options):
    part = build("encoders", {"name": "inception", "features": features, "weights": str(weights[0]), **options})
    return part.build()


# what the network sees


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (32, 48), (299, 299), (300, 298), (512, 700)])
def test_images_are_resized_as_tensorflow_did(size):
    theirs = pytest.importorskip("torch_fidelity.interpolate_compat_tensorflow")
    pixels = levels(1, size)
    resize = theirs.interpolate_bilinear_2d_like_tensorflow1x
    wanted = (resize(pixels.float(), size=(299, 299), align_corners=False) - 128) / 128
    found = InceptionPreprocess("tensorflow")(signed(pixels))
    assert torch.equal(found, wanted)
    if size not in ((1, 1), (299, 299)):  # the negative control
        assert (InceptionPreprocess("antialiased")(signed(pixels)) - wanted).abs().max() > 0.01


def test_each_of_the_256_levels_arrives_as_it_was():
    every = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).expand(1, 3, 16, 16)
    found = torch.nn.functional.pad(every, (0, 283, 0, 283))  # nothing to resize
    assert torch.equal(InceptionPreprocess("tensorflow")(signed(found)) * 128 + 128, found.float())
    beyond = torch.full((1, 3, 299, 299), 1.7)
    assert torch.equal(InceptionPreprocess("tensorflow")(beyond), torch.full((1, 3, 299, 299), 127 / 128))


# what comes out


def test_all_features_are_those_that_torch_fidelity_gives(weights):
    """Bit for bit, but for the classes: the sums of a matrix product are added in the order of its shape."""
    pixels = levels()
    wanted = dict(zip(FEATURES, weights[1](pixels), strict=True))
    for features in FEATURES:
        encoder = encoder_of(weights, features)
        found = encoder(signed(pixels))
        assert found.shape == wanted[features].shape == (2, encoder.dim)
        if isinstance(features, int):
            assert torch.equal(found, wanted[features])
        torch.testing.assert_close(found, wanted[features], rtol=1e-5, atol=1e-5)
        assert wanted[features].std(0).mean() > 1e-3  # of images that are not the same to it


@pytest.mark.slow  # its library takes seconds to load
def test_antialiased_the_features_are_those_that_torchmetrics_gives(weights):
    theirs = pytest.importorskip("torchmetrics.image.fid")
    wanted = theirs.NoTrainInceptionV3("theirs", ["64"], str(weights[0]))(levels())
    assert torch.equal(encoder_of(weights, 64, resize="antialiased")(signed(levels())), wanted)


def test_features_do_not_depend_on_what_comes_with_an_image_or_on_the_precision_of_a_run(weights):
    encoder, pixels = encoder_of(weights, 64), signed(levels(5))
    wanted = encoder(pixels)
    assert torch.equal(torch.cat([encoder(one) for one in pixels.split(1)]), wanted)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(encoder(pixels.flip(0)).flip(0), wanted)
    assert encoder(pixels[:0]).shape == (0, 64)


def test_the_inception_score_is_given_classes_without_bias(weights):
    part = build("encoders", {"name": "inception", "weights": str(weights[0]), "resize": "antialiased"})
    classes = part.logits()
    assert dataclasses.asdict(classes) == dataclasses.asdict(part) | {"features": "logits_unbiased"}
    assert classes.logits() == classes
    assert build("encoders", {"name": "inception", "features": "logits"}).logits().features == "logits"
    net = weights[1]
    found = classes.build()(signed(levels()))
    torch.testing.assert_close(found, part.build()(signed(levels())) @ net.fc.weight.T, rtol=1e-5, atol=1e-5)


# what is said of it


def test_it_says_whose_weights_it_has_and_how_images_are_resized(weights, monkeypatch):
    encoder = encoder_of(weights)
    assert encoder.notes == (
        "The weights of inception are those of weights.pth, and not the standard ones, "
        "weights-inception-2015-12-05-6726825d.pth: these scores compare with no published ones.",
    )
    assert encoder.resize == "tensorflow bilinear"
    assert InceptionPreprocess("antialiased").filter == "bilinear antialiased"
    digest = _sha256(weights[0])
    assert encoder.weights == digest[:16]
    monkeypatch.setattr(inception, "WEIGHTS", Published(inception.WEIGHTS.url, digest))
    assert encoder_of(weights).notes == ()


def test_a_fingerprint_is_of_weights_features_and_resize(weights):
    few, more = encoder_of(weights, 64), encoder_of(weights, 192)
    other = ImageEncoder(few.net, InceptionPreprocess("antialiased"), dim=64, normalize=False)
    assert len({few.fingerprint, more.fingerprint, other.fingerprint}) == 3
    before = few.fingerprint
    few.net.fc.bias[0] += 1  # of a layer that these features do not need: of another file nevertheless
    assert ImageEncoder(few.net, few.preprocess, dim=64, normalize=False).fingerprint != before


def test_the_standard_file_is_found_where_torch_keeps_downloads(weights, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    kept = tmp_path / "hub" / "checkpoints" / "weights-inception-2015-12-05-6726825d.pth"
    kept.parent.mkdir(parents=True)
    kept.symlink_to(weights[0])
    with pytest.raises(EnvironmentProblem, match=r"is damaged or another file.*, and should with 6726825d0af5f729"):
        inception.inception(64)
    monkeypatch.setattr(inception, "WEIGHTS", Published(inception.WEIGHTS.url, _sha256(weights[0])))
    assert inception.inception(64).weights == _sha256(weights[0])[:16]


def test_without_a_network_it_says_where_to_put_the_weights_and_what_to_use_meanwhile(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(inception, "WEIGHTS", Published("http://127.0.0.1:9/weights-inception.pth", "6726825d"))
    with pytest.raises(EnvironmentProblem) as caught:
        build("encoders", "inception").build()
    said = str(caught.value)
    assert said.startswith(f"encoder inception: weights-inception.pth is not in {tmp_path}/hub/checkpoints and cannot")
    assert said.endswith(
        "Put the file there, or give its path as weights. Meanwhile use the encoder efficientnet_lite0, whose weights "
        "come with its package."
    )


def test_the_inception_of_torchvision_is_refused(weights, tmp_path):
    """It has the same layers, and other classes."""
    tensors = torch.load(weights[0], weights_only=True)
    tensors |= {"fc.weight": torch.zeros(1000, 2048), "fc.bias": torch.zeros(1000), "AuxLogits.fc.bias": torch.zeros(2)}
    torch.save(tensors, tmp_path / "inception_v3_google-0cc3c7bd.pth")
    with pytest.raises(ConfigError) as caught:
        encoder_of((tmp_path / "inception_v3_google-0cc3c7bd.pth",))
    assert str(caught.value) == (
        f"encoder inception: {tmp_path}/inception_v3_google-0cc3c7bd.pth has fc.weight of shape [1000, 2048], and not "
        "[1008, 2048]: it is damaged, or of another network. Give weights-inception-2015-12-05-6726825d.pth."
    )


def test_options_are_checked_before_anything_is_loaded():
    for options in ({"features": 100}, {"sha256": "6726"}, {"sha256": "not hex at all"}, {"resize": "bicubic"}):
        with pytest.raises(ValueError, match=next(iter(options))):
            build("encoders", {"name": "inception", **options})


def test_making_it_moves_no_global_generator(weights):
    before = torch.get_rng_state()
    encoder_of(weights, 64)
    assert torch.equal(torch.get_rng_state(), before)


def test_its_names_are_all_of_torch_fidelitys(weights):
    theirs = {name for name in weights[1].state_dict() if not name.endswith("num_batches_tracked")}
    with torch.device("meta"):
        assert InceptionV3(2048).state_dict().keys() == theirs


def _sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()

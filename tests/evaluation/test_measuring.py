"""Scores of images: what metrics give for the features of these images, however often it was stopped."""

import json
import sys
import threading
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from eclosion.config.load import load
from eclosion.errors import ConfigError, DataError
from eclosion.evaluation import looking, measuring, plan
from eclosion.evaluation.images import ALONE, Seen
from eclosion.evaluation.looking import extractor_of
from eclosion.evaluation.made import DataExamples
from eclosion.evaluation.measuring import measure
from eclosion.evaluation.plan import Part, check_needs
from eclosion.evaluation.reference import kept_images, reference_of, save_statistics
from eclosion.metrics.floor import floor
from eclosion.metrics.metric import Evidence, Moments, Reference
from eclosion.models.image_encoder import ImageEncoder, Preprocess
from eclosion.registry import ENCODERS, build, part

DIM, COUNT = 6, 45
CPU = torch.device("cpu")


class Tiny(nn.Module):
    def __init__(self, seed=0):
        super().__init__()
        self.conv = nn.Conv2d(3, DIM, 3, bias=False)
        weights = np.random.default_rng(seed).normal(size=self.conv.weight.shape)
        self.conv.weight.data = torch.from_numpy(weights).float()

    def forward(self, pixels):
        return self.conv(pixels).amax((2, 3))


def tiny(seed=0):
    preprocess = Preprocess(resize=(8, 8), crop=None, mean=(0.5,) * 3, std=(0.5,) * 3)
    return ImageEncoder(Tiny(seed), preprocess, dim=DIM, normalize=False)


class Pictures:
    """Noise, brighter or darker, with what it could have been made from."""

    def __init__(self, name, *, seed=0, count=COUNT, top=256, brings=(), stops_at=None, pixels=None):
        drawn = np.random.default_rng(seed).integers(0, top, (count, 3, 8, 8), np.uint8)
        self.pixels = torch.from_numpy(drawn if pixels is None else pixels)
        self.name, self.fingerprint, self.facts = name, f"{name} {seed} {count} {top}", {"size": [8, 8], "seed": seed}
        self.brings, self._stops_at, self.num_read = frozenset(brings), stops_at, 0

    def __len__(self):
        return len(self.pixels)

    def read(self, indices):
        if self._stops_at is not None and self.num_read >= self._stops_at:
            raise KeyboardInterrupt
        self.num_read += len(indices)
        pixels = self.pixels[list(indices)]
        return Seen(
            pixels,
            [f"{self.name} {i}" for i in indices],
            originals=255 - pixels if "originals" in self.brings else None,
            captions=[f"{'a' * (1 + i % 3)} bc d " * 2 for i in indices] if "captions" in self.brings else None,
            conditions=pixels.float().mean((2, 3)).repeat(1, 2) if "conditions" in self.brings else None,
        )

    def features(self, encoder):
        return encoder(self.pixels.float() / 127.5 - 1)


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ECLOSION_CACHE", str(tmp_path / "cache"))


def measured(made, against=None, *, metrics=("kid",), extractor=None, **options):
    options = {"batch_size": 8, "device": CPU} | options
    return measure(made, metrics=metrics, extractor=extractor or tiny(), against=against, **options)


def as_reference(features):
    return Reference(Moments.of(features), features)


def test_a_score_is_that_of_the_features_of_these_images():
    made, real, encoder = Pictures("made", top=200), Pictures("real", seed=1, count=60), tiny()
    found = measured(made, real, metrics=["kid", "fid"], extractor=encoder, seed=5)
    evidence = Evidence(made=made.features(encoder), reference=as_reference(real.features(encoder)), seed=5)
    wanted = build("metrics", "kid").scores(evidence) | build("metrics", "fid").scores(evidence)
    assert [row.score for row in found.rows] == ["kid", "fid"]
    for row in found.rows:
        assert row.value == pytest.approx(wanted[row.score].value, rel=1e-6)
        assert row.error == pytest.approx(wanted[row.score].error, rel=1e-5)


def test_a_row_says_all_that_its_number_means():
    encoder = tiny()
    made, real = Pictures("made", top=200), Pictures("real", seed=1, count=60)
    (row,) = measured(made, real, metrics=[{"name": "kid", "degree": 2}], extractor=encoder, seed=5).rows
    told = json.loads(json.dumps(row.as_dict(), allow_nan=False))
    assert told["metric"]["name"] == "kid"
    assert told["metric"]["degree"] == 2
    assert (told["n"], told["n_reference"], told["seed"], told["better"]) == (COUNT, 60, 5, "lower")
    assert told["extractor"]["fingerprint"] == encoder.fingerprint
    assert told["extractor"]["weights"] == encoder.weights
    assert told["extractor"]["resize"] == encoder.resize
    assert (told["made"]["name"], told["made"]["size"], told["against"]["name"]) == ("made", [8, 8], "real")
    assert told["floor"]["n"] + told["floor"]["n_reference"] <= 60
    # real against real is about zero, and these images are not real
    assert told["value"] > told["floor"]["interval"][1]


def test_the_inception_score_stands_beside_that_of_real_images_and_depends_on_none(tmp_path):
    made, real, encoder = Pictures("made", top=200), Pictures("real", seed=1, count=60), tiny()
    score = {"name": "inception_score", "splits": 2, "wants_logits": False}

    def found(against):
        return measured(made, against, metrics=[score], extractor=encoder).rows[0]

    alone, beside = found(None), found(real)
    assert alone.floor is None
    drawn = Reference(Moments.of(real.features(encoder)), real.features(encoder)[kept_images(real)])
    wanted = floor(build("metrics", score), drawn, COUNT)
    assert beside.floor.value == pytest.approx(wanted.scores["inception_score"].value, rel=1e-6)
    assert (beside.floor.n, beside.floor.n_reference) == (COUNT, None)
    assert (beside.value, beside.n_reference, beside.against) == (alone.value, None, None)
    path = tmp_path / "features.safetensors"  # which need not be of what names classes
    save_statistics(path, drawn, images=real, part=None, encoder=encoder)
    assert found(path) == alone


@part
class Fake:
    """An encoder that reads captions as well: the lengths of their words."""

    def build(self):
        return tiny()

    def build_text(self):
        return Words()


class Words:
    fingerprint = "words"

    def to(self, device):
        return self

    def pooled(self, captions):
        return torch.tensor([[float(len(word)) for word in caption.split()] for caption in captions])


class Apart:
    """How far the mean levels of two images are apart."""

    fingerprint, weights, resize, notes = "apart", "none", "none", ()

    def to(self, device):
        return self

    def __call__(self, made, original):
        return (made.mean((1, 2, 3)) - original.mean((1, 2, 3))).abs()


@pytest.fixture
def fakes(monkeypatch):
    module = ModuleType("fake_encoders")
    module.Fake = Fake
    monkeypatch.setattr(Fake, "__module__", "fake_encoders")
    monkeypatch.setitem(sys.modules, "fake_encoders", module)
    monkeypatch.setitem(ENCODERS, "fake", "fake_encoders:Fake")
    monkeypatch.setattr(looking, "lpips_network", lambda *_, **__: Apart())


def test_what_an_image_was_made_from_comes_to_the_metrics_that_ask_for_it(fakes):
    encoder = tiny()
    made = Pictures("made", brings=["originals", "conditions", "captions"])
    clip = {"name": "clip_score", "extractor": "fake"}
    metrics = ["cosine", clip, "lpips"]
    found = {row.key: row for row in measured(made, metrics=metrics, extractor=encoder).rows}
    seen, features = made.read(range(COUNT)), made.features(encoder)

    def mean_cosine(partners):
        return pytest.approx(float(torch.cosine_similarity(features, partners).clamp(min=0).mean()), rel=1e-5)

    assert found["evaluate/cosine/ImageEncoder"].value == pytest.approx(
        float(torch.cosine_similarity(features, seen.conditions).mean()), rel=1e-5
    )
    apart = Apart()(seen.pixels / 127.5 - 1, seen.originals / 127.5 - 1).mean()
    assert found["evaluate/lpips/alex"].value == pytest.approx(float(apart), rel=1e-5)
    rows = measured(made, metrics=[clip], extractor=encoder).rows
    assert rows[0].value / 100 == mean_cosine(Words().pooled(seen.captions))
    rows = measured(made, metrics=[clip | {"against": "original"}], extractor=encoder).rows
    assert rows[0].value / 100 == mean_cosine(encoder(seen.originals / 127.5 - 1))


def test_embeddings_that_images_follow_are_those_of_the_encoder_that_made_them(fakes):
    made = Pictures("made", brings=["conditions"])
    made.encoder = Fake()
    other = ImageEncoder(Tiny(), tiny().preprocess, dim=DIM, normalize=True)
    assert measured(made, metrics=["cosine"], extractor=other).rows[0].extractor.name == "fake"


class Followed:
    """Samples of butterflies, with or without embeddings of six numbers."""

    def __init__(self, shapes):
        self._samples, self.array_shapes = build("sources", {"name": "butterflies", "size": 3}).open(), shapes

    def __len__(self):
        return len(self._samples)

    def __getattr__(self, name):
        return getattr(self._samples, name)


def following(shapes, encoder="its encoder"):
    task = SimpleNamespace(
        wants=("image_embed",), options=SimpleNamespace(encoder=encoder), made={} if shapes else {"image_embed": (4,)}
    )
    config = load({"output": "x", "data": {"source": "butterflies", "image_size": 16}}).run.data
    return DataExamples(Followed(shapes), config, task, seed=0, device=CPU)


def test_embeddings_that_came_with_the_data_are_of_no_encoder_of_the_task():
    brought, encoded = following({"image_embed": (DIM,)}), following({})
    assert (brought.encoder, brought.embedding_dim) == (None, DIM)
    assert (encoded.encoder, encoded.embedding_dim) == ("its encoder", 4)


def test_the_extractor_of_a_metric_counts_before_all_others_and_without_it_that_which_made_the_embeddings():
    own, named = build("metrics", {"name": "cosine", "extractor": "inception"}), build("metrics", "cosine")
    assert type(extractor_of(own, "theirs", "maker")).__name__ == "InceptionEncoder"
    assert [extractor_of(named, "theirs", maker) for maker in ("maker", None)] == ["maker", "theirs"]
    assert extractor_of(build("metrics", "kid"), "theirs", "maker") == "theirs"


def run_with(metrics):
    section = {"metrics": metrics, "extractor": "fake", "num_samples": 3}
    return load({"output": "x", "data": {"source": "butterflies", "image_size": 16}, "evaluate": section}).run


def test_a_run_refuses_before_its_first_step_what_would_share_a_key_or_be_compared_with_another_encoder(fakes):
    part = Part("val", Followed({"image_embed": (4,)}))
    follows = SimpleNamespace(wants=("image_embed",), options=SimpleNamespace(encoder=None), made={})
    with pytest.raises(ConfigError, match="embeddings of 4 numbers, and fake gives 6"):
        check_needs(run_with(["cosine"]), part, follows)
    follows_nothing = SimpleNamespace(wants=(), conditions=lambda indices: {})
    with pytest.raises(ConfigError, match=r"evaluate.metrics: kid,degree=3 and kid,degree=2 would both be") as error:
        check_needs(run_with(["kid", {"name": "kid", "degree": 2}]), part, follows_nothing)
    assert "\n" not in str(error.value)
    check_needs(run_with(["kid", "fid"]), part, follows_nothing)


def test_a_run_is_told_of_as_few_real_images_as_a_metric_will_look_at(fakes, monkeypatch):
    monkeypatch.setattr(plan, "LIMIT", 2)
    part, follows_nothing = Part("val", Followed({})), SimpleNamespace(wants=(), conditions=lambda indices: {})
    notes = check_needs(run_with(["kid", "fid"]), part, follows_nothing)
    assert [note[:13] for note in notes] == ["kid: 2 images", "fid: 3 images"]


def test_the_first_images_and_their_originals_are_shown():
    made = Pictures("made", brings=["originals", "conditions"])
    found = measured(made, metrics=["cosine"])
    assert np.array_equal(found.grid, made.pixels[:32].permute(0, 2, 3, 1))
    assert np.array_equal(found.originals, 255 - found.grid)
    few = measured(Pictures("made", count=5), Pictures("real", seed=1))
    assert len(few.grid) == 5
    assert few.originals is None


def test_copies_of_training_images_are_found_by_their_numbers():
    train, held_out = Pictures("train", seed=2, count=60), Pictures("held out", seed=1, count=120)
    pixels = np.random.default_rng(0).integers(0, 256, (40, 3, 8, 8), np.uint8)
    pixels[7], pixels[11] = train.pixels[33], train.pixels[2]
    found = measured(Pictures("made", pixels=pixels), held_out, train=train, metrics=["memorisation"])
    assert {(pair.image, pair.train) for pair in found.pairs[:2]} == {(7, 33), (11, 2)}
    assert all(pair.too_near for pair in found.pairs[:2])
    assert {row.train["name"] for row in found.rows} == {"train"}
    other = measured(Pictures("made"), held_out, train=train)
    assert (other.pairs, other.rows[0].train) == (None, None)


def with_copies(copies, *, of=60):
    """Training images, and held-out ones of which the first so many are among them."""
    train, held_out = Pictures("train", seed=2, count=60), Pictures("held out", seed=1, count=of).pixels.numpy()
    return train, Pictures("held out", pixels=np.concatenate([train.pixels[:copies], held_out[copies:]]))


def test_held_out_images_that_were_trained_on_are_told_of():
    train, held_out = with_copies(3, of=120)
    made = Pictures("made", pixels=train.pixels[30:50].numpy())
    rows = measured(made, held_out, train=train, metrics=["memorisation"]).rows
    assert {row.score: row.value for row in rows} == {"memorised": 1, "nearer_than_held_out": 1}
    assert all(any("among the 120 held-out ones: 3." in note for note in row.notes) for row in rows)
    assert (rows[0].n_reference, rows[0].floor.n + rows[0].floor.n_reference) == (120, 117)
    assert rows[0].floor.value < 1


def test_a_metric_that_has_no_score_for_these_images_is_refused_or_left_out_with_a_note():
    train, held_out = with_copies(40)
    asked = {"train": train, "metrics": ["memorisation", "kid"]}
    message = "memorisation: 40 of 60 held-out images are themselves among those trained on"
    with pytest.raises(DataError, match=message):
        measured(Pictures("made"), held_out, **asked)
    found = measured(Pictures("made"), held_out, skip_unscorable=True, **asked)
    assert [row.score for row in found.rows] == ["kid"]
    assert [note[: len(message)] for note in found.notes] == [message]
    assert found.pairs is None


def test_scores_say_how_many_images_they_looked_at_of_a_file_that_keeps_the_features_of_some(tmp_path):
    """The Fréchet distance takes sums over all of them."""
    real, encoder, path = Pictures("real", seed=1, count=120), tiny(), tmp_path / "some.safetensors"
    features = real.features(encoder)
    save_statistics(path, Reference(Moments.of(features), features[:12]), images=real, part=None, encoder=encoder)
    metrics = ["kid", "fid", "precision_recall", "memorisation"]
    train = Pictures("train", seed=2, count=60)
    found = measured(Pictures("made"), path, train=train, metrics=metrics, extractor=encoder)
    rows = {row.score: row for row in found.rows}
    counts = {name: (row.n, row.n_reference) for name, row in rows.items()}
    assert counts == {
        "kid": (COUNT, 12),
        "fid": (COUNT, 120),
        **dict.fromkeys(["precision", "recall", "density", "coverage"], (12, 12)),
        **dict.fromkeys(["memorised", "nearer_than_held_out"], (COUNT, 12)),
    }
    assert rows["kid"].notes == ("kid: 12 images tell only large differences apart: look at its interval.",)
    assert [note[:49] for note in rows["precision"].notes] == [
        "precision_recall: 12 images are far from each oth",
        "precision_recall: the reference has 12 images, an",
    ]
    assert [note[:47] for note in rows["memorised"].notes] == ["memorisation: 12 held-out images have no neares"]
    floors = {name: (row.floor.n, row.floor.n_reference) for name, row in rows.items() if row.floor}
    assert (floors["kid"], floors["nearer_than_held_out"]) == ((6, 6), (6, 6))
    kid = {"name": "kid", "subsets": 2, "subset_size": 20}
    with pytest.raises(ConfigError, match="subset_size is 20, and there are 12 reference images"):
        measured(Pictures("made", stops_at=0), path, metrics=[kid], extractor=encoder)


def test_training_images_that_are_not_looked_at_are_told_of(monkeypatch):
    monkeypatch.setitem(measuring.KEPT, "train", 20)
    train, held_out = Pictures("train", seed=2, count=60), Pictures("held out", seed=1, count=120)
    found = measured(Pictures("made"), held_out, train=train, metrics=["memorisation"])
    assert "memorisation: looks at 20 of 60 training images. Copies of the others are not found." in found.rows[0].notes
    numbers = set(kept_images(train, 20).tolist())
    assert {pair.train for pair in found.pairs} <= numbers


# --- several processes, and stops ------------------------------------------------------------------------------------


def in_two_threads(work):
    """What `work(workers)` gives in each of two processes, which are threads here."""
    meeting, box, outcomes = threading.Barrier(2, timeout=30), [None, None], [None, None]

    class Thread:
        size = 2

        def __init__(self, rank):
            self.rank = rank

        def gather(self, value):
            box[self.rank] = value
            meeting.wait()
            everyone = list(box)
            meeting.wait()
            return everyone

        def from_leader(self, value):
            return self.gather(value)[0]

        def agree(self):
            return None

    def run(rank):
        try:
            outcomes[rank] = work(Thread(rank))
        except BaseException as error:  # noqa: BLE001 - looked at by the test
            outcomes[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return outcomes


ASKED = {"metrics": ["kid", "fid", "precision_recall"], "seed": 3}


def test_two_processes_find_the_same_bits_as_one(tmp_path):
    def work(workers, cache):
        made, real = Pictures("made", top=200), Pictures("real", seed=1, count=60)
        return measured(made, real, workers=workers, cache=tmp_path / cache, **ASKED)

    alone = work(ALONE, "alone")
    for shared in in_two_threads(lambda workers: work(workers, "shared")):
        assert shared.rows == alone.rows
        assert np.array_equal(shared.grid, alone.grid)


def test_an_evaluation_that_was_stopped_goes_on_to_the_same_bits(tmp_path):
    real, keep = Pictures("real", seed=1, count=60), tmp_path / "kept"
    whole = measured(Pictures("made", top=200), real, **ASKED)
    with pytest.raises(KeyboardInterrupt):
        measured(Pictures("made", top=200, stops_at=24), real, keep=keep, **ASKED)
    again = Pictures("made", top=200)
    found = measured(again, real, keep=keep, **ASKED)
    assert found.rows == whole.rows
    assert np.array_equal(found.grid, whole.grid)
    # all that was missing, and of what was not, the three batches whose images are shown
    assert again.num_read == COUNT
    assert list(keep.rglob("*.safetensors"))  # until whoever asked has the scores on disk
    found.forget()
    assert not keep.exists()


def test_real_images_are_looked_at_once():
    first, second = Pictures("real", seed=1), Pictures("real", seed=1)
    rows = [measured(Pictures("made"), real).rows for real in (first, second)]
    assert (first.num_read, second.num_read) == (COUNT, 0)
    assert rows[0] == rows[1]


# --- what is wrong ---------------------------------------------------------------------------------------------------


def test_metrics_that_lack_something_are_refused_before_an_image_is_made():
    made = Pictures("made")
    with pytest.raises(ConfigError) as error:
        measured(made, metrics=["kid", "lpips", "memorisation", "cosine", "clip_score"])
    assert [problem.partition(" needs ")[0] for problem in error.value.problems] == [
        "kid", "lpips", "memorisation", "memorisation", "cosine", "clip_score",
    ]  # fmt: skip
    assert made.num_read == 0


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        (["kidd"], "'kidd' is not one of the metrics. Did you mean 'kid'"),
        ([{"name": "kid", "subset": 3}], "kid: subset is not an option"),
        ([], "metrics is empty"),
        ([{"name": "inception_score"}], "needs an extractor that names classes, and ImageEncoder does not"),
        ([{"name": "kid", "subsets": 2}], "subset_size"),
        (["kid", {"name": "kid", "degree": 2}], "kid,degree=3 and kid,degree=2 would both be evaluate/kid/Image"),
        (["fid", "fid"], "fid and fid would both be evaluate/fid/ImageEncoder. Keep one of them"),
    ],
)
def test_metrics_that_cannot_be_computed_are_refused(metrics, message):
    made = Pictures("made")
    with pytest.raises(ConfigError) as error:
        measured(made, Pictures("real", seed=1), metrics=metrics)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert made.num_read == 0


def test_too_few_images_are_told_of():
    (row,) = measured(Pictures("made"), Pictures("real", seed=1), metrics=["fid"]).rows
    assert not row.notes or "fid" in row.notes[0]
    few = measured(Pictures("made", count=5), Pictures("real", seed=1), metrics=["fid"]).rows
    assert any("5 images" in note for note in few[0].notes)


def test_training_images_are_not_held_out_ones():
    train = Pictures("train", seed=1)
    with pytest.raises(ConfigError, match="memorisation compares with images that were not trained on, and train"):
        measured(Pictures("made"), train, train=train, metrics=["memorisation"])


def test_embeddings_of_another_encoder_are_not_compared():
    class Longer(Pictures):
        embedding_dim = None

        def read(self, indices):
            seen = super().read(indices)
            return Seen(seen.pixels, seen.names, conditions=torch.ones(len(indices), 4))

    made = Longer("made", brings=["conditions"])
    with pytest.raises(ConfigError, match="embeddings of 4 numbers, and ImageEncoder gives 6"):
        measured(made, metrics=["cosine"])
    made.embedding_dim, made.num_read = 4, 0
    with pytest.raises(ConfigError, match="cosine: images are made from embeddings of 4 numbers, and ImageEncoder"):
        measured(made, metrics=["cosine"])
    assert made.num_read == 0


def test_real_images_of_another_size_are_told_of_though_they_are_a_file(tmp_path):
    encoder, real = tiny(), Pictures("real", seed=1)
    real.facts = {"size": [16, 12]}
    path = tmp_path / "real.safetensors"
    save_statistics(path, reference_of(real, None, encoder), images=real, part=None, encoder=encoder)
    for against in (path, real):
        (note,) = measured(Pictures("made"), against, extractor=encoder).notes
        assert "8x8 pixels (height x width), and those that they are compared with 16x12" in note


def test_statistics_of_another_extractor_are_refused(tmp_path):
    encoder, real = tiny(), Pictures("real", seed=1)
    path = tmp_path / "real.safetensors"
    save_statistics(path, reference_of(real, None, encoder), images=real, part=None, encoder=encoder)
    made = Pictures("made")
    known, images = (measured(made, against, extractor=encoder).rows[0] for against in (path, real))
    assert known.value == images.value
    assert known.against["what"] == "statistics"
    before = made.num_read
    with pytest.raises((ConfigError, DataError), match=r"real\.safetensors"):
        measured(made, path, extractor=tiny(seed=1))
    assert made.num_read == before

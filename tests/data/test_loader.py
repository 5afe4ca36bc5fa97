"""The loader: the same images in the same order, however they are split, threaded, cached or resumed."""

import subprocess
import sys
import textwrap
import threading
import time
import tracemalloc
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from eclosion.config.schema import DataConfig
from eclosion.data.folder import FolderSource
from eclosion.data.loader import CHUNK, Loader
from eclosion.data.source import Sample
from eclosion.data.transforms import Transform
from eclosion.errors import BadSample, ConfigError, DataError
from eclosion.rng import generator


@dataclass
class Fake:
    """Samples whose pixels tell their index."""

    num: int
    size: tuple[int, int] = (4, 4)
    bad: frozenset[int] = frozenset()
    broken: frozenset[int] = frozenset()
    class_names: tuple[str, ...] = ()
    has_captions: bool = False
    delay: float = 0
    fingerprint: str = "fake"
    reads: list[int] = field(default_factory=list)

    def __len__(self):
        return self.num

    def name(self, index):
        return f"fake/{index}"

    def read(self, index):
        self.reads.append(index)
        time.sleep(self.delay)
        if index in self.bad:
            raise BadSample(self.name(index), "truncated", "ends early.")
        if index in self.broken:
            raise RuntimeError(f"the reader of {index} broke")
        pixels = np.random.default_rng(index).integers(0, 256, (*self.size, 3), np.uint8)
        pixels[0, 0] = index % 256, index // 256, 0
        caption = f"image {index}" if self.has_captions else None
        label = index % len(self.class_names) if self.class_names else None
        return Sample(Image.fromarray(pixels), self.name(index), caption, label)


def config(**options):
    defaults = {"image_size": 4, "resize": "none", "num_threads": 0, "cache_gb": 1.0}
    return DataConfig(source=FolderSource(root="."), **(defaults | options))


def first(loader, num_steps, start=0):
    """The first steps, after which the threads are stopped."""
    steps = loader.steps(start)
    try:
        return list(islice(steps, num_steps))
    finally:
        steps.close()


def images(steps):
    return torch.cat([batch["image"] for step in steps for batch in step])


def indices(image):
    """Which samples a batch holds, read back from its pixels."""
    corner = ((image[:, :, 0, 0] + 1) * 127.5).round().long()
    return (corner[:, 0] + 256 * corner[:, 1]).tolist()


def threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("eclosion-data")]


def reference(samples, options, seed, positions):
    """What must stand at some positions: one image at a time, by the definitions alone."""
    out = []
    for position in positions:
        epoch, place = divmod(position, len(samples))
        order = np.arange(len(samples), dtype=np.uint32)
        if options.shuffle:
            generator(seed, "order", epoch).shuffle(order)
        image = samples.read(int(order[place])).image
        transform = Transform.of(options)
        pixels = transform.augment(transform.prepare(image, "x"), generator(seed, "augment", position))
        out.append(torch.from_numpy(pixels.astype(np.float32) / np.float32(255)).sub(0.5).div(0.5))
    return torch.stack(out)


@settings(max_examples=40, deadline=None)
@given(
    num=st.integers(1, 40),
    start=st.integers(0, 200),
    world_size=st.sampled_from([1, 2, 4]),
    num_threads=st.integers(0, 4),
    micro=st.sampled_from([1, 2, 4, 8, None]),
    shuffle=st.booleans(),
    crop=st.sampled_from(["center", "random"]),
    flip=st.booleans(),
    cache_gb=st.sampled_from([0.0, 5 * 75 / 2**30, 1.0]),
)
def test_every_position_holds_its_image_however_the_work_is_split(
    num, start, world_size, num_threads, micro, shuffle, crop, flip, cache_gb
):
    samples, batch_size, num_steps = Fake(num, size=(5, 5)), 8 * world_size, 4
    options = config(
        num_threads=num_threads, shuffle=shuffle, crop=crop, horizontal_flip=flip, cache_gb=cache_gb, resize="none"
    )
    ranks = [
        first(
            Loader(
                samples, options, seed=7, batch_size=batch_size, micro_batch_size=micro, rank=r, world_size=world_size
            ),
            num_steps,
            start,
        )
        for r in range(world_size)
    ]
    positions, pixels = [], []
    for step in range(num_steps):
        for rank in ranks:
            assert {len(batch) for batch in rank[step]} == {micro or 8}
            positions += [p for batch in rank[step] for p in batch.positions]
            pixels.append(images([rank[step]]))
    assert positions == list(range(start, start + num_steps * batch_size))
    assert torch.equal(torch.cat(pixels), reference(samples, options, 7, positions))
    assert not threads()


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("num_threads", range(5))
def test_three_epochs_deliver_every_sample_three_times(world_size, num_threads):
    samples = Fake(24)
    for start in (0, 24, 240):
        loaders = [
            Loader(samples, config(num_threads=num_threads), seed=0, batch_size=8, rank=rank, world_size=world_size)
            for rank in range(world_size)
        ]
        delivered = [i for loader in loaders for i in indices(images(first(loader, 9, start)))]
        assert sorted(delivered) == sorted(list(range(24)) * 3)


def test_a_resumed_run_sees_the_tail_of_the_run_that_never_stopped():
    options = config(num_threads=2, crop="random", horizontal_flip=True)
    whole = first(Loader(Fake(13, size=(6, 7)), options, seed=1, batch_size=6, micro_batch_size=3), 12)
    for step in (1, 5, 11):
        tail = first(
            Loader(Fake(13, size=(6, 7)), options, seed=1, batch_size=6, micro_batch_size=3), 12 - step, step * 6
        )
        assert torch.equal(images(tail), images(whole[step:]))


def test_a_batch_may_be_larger_than_the_data():
    step = first(Loader(Fake(3), config(), seed=0, batch_size=8), 1)
    seen = indices(images(step))
    assert sorted(seen[:3]) == sorted(seen[3:6]) == [0, 1, 2]
    assert set(seen[6:]) <= {0, 1, 2}


def test_labels_and_captions_go_with_their_image():
    samples = Fake(10, class_names=("a", "b", "c"), has_captions=True)
    for step in first(Loader(samples, config(num_threads=3), seed=0, batch_size=6, micro_batch_size=2), 4):
        for batch in step:
            which = indices(batch["image"])
            assert batch["label"].dtype == torch.int64
            assert batch["label"].tolist() == [i % 3 for i in which]
            assert batch["caption"] == [f"image {i}" for i in which]


def test_fields_that_the_source_lacks_are_absent():
    (batch,) = first(Loader(Fake(4), config(), seed=0, batch_size=4), 1)[0]
    assert set(batch.fields) == {"image"}
    assert batch["image"].dtype == torch.float32
    assert batch["image"].is_contiguous()
    with pytest.raises(DataError, match="The task needs 'label'"):
        batch["label"]


def test_batch_at_gives_any_positions():
    loader = Loader(Fake(9, has_captions=True), config(horizontal_flip=True), seed=2, batch_size=4)
    whole = images(first(loader, 10))
    batch = loader.batch_at([31, 2, 17])
    assert torch.equal(batch["image"], whole[[31, 2, 17]])
    assert list(batch.positions) == [31, 2, 17]


def test_images_are_read_once_when_they_fit_into_memory():
    samples = Fake(20)
    first(Loader(samples, config(num_threads=2), seed=0, batch_size=4), 30)
    assert sorted(set(samples.reads)) == list(range(20))
    assert len(samples.reads) <= 20 + 4 * CHUNK  # two threads may meet at an image that neither has kept yet
    samples.reads.clear()
    first(Loader(samples, config(num_threads=0), seed=0, batch_size=4), 30)
    assert len(samples.reads) == 20


def test_the_budget_for_memory_is_kept():
    num_bytes = 4 * 4 * 3
    loader = Loader(Fake(20), config(cache_gb=7.5 * num_bytes / 2**30), seed=0, batch_size=20)
    samples = loader.samples
    first(loader, 1)
    samples.reads.clear()
    first(loader, 1, 20)
    assert len(samples.reads) == 13  # 7 of 20 are kept
    no_memory = Loader(Fake(20), config(cache_gb=0), seed=0, batch_size=20)
    first(no_memory, 2)
    assert len(no_memory.samples.reads) == 40


def test_what_is_kept_in_memory_holds_nothing_of_what_was_cropped_away():
    loader = Loader(Fake(20, size=(256, 256)), config(), seed=0, batch_size=20)
    tracemalloc.start()
    try:
        first(loader, 1)
        assert tracemalloc.get_traced_memory()[0] < 256 * 256 * 3
    finally:
        tracemalloc.stop()


def test_reading_runs_a_few_steps_ahead_and_no_further():
    samples = Fake(1000)
    steps = Loader(samples, config(num_threads=2), seed=0, batch_size=4).steps(0)
    next(steps)
    deadline = time.monotonic() + 10
    while len(samples.reads) < 16 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert len(samples.reads) == 16  # the step that was taken, and three more
    steps.close()


def test_the_training_thread_need_not_wait_while_threads_read_ahead():
    samples = Fake(10_000, delay=0.01)
    steps = Loader(samples, config(num_threads=4), seed=0, batch_size=8).steps(0)
    next(steps)
    waited = 0.0
    for _ in range(8):
        time.sleep(0.04)  # the network at work: longer than 4 threads take for 8 images
        before = time.perf_counter()
        next(steps)
        waited += time.perf_counter() - before
    steps.close()
    assert waited < 0.5 * 8 * 8 * 0.01  # half of what it takes without threads


def test_a_bad_sample_stops_the_run_and_is_named():
    samples = Fake(10, bad=frozenset({3}))
    loader = Loader(samples, config(num_threads=2), seed=0, batch_size=2)
    with pytest.raises(DataError) as caught:
        first(loader, 5)
    assert str(caught.value) == (
        "fake/3: ends early. 1 of 10 samples of epoch 0 cannot be used (truncated), and data.max_bad_fraction=0 "
        "allows 0. Repair or remove the sample, or raise data.max_bad_fraction."
    )
    assert not threads()


@pytest.mark.parametrize("num_threads", [0, 3])
def test_a_bad_sample_surfaces_at_its_own_step(num_threads):
    samples = Fake(20, bad=frozenset({11}))
    loader = Loader(samples, config(num_threads=num_threads), seed=0, batch_size=2)
    place = loader.order.indices(range(20)).tolist().index(11)
    steps = loader.steps(0)
    for _ in range(place // 2):
        next(steps)
    with pytest.raises(DataError, match="fake/11"):
        next(steps)
    assert next(steps, None) is None


@pytest.mark.parametrize("num_threads", [0, 3])
def test_within_the_budget_a_bad_sample_keeps_its_place_with_weight_zero(num_threads):
    samples = Fake(10, bad=frozenset({3, 7}), class_names=("a", "b"), has_captions=True)
    options = config(num_threads=num_threads, max_bad_fraction=0.2)
    good = images(first(Loader(Fake(10), options, seed=0, batch_size=5), 4))
    loader = Loader(samples, options, seed=0, batch_size=5)
    steps = first(loader, 4)
    seen, skipped = images(steps), [skip for step in steps for batch in step for skip in batch.skipped]
    weight = torch.cat([batch.weight for step in steps for batch in step])
    at = [p for p in range(20) if loader.order.index_at(p) in {3, 7}]
    assert [skip.position for skip in skipped] == at
    assert {(skip.name, skip.reason, skip.detail) for skip in skipped} == {
        (f"fake/{i}", "truncated", "ends early.") for i in (3, 7)
    }
    assert torch.equal(weight, torch.tensor([0.0 if p in at else 1.0 for p in range(20)]))
    assert not seen[at].any()
    rest = [p for p in range(20) if p not in at]
    assert torch.equal(seen[rest], good[rest])
    assert all(len(batch["caption"]) == len(batch["label"]) == 5 for step in steps for batch in step)


def test_one_bad_sample_more_than_the_budget_stops_the_run_in_any_epoch():
    samples = Fake(10, bad=frozenset({3, 7, 8}))
    with pytest.raises(DataError, match=r"3 of 10 samples of epoch 0 .* data.max_bad_fraction=0.2 allows 2\."):
        first(Loader(samples, config(max_bad_fraction=0.2), seed=0, batch_size=10), 1)
    with pytest.raises(DataError, match=r"3 of 10 samples of epoch 4"):
        first(Loader(samples, config(max_bad_fraction=0.2), seed=0, batch_size=10), 1, start=40)
    assert len(first(Loader(samples, config(max_bad_fraction=0.3), seed=0, batch_size=10), 5)) == 5


def test_batch_at_shows_bad_samples_instead_of_stopping():
    batch = Loader(Fake(4, bad=frozenset({2})), config(), seed=0, batch_size=4).batch_at(range(4))
    assert batch.weight.sum() == 3
    assert [skip.name for skip in batch.skipped] == ["fake/2"]


def test_a_bad_sample_asked_for_twice_has_no_weight_twice():
    loader = Loader(Fake(3, bad=frozenset({0, 1, 2})), config(), seed=0, batch_size=3)
    assert loader.batch_at([1, 1]).weight.tolist() == [0, 0]


@pytest.mark.parametrize("num_threads", [0, 1, 4])
def test_an_error_in_a_thread_surfaces_in_order_with_its_own_message(num_threads):
    samples = Fake(40, broken=frozenset({5}))
    loader = Loader(samples, config(num_threads=num_threads), seed=0, batch_size=4)
    place = loader.order.indices(range(40)).tolist().index(5)
    steps = loader.steps(0)
    for _ in range(place // 4):
        next(steps)
    with pytest.raises(RuntimeError, match="the reader of 5 broke") as caught:
        next(steps)
    assert caught.value.__notes__ == [f"while reading sample 5, fake/5, at position {place} of the run"]
    assert not threads()


def test_closing_stops_the_threads_promptly():
    samples = Fake(10_000, delay=0.02)
    steps = Loader(samples, config(num_threads=3), seed=0, batch_size=64).steps(0)
    next(steps)
    before = time.perf_counter()
    steps.close()
    assert time.perf_counter() - before < 0.7  # one image, not the 20 ms x 192 / 3 that were asked for
    assert not threads()


def test_ctrl_c_ends_the_wait_for_data_and_a_script_that_forgets_to_close_still_ends():
    script = """
        import os, signal, sys, threading, time
        from PIL import Image
        from eclosion.config.schema import DataConfig
        from eclosion.data.folder import FolderSource
        from eclosion.data.loader import Loader
        from eclosion.data.source import Sample
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it for what runs in the background
        class Slow:
            fingerprint, class_names, has_captions = "", (), False
            def __len__(self): return 1000
            def name(self, index): return str(index)
            interrupt = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
            def read(self, index):
                if self.interrupt:  # while it waits: Python's locks are not safe from an interrupt in between
                    self.interrupt.start()
                    self.interrupt = None
                time.sleep(0.05)
                return Sample(Image.new("RGB", (4, 4)), str(index))
        options = DataConfig(source=FolderSource(root="."), image_size=4, num_threads=1)
        loader = Loader(Slow(), options, seed=0, batch_size=8)
        try:
            list(loader.steps(0))
        except KeyboardInterrupt:
            print("interrupted", threading.active_count())
        forgotten = loader.steps(0)
        next(forgotten)
        print("end")
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "interrupted 1\nend\n", "")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"batch_size": 10, "world_size": 4},
            "train.batch_size: 10 images cannot be shared evenly by 4 processes. Use a multiple of 4, such as 8 or 12.",
        ),
        (
            {"batch_size": 2, "world_size": 4},
            "train.batch_size: 2 images cannot be shared evenly by 4 processes. Use a multiple of 4, such as 4.",
        ),
        (
            {"batch_size": 8, "micro_batch_size": 3},
            "train.micro_batch_size: 3 does not divide the images of a step (a step has 8). Use one of 1, 2, 4, 8.",
        ),
        (
            {"batch_size": 24, "micro_batch_size": 8, "world_size": 2},
            "train.micro_batch_size: 8 does not divide the images of a step (each of 2 processes has 12 of the 24). "
            "Use one of 1, 2, 3, 4, 6, 12.",
        ),
    ],
)
def test_impossible_divisions_are_refused_with_ways_out(options, message):
    with pytest.raises(ConfigError) as caught:
        Loader(Fake(4), config(), seed=0, **options)
    assert str(caught.value) == message


def test_a_micro_batch_larger_than_the_share_of_a_process_is_cut_to_it():
    loader = Loader(Fake(4), config(), seed=0, batch_size=8, micro_batch_size=8, world_size=4)
    assert [len(batch) for batch in first(loader, 1)[0]] == [2]


def test_an_image_smaller_than_the_crop_is_a_bad_sample():
    with pytest.raises(DataError) as caught:
        first(Loader(Fake(3, size=(4, 3)), config(), seed=0, batch_size=3), 1)
    assert "is 3x4 pixels (width x height), smaller than the crop of 4x4. " in str(caught.value)
    assert "(too_small)" in str(caught.value)


def test_a_folder_with_a_broken_image_stops_by_default_and_goes_on_within_a_budget(tmp_path):
    for i in range(5):
        Image.new("RGB", (6, 6), (i, i, i)).save(tmp_path / f"{i}.png")
    whole = (tmp_path / "3.png").read_bytes()
    (tmp_path / "3.png").write_bytes(whole[:52])
    samples = FolderSource(root=tmp_path).open()
    with pytest.raises(DataError) as caught:
        first(Loader(samples, config(), seed=0, batch_size=5), 1)
    assert str(caught.value).startswith(f"{tmp_path}/3.png: the image ends early: the file is truncated")
    assert str(caught.value).endswith(
        "1 of 5 samples of epoch 0 cannot be used (truncated), and data.max_bad_fraction=0 allows 0. "
        "Repair or remove the sample, or raise data.max_bad_fraction."
    )
    (batch,) = first(Loader(samples, config(max_bad_fraction=0.2), seed=0, batch_size=5), 1)[0]
    assert batch.weight.sum() == 4
    assert [(skip.name, skip.reason) for skip in batch.skipped] == [(f"{tmp_path}/3.png", "truncated")]

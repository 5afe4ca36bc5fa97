"""Reference sets: the same bits however they are made, each image looked at once, and nothing that is damaged used."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from eclosion.checkpoint.lock import RunLock
from eclosion.errors import ConfigError, DataError, UserError
from eclosion.evaluation import collecting, reference
from eclosion.evaluation.images import ALONE, Seen
from eclosion.evaluation.reference import kept_images, reference_of
from eclosion.models.image_encoder import ImageEncoder, Preprocess
from eclosion.rundir import RunDir

COUNT, DIM = 300, 5


class Tiny(nn.Module):
    def __init__(self, seed=0):
        super().__init__()
        self.conv = nn.Conv2d(3, DIM, 3, bias=False)
        weights = np.random.default_rng(seed).normal(size=self.conv.weight.shape)
        self.conv.weight.data = torch.from_numpy(weights).float()

    def forward(self, pixels):
        return self.conv(pixels).amax((2, 3))


def tiny(seed=0, **changes):
    options = {"resize": (6, 6), "crop": None, "mean": (0.5,) * 3, "std": (0.5,) * 3} | changes
    return ImageEncoder(Tiny(seed), Preprocess(**options), dim=DIM, normalize=False)


class Pictures:
    """Noise; notes which images were read."""

    name, facts = "noise", {}

    def __init__(self, count=COUNT, seed=0, bad=None):
        self._pixels = np.random.default_rng(seed).integers(0, 256, (count, 3, 8, 8), np.uint8)
        self.fingerprint, self.bad, self.read_ones = f"noise {count} {seed}", bad, []

    def __len__(self):
        return len(self._pixels)

    def read(self, indices):
        if self.bad in indices:
            raise DataError(f"picture {self.bad}: the image ends early.")
        self.read_ones += indices
        return Seen(torch.from_numpy(self._pixels[list(indices)]), [f"picture {i}" for i in indices])

    def features(self, encoder):
        """All at once, as the encoder makes them of what a network sees."""
        return encoder(torch.from_numpy(self._pixels.astype(np.float32) / 127.5 - 1))


class Stopping:
    """One process, which is told to stop when it has asked often enough."""

    rank, size = 0, 1

    def __init__(self, times):
        self._left = times

    def gather(self, value):
        return [value]

    def from_leader(self, value):
        return value

    def agree(self):
        self._left -= 1
        if self._left < 0:
            raise InterruptedError


class Several:
    """One of some threads that stand for processes."""

    def __init__(self, rank, size, barrier, slots):
        self.rank, self.size, self._barrier, self._slots = rank, size, barrier, slots

    def gather(self, value):
        self._slots[self.rank] = value
        self._barrier.wait(60)
        found = list(self._slots)
        self._barrier.wait(60)
        return found

    def from_leader(self, value):
        return self.gather(value)[0]

    def agree(self):
        return None


def in_processes(size, work):
    """What work(workers) gives in each of them, or raises."""
    barrier, slots, found = threading.Barrier(size), [None] * size, [None] * size

    def run(rank):
        try:
            found[rank] = work(Several(rank, size, barrier, slots))
        except UserError as error:
            found[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def save_always(monkeypatch):
    """Whatever the clock says."""
    monkeypatch.setattr(collecting, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(collecting, "SAVE_RATIO", 0.0)


def same(one, other):
    return (
        one.moments.count == other.moments.count
        and torch.equal(one.moments.total, other.moments.total)
        and torch.equal(one.moments.outer, other.moments.outer)
        and torch.equal(one.features, other.features)
        and one.names == other.names
    )


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ECLOSION_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "references"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Made in one go, one image at a time."""
    return reference_of(Pictures(), None, tiny(), batch_size=COUNT, cache=tmp_path_factory.mktemp("whole"), limit=40)


def test_sums_are_those_of_all_features_and_the_kept_ones_are_of_the_chosen_images(whole):
    features = Pictures().features(tiny())
    chosen = kept_images(Pictures(), 40)
    assert whole.moments.count == COUNT
    torch.testing.assert_close(whole.moments.mean, features.double().mean(0), rtol=1e-13, atol=0)
    torch.testing.assert_close(whole.moments.covariance, torch.cov(features.double().T), rtol=1e-11, atol=1e-12)
    assert torch.equal(whole.features, features[torch.from_numpy(chosen)])
    assert list(whole.names) == [f"picture {i}" for i in chosen]


def test_the_choice_is_without_repetition_in_no_order_and_another_for_other_images():
    chosen = kept_images(Pictures(), 40).tolist()
    assert len(set(chosen)) == 40
    assert chosen != sorted(chosen)
    assert chosen == kept_images(Pictures(), 40).tolist()
    assert set(chosen) != set(kept_images(Pictures(seed=1), 40).tolist())
    assert sorted(kept_images(Pictures(), 1000).tolist()) == list(range(COUNT))


@pytest.mark.parametrize(("batch_size", "processes"), [(7, 1), (64, 1), (1000, 1), (7, 2), (64, 3), (2, 7)])
def test_the_bits_depend_neither_on_the_batch_size_nor_on_the_number_of_processes(batch_size, processes, whole):
    def make(workers):
        return reference_of(Pictures(), None, tiny(), batch_size=batch_size, workers=workers, limit=40)

    found = in_processes(processes, make)
    assert all(same(one, whole) for one in found)


def test_processes_share_the_images_and_each_is_read_as_often_as_any(cache):
    pictures = [Pictures(100) for _ in range(3)]
    in_processes(3, lambda w: reference_of(pictures[w.rank], None, tiny(), batch_size=11, workers=w))
    read = [one.read_ones for one in pictures]
    assert {index for one in read for index in one} == set(range(100))
    assert max(map(len, read)) <= 35
    assert not set(read[0][:11]) & set(read[1][:11])


@pytest.mark.parametrize("times", [1, 5, 38, 39, 42])
def test_a_stopped_call_goes_on_where_it_was_and_ends_with_the_same_bits(times, whole, monkeypatch):
    save_always(monkeypatch)
    options = {"batch_size": 7, "limit": 40}
    with pytest.raises(InterruptedError):
        reference_of(Pictures(), None, tiny(), workers=Stopping(times), **options)
    again = Pictures()
    assert same(reference_of(again, None, tiny(), **options), whole)
    done = (times * 7) // collecting.BLOCK * collecting.BLOCK  # what is behind a whole block is made again
    assert again.read_ones == list(range(done, COUNT))


def test_what_was_done_may_be_damaged_and_counts_for_nothing_then(whole, cache, monkeypatch):
    save_always(monkeypatch)
    options = {"batch_size": 7, "limit": 40}
    with pytest.raises(InterruptedError):
        reference_of(Pictures(), None, tiny(), workers=Stopping(40), **options)
    (piece,) = cache.rglob("rows-*")
    data = bytearray(piece.read_bytes())
    data[-50] ^= 1
    piece.write_bytes(data)
    again = Pictures()
    assert same(reference_of(again, None, tiny(), **options), whole)
    assert again.read_ones == list(range(COUNT))


def test_nothing_of_the_making_stays_when_all_is_done(cache):
    reference_of(Pictures(20), None, tiny())
    assert [path.suffix for path in cache.iterdir()] == [".safetensors"]


def test_real_images_pass_the_extractor_once(whole):
    pictures, told = Pictures(), []
    options = {"limit": 40, "on_image": lambda done, total: told.append((done, total))}
    reference_of(pictures, None, tiny(), batch_size=100, **options)
    assert told == [(0, 300), (100, 300), (200, 300), (300, 300)]
    assert same(reference_of(pictures, None, tiny(), **options), whole)
    assert len(pictures.read_ones) == COUNT
    assert len(told) == 4


@pytest.mark.parametrize(
    "other",
    [
        pytest.param(lambda: (Pictures(20, seed=1), tiny(), 10), id="other images"),
        pytest.param(lambda: (Pictures(20), tiny(seed=1), 10), id="other weights"),
        pytest.param(lambda: (Pictures(20), tiny(interpolation="bilinear"), 10), id="another resize"),
        pytest.param(lambda: (Pictures(20), tiny(), 11), id="more that are kept"),
    ],
)
def test_what_was_made_of_something_else_is_not_taken(other):
    reference_of(Pictures(20), None, tiny(), limit=10)
    pictures, encoder, limit = other()
    reference_of(pictures, None, encoder, limit=limit)
    assert len(pictures.read_ones) == 20


@pytest.mark.parametrize("place", [9, 700, -9])
def test_a_file_that_is_damaged_is_told_of_and_made_again(place, whole, cache):
    reference_of(Pictures(), None, tiny(), limit=40)
    (path,) = cache.iterdir()
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)
    pictures = Pictures()
    with pytest.warns(UserWarning, match=rf"{path.name} cannot be used.*made again now"):
        assert same(reference_of(pictures, None, tiny(), limit=40), whole)
    assert len(pictures.read_ones) == COUNT
    assert same(reference_of(pictures, None, tiny(), limit=40), whole)
    assert len(pictures.read_ones) == COUNT


def test_what_another_process_makes_is_waited_for(cache):
    reference_of(Pictures(20), None, tiny())
    (path,) = cache.iterdir()
    made = path.read_bytes()
    path.unlink()
    lock = RunLock(RunDir(path.with_suffix(reference.MAKING)))
    lock.acquire()

    class Other(Stopping):
        """The other process is done when we have asked once."""

        def agree(self):
            path.write_bytes(made)
            lock.release()

    pictures = Pictures(20)
    with pytest.warns(UserWarning, match=f"waiting for process {os.getpid()} on"):
        reference_of(pictures, None, tiny(), workers=Other(0))
    assert pictures.read_ones == []


def test_what_another_process_made_a_moment_ago_is_taken(cache, monkeypatch):
    """It had no file when we looked, and no lock when we tried."""
    reference_of(Pictures(20), None, tiny())
    (path,) = cache.iterdir()
    made, acquire = path.read_bytes(), RunLock.acquire
    path.unlink()

    def acquired(lock):
        path.write_bytes(made)
        acquire(lock)

    monkeypatch.setattr(RunLock, "acquire", acquired)
    pictures = Pictures(20)
    reference_of(pictures, None, tiny())
    assert pictures.read_ones == []
    assert [each.name for each in cache.iterdir()] == [path.name]


def test_a_wait_can_be_stopped(cache):
    reference_of(Pictures(20), None, tiny())
    (path,) = cache.iterdir()
    path.unlink()
    with RunLock(RunDir(path.with_suffix(reference.MAKING))), pytest.warns(UserWarning, match="waiting for"):  # noqa: SIM117
        with pytest.raises(InterruptedError):
            reference_of(Pictures(20), None, tiny(), workers=Stopping(0))


def test_files_that_were_used_longest_ago_give_way(cache, monkeypatch):
    def make(seed):
        pictures = Pictures(20, seed)
        reference_of(pictures, None, tiny())
        return len(pictures.read_ones)

    def age(seconds):
        for path in cache.iterdir():
            os.utime(path, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns - seconds * 10**9))

    assert [make(seed) for seed in (0, 1, 2)] == [20, 20, 20]
    size = sum(path.stat().st_size for path in cache.iterdir())
    age(100)
    assert make(0) == 0  # used now
    age(100)
    monkeypatch.setattr(reference, "CACHE_GB", size * 1.01 / 2**30)
    assert make(3) == 20  # and 1 goes, which was used longest ago
    assert len(list(cache.iterdir())) == 3
    assert [make(seed) for seed in (0, 2, 1)] == [0, 0, 20]


def test_what_nobody_makes_any_more_gives_way_and_what_somebody_makes_stays(cache, monkeypatch):
    left, busy = cache / f"{'0' * 32}{reference.MAKING}", cache / f"{'1' * 32}{reference.MAKING}"
    for folder in (left, busy):
        folder.mkdir(parents=True)
        (folder / "rows-00000.safetensors").write_bytes(bytes(5000))
        os.utime(folder / "rows-00000.safetensors", (0, 0))
    monkeypatch.setattr(reference, "CACHE_GB", 0.0)
    with RunLock(RunDir(busy)):
        reference_of(Pictures(20), None, tiny())
    assert not left.exists()
    assert busy.exists()
    assert len(list(cache.glob("*.safetensors"))) == 1  # what was just made stays, whatever the limit


def test_a_folder_that_cannot_be_written_costs_time_and_nothing_else(tmp_path, whole):
    (tmp_path / "file").write_text("not a folder")
    pictures = Pictures()
    for _ in range(2):
        with pytest.warns(UserWarning, match=r"features cannot be kept \(Not a directory\).*ECLOSION_CACHE"):
            found = reference_of(pictures, None, tiny(), cache=tmp_path / "file" / "references", limit=40)
        assert same(found, whole)
    assert len(pictures.read_ones) == 2 * COUNT


def test_a_disk_that_fills_costs_time_and_nothing_else(whole, cache, monkeypatch):
    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    save_always(monkeypatch)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        assert same(reference_of(Pictures(), None, tiny(), limit=40), whole)
    said = [str(each.message) for each in told]
    assert len(said) == 2
    assert "No space left on device" in said[0]
    assert "begins anew" in said[0]
    assert "features cannot be kept (" in said[1]
    assert not list(cache.glob("*.safetensors"))
    assert not list(cache.rglob("*.partial"))


def test_an_image_that_cannot_be_read_ends_all_processes_with_its_name():
    found = in_processes(2, lambda w: reference_of(Pictures(50, bad=30), None, tiny(), batch_size=16, workers=w))
    assert [type(error) for error in found] == [UserError, DataError]
    assert str(found[1]) == "picture 30: the image ends early."
    assert str(found[0]) == "stops with process 1: picture 30: the image ends early."
    assert [error.exit_code for error in found] == [3, 3]


def test_features_that_are_no_numbers_are_refused_with_the_image():
    encoder = tiny()
    encoder.net.conv.weight.data[0] = float("inf")
    with pytest.raises(DataError, match=r"^picture 0: the extractor finds no finite features in it\."):
        reference_of(Pictures(20), None, encoder)


def test_no_images_and_no_kept_ones_are_refused():
    with pytest.raises(DataError, match="noise: there are no images"):
        reference_of(Pictures(0), None, tiny())
    with pytest.raises(ConfigError, match="limit is 0"):
        reference_of(Pictures(20), None, tiny(), limit=0)


def test_the_threads_of_torch_are_as_before():
    before = torch.get_num_threads()
    reference_of(Pictures(20), None, tiny(), workers=ALONE)
    assert torch.get_num_threads() == before


@pytest.mark.slow
def test_a_call_that_is_killed_again_and_again_ends_with_the_same_bits(tmp_path, whole):
    """SIGKILL after each few batches; each call gets further than the one before."""
    script = textwrap.dedent(
        f"""
        import importlib.util, os, signal, sys
        spec = importlib.util.spec_from_file_location("tests_of_reference", {__file__!r})
        ours = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(ours)
        ours.collecting.SAVE_SECONDS = ours.collecting.SAVE_RATIO = 0.0
        left = [int(sys.argv[1])]

        def killing(done, total):
            left[0] -= 1
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)

        ours.reference_of(ours.Pictures(), None, ours.tiny(), batch_size=7, limit=40, on_image=killing)
        """
    )
    ends = []
    for number in (10, 38, 39, 3, 20):
        done = subprocess.run([sys.executable, "-c", script, str(number)], capture_output=True, check=False)
        assert done.returncode in (0, -signal.SIGKILL), done.stderr.decode()
        ends.append(done.returncode)
    assert ends[0] == -signal.SIGKILL
    assert ends[-1] == 0
    pictures = Pictures()
    assert same(reference_of(pictures, None, tiny(), limit=40), whole)
    assert pictures.read_ones == []

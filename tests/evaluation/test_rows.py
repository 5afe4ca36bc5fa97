"""Rows of images: in their order, the same bits with any number of processes and after a stop."""

import threading

import numpy as np
import pytest
import torch

from eclosion.errors import DataError, OutOfMemory, UserError
from eclosion.evaluation.images import Seen
from eclosion.evaluation.rows import forget_rows, rows_of

COUNT, BATCH = 23, 4


class Noise:
    """Noise pictures; notes the batches that were read."""

    name, facts, brings = "noise", {}, frozenset()

    def __init__(self, count=COUNT, *, stops_at=None, bad=None):
        self._pixels = np.random.default_rng(0).integers(0, 256, (count, 3, 4, 4), np.uint8)
        self.fingerprint, self.batches = f"noise {count}", []
        self._stops_at, self._bad = stops_at, bad

    def __len__(self):
        return len(self._pixels)

    def read(self, indices):
        if len(self.batches) == self._stops_at:
            raise KeyboardInterrupt
        if self._bad in indices:
            raise DataError(f"picture {self._bad}: the image ends early.")
        self.batches.append(list(indices))
        return Seen(torch.from_numpy(self._pixels[list(indices)]), [f"picture {i}" for i in indices])

    def wanted(self):
        return torch.from_numpy(self._pixels).double().mean((2, 3)).sqrt().float()


class Colour:
    """Roots of the mean colours; of black pictures they are made to be no numbers."""

    fingerprint = "colour"

    def __call__(self, seen):
        rows = seen.pixels.double().mean((2, 3)).sqrt().float()
        return torch.where((seen.pixels > 0).flatten(1).any(1)[:, None], rows, torch.nan)


class Brightness:
    fingerprint = "brightness"

    def __call__(self, seen):
        return seen.pixels.float().mean((1, 2, 3))[:, None]


def in_threads(size, work):
    """What `work(workers)` gives, or raises, in each of some processes that are threads here."""
    meeting, box, outcomes = threading.Barrier(size, timeout=20), [None] * size, [None] * size

    class Thread:
        def __init__(self, rank):
            self.rank, self.size = rank, size

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

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return outcomes


def test_each_image_has_its_row_in_the_order_of_the_images():
    images, told = Noise(), []
    makers = {"colour": Colour(), "brightness": Brightness()}
    rows = rows_of(images, makers, batch_size=BATCH, on_image=lambda *done: told.append(done))
    assert torch.equal(rows["colour"], images.wanted())
    assert rows["brightness"].shape == (COUNT, 1)
    assert [len(batch) for batch in images.batches] == [4, 4, 4, 4, 4, 3]
    assert told[0] == (0, COUNT)
    assert told[-1] == (COUNT, COUNT)


@pytest.mark.parametrize("size", [2, 4])
def test_several_processes_make_the_same_batches_and_the_same_rows(size):
    alone = Noise()
    wanted = rows_of(alone, {"colour": Colour()}, batch_size=BATCH)["colour"]
    shared = [Noise() for _ in range(size)]
    found = in_threads(
        size, lambda w: rows_of(shared[w.rank], {"colour": Colour()}, batch_size=BATCH, workers=w)["colour"]
    )
    assert all(torch.equal(rows, wanted) for rows in found)
    # networks that are split over processes are called by all of them, or by none
    assert len({len(images.batches) for images in shared}) == 1
    assert all(batch in alone.batches for images in shared for batch in images.batches)


@pytest.mark.parametrize("size", [1, 2])
def test_what_was_stopped_goes_on_to_the_same_bits_with_what_is_missing(tmp_path, size):
    wanted = rows_of(Noise(), {"colour": Colour()}, batch_size=BATCH)["colour"]
    with pytest.raises(KeyboardInterrupt):
        rows_of(Noise(stops_at=3), {"colour": Colour()}, batch_size=BATCH, keep=tmp_path)
    shared, told = [Noise() for _ in range(size)], []
    found = in_threads(
        size,
        lambda w: rows_of(
            shared[w.rank],
            {"colour": Colour()},
            batch_size=BATCH,
            workers=w,
            keep=tmp_path,
            on_image=lambda *done: told.append(done),
        )["colour"],
    )
    assert all(torch.equal(rows, wanted) for rows in found)
    read = sorted({batch[0] for images in shared for batch in images.batches})
    assert read == [12, 16, 20]
    assert told[0] == (12, COUNT)


def test_a_batch_whose_file_is_damaged_is_made_again(tmp_path):
    wanted = rows_of(Noise(), {"colour": Colour()}, batch_size=BATCH, keep=tmp_path)["colour"]
    path = next(tmp_path.rglob("00000008-00000012*"))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    images = Noise()
    assert torch.equal(rows_of(images, {"colour": Colour()}, batch_size=BATCH, keep=tmp_path)["colour"], wanted)
    assert images.batches == [[8, 9, 10, 11]]


@pytest.mark.parametrize("other", ["images", "extractor", "batch size"])
def test_rows_of_something_else_are_not_taken(tmp_path, other):
    rows_of(Noise(), {"colour": Colour()}, batch_size=BATCH, keep=tmp_path)
    images, maker, size = Noise(), Colour(), BATCH
    if other == "images":
        images.fingerprint = "others"
    elif other == "extractor":
        maker.fingerprint = "another"
    else:
        size = 5
    rows_of(images, {"colour": maker}, batch_size=size, keep=tmp_path)
    assert sum(map(len, images.batches)) == COUNT


def test_what_was_kept_can_be_given_up(tmp_path):
    keep = tmp_path / "kept"
    rows_of(Noise(), {"colour": Colour()}, batch_size=BATCH, keep=keep)
    assert any(keep.rglob("*.safetensors"))
    forget_rows(Noise(), {"colour": Colour()}, batch_size=BATCH, keep=keep)
    assert not keep.exists()


def test_an_image_that_one_process_cannot_read_stops_all_of_them():
    found = in_threads(2, lambda w: rows_of(Noise(bad=6), {"colour": Colour()}, batch_size=BATCH, workers=w))
    assert all(isinstance(error, UserError) for error in found)
    assert str(found[1]) == "picture 6: the image ends early."
    assert "process 1" in str(found[0])
    assert "picture 6: the image ends early." in str(found[0])
    assert [error.exit_code for error in found] == [3, 3]


def test_an_image_without_finite_row_is_named():
    images = Noise()
    images._pixels[9] = 0
    with pytest.raises(DataError, match=r"^picture 9: colour makes numbers of it that are not finite"):
        rows_of(images, {"colour": Colour()}, batch_size=BATCH)


def test_too_large_a_batch_is_told_with_what_to_turn():
    class Large(Noise):
        def read(self, indices):
            raise torch.OutOfMemoryError

    with pytest.raises(OutOfMemory, match=r"noise: 4 images at once .* smaller batch_size"):
        rows_of(Large(), {"colour": Colour()}, batch_size=BATCH)


def test_a_disk_that_cannot_be_written_costs_only_the_going_on(tmp_path):
    (tmp_path / "file").write_text("")
    images = Noise()
    with pytest.warns(UserWarning, match="begins anew") as told:
        rows = rows_of(images, {"colour": Colour()}, batch_size=BATCH, keep=tmp_path / "file")
    assert len(told) == 1
    assert torch.equal(rows["colour"], images.wanted())

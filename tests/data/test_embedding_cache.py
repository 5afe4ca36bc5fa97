"""The cache of embeddings: each is made once, and a wrong one is never given."""

import errno
import os
import warnings

import numpy as np
import pytest
import torch
from torch import Tensor

from eclosion.data.embedding_cache import EmbeddingCache, EncodingCache
from eclosion.errors import EnvironmentProblem

DIM = 5


class Counting:
    """An encoder that counts the images it sees; an embedding is a function of its own image alone."""

    dim = DIM

    def __init__(self, fingerprint: str = "f00d") -> None:
        self.fingerprint, self.seen = fingerprint, 0

    def __call__(self, image: Tensor) -> Tensor:
        self.seen += len(image)
        flat = image.flatten(1).double()
        weights = torch.arange(1, flat.shape[1] * DIM + 1).reshape(-1, DIM).double()
        return torch.stack([(row[:, None] * weights.sin()).sum(0) for row in flat]).float()

    def to(self, device):
        return self


def levels(number, seed=0, size=(6, 4)):
    """Pictures of eight-bit levels, as a loader makes them."""
    values = np.random.default_rng(seed).integers(0, 256, (number, 3, *size)).astype(np.float32)
    return torch.from_numpy(((values / 255) - np.float32(0.5)) * 2)


def cache(folder, **options):
    return EmbeddingCache(folder, Counting(), **options)


def only_file(folder):
    (path,) = folder.iterdir()
    return path


def test_an_image_is_encoded_once_for_all_caches_of_a_folder(tmp_path):
    image = levels(7)
    first, second = cache(tmp_path), cache(tmp_path)
    wanted = Counting()(image)
    assert torch.equal(first(image[:5]), wanted[:5])
    assert torch.equal(first(image[[4, 6, 0, 4, 5]]), wanted[[4, 6, 0, 4, 5]])
    assert torch.equal(second(image.flip(0)), wanted.flip(0))
    assert (first.encoder.seen, second.encoder.seen) == (7, 0)
    assert (first.num_made, first.num_found) == (7, 3)
    assert (second.num_made, second.num_found) == (0, 7)


def test_images_that_differ_in_one_bit_or_in_shape_are_different_images(tmp_path):
    made = cache(tmp_path)
    image = levels(1)
    other = image.clone()
    other.view(-1)[17] = torch.nextafter(other.view(-1)[17], torch.tensor(2.0))
    turned = image.reshape(1, 3, 4, 6)  # the same bytes
    for each in (image, other, turned, -image):
        assert torch.equal(made(each), Counting()(each))
    assert made.encoder.seen == 4


def test_no_images_give_no_embeddings(tmp_path):
    assert cache(tmp_path)(levels(0)).shape == (0, DIM)


def test_a_flipped_bit_anywhere_is_an_image_that_was_not_seen_and_never_a_wrong_embedding(tmp_path):
    image = levels(40)
    wanted = cache(tmp_path, limit_gb=8 * 68 * 3 / 2**30)(image)  # 24 places: all are taken
    path = only_file(tmp_path)
    whole = path.read_bytes()
    assert len(whole) == 8 * (48 + 4 * DIM) * 3
    for at in range(0, len(whole), 13):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ (1 << at % 8)]) + whole[at + 1 :])
        again = cache(tmp_path, limit_gb=8 * 68 * 3 / 2**30)
        assert torch.equal(again(image), wanted)
        assert again.num_found > 10
        path.write_bytes(whole)


@pytest.mark.parametrize("length", [0, 1, 700, 1631])
def test_a_file_that_was_cut_short_is_used_as_far_as_it_goes(tmp_path, length):
    image = levels(10)
    limit = {"limit_gb": 8 * 68 * 3 / 2**30}
    wanted = cache(tmp_path, **limit)(image)
    os.truncate(only_file(tmp_path), length)
    for _ in range(2):
        again = cache(tmp_path, **limit)
        assert torch.equal(again(image), wanted)
    assert again.num_found > 5  # it was repaired


def test_more_images_than_fit_take_no_more_room_and_most_of_what_is_kept_is_of_use(tmp_path):
    limit = 8 * 68 * 4  # 32 places
    made = cache(tmp_path, limit_gb=limit / 2**30)
    image = levels(64)
    wanted = Counting()(image)
    for _ in range(3):  # in the same order each time: to drop what was used longest ago would find nothing
        assert torch.equal(torch.cat([made(part) for part in image.split(8)]), wanted)
    assert only_file(tmp_path).stat().st_size <= limit
    assert made.num_found > 15


def test_a_file_takes_the_room_of_what_is_in_it(tmp_path):
    cache(tmp_path, limit_gb=4)(levels(3))
    status = only_file(tmp_path).stat()
    assert status.st_size > 3 * 2**30
    assert status.st_blocks * 512 < 2**20


def test_nothing_is_kept_where_there_is_no_room_for_anything(tmp_path):
    for limit in (0.0, 100 / 2**30):
        made = cache(tmp_path / "new", limit_gb=limit)
        for _ in range(2):
            assert torch.equal(made(levels(3)), Counting()(levels(3)))
        assert (made.num_made, made.num_found) == (6, 0)
    assert not (tmp_path / "new").exists()


def test_encoders_do_not_share_and_the_one_that_was_used_longest_ago_gives_way(tmp_path):
    image, limit = levels(200), 2**16 / 2**30
    names = []
    for age, fingerprint in enumerate(("aa", "bb", "cc")):
        made = EmbeddingCache(tmp_path, Counting(fingerprint), limit_gb=limit)
        made(image)
        assert made.num_made == 200
        (name,) = {path.name for path in tmp_path.iterdir()} - set(names)
        os.utime(tmp_path / name, (age, age))
        names.append(name)
    # each takes about 16 KiB; a small limit leaves room for the newest one alone
    EmbeddingCache(tmp_path, Counting("dd"), limit_gb=2**15 / 2**30)(image[:1])
    left = {path.name[:2] for path in tmp_path.iterdir()}
    assert "dd" in left
    assert "aa" not in left
    assert "cc" in left or left == {"dd"}


def test_processes_that_write_to_one_small_file_at_a_time_never_read_a_wrong_embedding(tmp_path):
    limit, image = 8 * 68 * 2 / 2**30, levels(48)
    wanted = Counting()(image)
    children = []
    for seed in range(3):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 on forks of a process with threads
            child = os.fork()
        if child == 0:
            status = 1
            try:
                made, order = cache(tmp_path, limit_gb=limit), np.random.default_rng(seed)
                rows = [order.permutation(48)[:8] for _ in range(60)]
                status = int(not all(torch.equal(made(image[some]), wanted[some]) for some in rows))
            finally:
                os._exit(status)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0]


def test_a_process_that_dies_between_the_two_writes_of_a_row_leaves_nothing_wrong(tmp_path, monkeypatch):
    image, calls, pwrite = levels(6), [0], os.pwrite

    class Died(BaseException):
        pass

    def dying(*args):
        calls[0] += 1
        if calls[0] == at:
            raise Died
        return pwrite(*args)

    wanted = Counting()(image)
    for at in range(1, 8):
        calls[0] = 0
        monkeypatch.setattr(os, "pwrite", dying)
        with pytest.raises(Died):
            cache(tmp_path / str(at))(image)
        monkeypatch.setattr(os, "pwrite", pwrite)
        again = cache(tmp_path / str(at))
        assert torch.equal(again(image), wanted)
        assert again.num_found == (at - 1) // 2


def test_a_full_disk_is_told_once_and_embeddings_are_made_each_time(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    made = cache(tmp_path)
    monkeypatch.setattr(os, "pwrite", full)
    with pytest.warns(UserWarning, match=r"no more embeddings can be kept \(No space left on device\)") as told:
        assert torch.equal(made(levels(5)), Counting()(levels(5)))
    assert len(told) == 1
    assert torch.equal(made(levels(5)), Counting()(levels(5)))
    assert made.num_found == 0


def test_a_disk_that_cannot_be_read_is_one_that_holds_nothing(tmp_path, monkeypatch):
    def broken(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    made = cache(tmp_path)
    made(levels(5))
    monkeypatch.setattr(os, "pread", broken)
    with pytest.warns(UserWarning, match="Input/output error"):
        assert torch.equal(made(levels(5)), Counting()(levels(5)))


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(EnvironmentProblem, match="embeddings cannot be kept") as caught:
        cache(tmp_path / "file/embeddings")(levels(1))
    assert "ECLOSION_CACHE" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_folder_of_all_caches_is_the_default(tmp_path, monkeypatch):
    monkeypatch.setenv("ECLOSION_CACHE", str(tmp_path))
    EmbeddingCache(None, Counting())(levels(1))
    assert only_file(tmp_path / "embeddings").name.startswith("f00d-cpu-")


@pytest.mark.gpu
def test_embeddings_made_on_a_gpu_have_a_file_of_their_own(tmp_path):
    image = levels(8)
    EmbeddingCache(tmp_path, Counting())(image)
    made = EmbeddingCache(tmp_path, Counting())
    made.encoder = lambda image: Counting()(image.cpu()).cuda()
    assert torch.equal(made(image.cuda()).cpu(), Counting()(image))
    assert made(image.cuda()).is_cuda
    assert (made.num_made, made.num_found) == (8, 8)


class Spelling:
    """A text encoder that counts the captions it sees; an encoding is the numbers of the first letters."""

    dim, num_tokens, num_cut, fingerprint = 2, 3, 0, "letters"

    def __init__(self) -> None:
        self.seen = 0

    def tokens(self, captions):
        self.seen += len(captions)
        letters = [[float(ord(letter)) for letter in f"{caption:<6}"[:6]] for caption in captions]
        return torch.tensor(letters).reshape(-1, 3, 2)

    def to(self, device):
        return self


def test_a_caption_is_encoded_once_for_all_caches_of_a_folder_and_by_its_very_letters(tmp_path):
    captions = ["cat", "Cat", "cat ", "", "caté", "cat"]
    first, second = (EncodingCache(tmp_path, Spelling()) for _ in range(2))
    none = EncodingCache(tmp_path / "none", Spelling(), limit_gb=0)
    cpu = torch.device("cpu")
    for cache in (first, second, none):
        assert torch.equal(cache(captions, cpu), Spelling().tokens(captions))
        assert cache([], cpu).shape == (0, 3, 2)
    assert [cache.encoder.seen for cache in (first, second, none)] == [5, 0, 6]
    assert (first.num_made, first.num_found, second.num_found) == (5, 1, 6)
    assert not (tmp_path / "none").exists()

"""Folders of embeddings: which file belongs to which shard, which rows count, and that no shard gets another's."""

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from eclosion.data import embeddings
from eclosion.data.embeddings import EmbeddingFolder
from eclosion.data.file_cache import FileCache
from eclosion.data.remote import Place
from eclosion.errors import BadSample, ConfigError, DataError, EnvironmentProblem


class Local:
    """A cache for files that are local already."""

    def __init__(self):
        self.asked = []

    def open(self, place):
        self.asked.append(place.url)
        return Path(place.url).open("rb")


def rows_of(number, rows=6, dim=4, dtype="f4"):
    """Rows that tell their shard and their place in it: number + row / 100, and never 0."""
    return (np.full((rows, dim), number) + np.arange(1, rows + 1)[:, None] / 100).astype(dtype)


def fill(folder, *numbers, name="img_emb_{:04d}.npy", **options):
    folder.mkdir(parents=True, exist_ok=True)
    for number in numbers:
        np.save(folder / name.format(number), rows_of(number, **options))
    return folder


def opened(folder, kind="image", cache=None, **options):
    return EmbeddingFolder.open(str(folder), kind=kind, cache=cache or Local(), **options)


def bad(call, *args):
    with pytest.raises(BadSample) as caught:
        call(*args)
    assert "\n" not in str(caught.value)
    return caught.value.reason, str(caught.value)


def message(kind, call, *args, **options):
    with pytest.raises(kind) as caught:
        call(*args, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", ">f4"])
def test_a_row_is_bound_to_its_shard_whatever_the_order_of_asking(tmp_path, dtype):
    folder = opened(fill(tmp_path, 0, 3, 12, dtype=dtype))
    assert folder.numbers == {0, 3, 12}
    for number, row in [(12, 5), (0, 0), (3, 2), (0, 5), (12, 0)]:
        found = folder.row(number, row)
        assert (found.dtype, found.shape) == (np.float32, (4,))
        assert found.tolist() == rows_of(number, dtype=dtype)[row].astype(np.float32).tolist()
        assert found.flags.c_contiguous
        assert found.flags.writeable  # a copy: the map is not handed out


def test_text_encodings_have_one_vector_per_token(tmp_path):
    array = np.random.default_rng(0).normal(size=(5, 7, 3)).astype("f2")
    np.save(tmp_path / "text_emb_2.npy", array)
    folder = opened(tmp_path, kind="text")
    assert folder.check(2) == (5, (7, 3))
    assert np.array_equal(folder.row(2, 4), array[4].astype("f4"))


def test_strays_are_ignored_and_any_prefix_and_width_is_understood(tmp_path):
    fill(tmp_path, 7, name="a_b_c_{:09d}.npy")
    for name in ("README", "meta_7.json", "x.npy", "emb_7.npy.part", "emb_x7.npy", "emb_7.fp16.npy", "emb_-8.npy"):
        (tmp_path / name).write_bytes(b"\x80junk")
    (tmp_path / "_9.npy").mkdir()  # a folder that looks like one
    folder = opened(tmp_path, shards=range(8))
    assert folder.numbers == {7}
    assert folder.check(7) == (6, (4,))


def test_two_files_for_one_shard_are_refused(tmp_path):
    fill(fill(tmp_path, 1, 2), 2, name="img_emb_{:05d}.npy")
    assert message(DataError, opened, tmp_path) == (
        f"{tmp_path}: img_emb_00002.npy and img_emb_0002.npy are both for shard 2. Keep one of them; arrays of another "
        "kind belong in a folder of their own."
    )


def test_a_zero_row_or_one_out_of_range_is_no_embedding(tmp_path):
    array = rows_of(0)
    array[2] = 0
    array[3, 1:] = 0  # not all zero
    np.save(tmp_path / "e_0.npy", array)
    folder = opened(tmp_path)
    at = f"{tmp_path}/e_0.npy row"
    assert bad(folder.row, 0, 2) == (
        "no_embedding",
        f"{at} 2: is all zero, which stands for no embedding.",
    )
    assert bad(folder.row, 0, 6) == ("no_embedding", f"{at} 6: the array has 6 rows, and no row 6.")
    assert bad(folder.row, 0, -1) == (
        "no_embedding",
        f"{at} -1: the key of the sample does not end in the number of a row.",
    )
    assert folder.row(0, 3).tolist() == array[3].tolist()


def test_a_row_that_float32_cannot_hold_is_not_finite(tmp_path):
    array = rows_of(0, dtype="f8")
    array[1, 2], array[2, 0], array[3, 3] = np.nan, -np.inf, 1e300
    np.save(tmp_path / "e_0.npy", array)
    folder = opened(tmp_path)
    for row in (1, 2, 3):
        assert bad(folder.row, 0, row) == (
            "not_finite",
            f"{tmp_path}/e_0.npy row {row}: holds NaN or infinity, or numbers too large for float32.",
        )
    assert folder.row(0, 0).tolist() == array[0].astype("f4").tolist()


def damage(folder):
    """Of shards 0 to 9 only 0 and 9 are whole, and 5 is missing."""
    fill(folder, *range(10))
    path = {number: folder / f"img_emb_{number:04d}.npy" for number in range(10)}
    path[1].write_bytes(path[1].read_bytes()[:-4])
    path[2].write_bytes(b"")
    np.save(path[3], rows_of(3, dim=5))
    np.save(path[4], np.zeros((6, 2, 4), "f4"))
    path[5].unlink()
    np.save(path[6], np.arange(24).reshape(6, 4))
    np.save(path[7], np.asfortranarray(rows_of(7)))
    np.save(path[8], np.array([{}] * 6, object), allow_pickle=True)
    return {number: str(each) for number, each in path.items()}


def test_a_missing_or_damaged_array_costs_exactly_its_own_shard(tmp_path):
    path = damage(tmp_path)
    folder = opened(tmp_path)
    said = {}
    for row in (0, 5, 3):  # asked for between whole ones, again and again
        for number in range(10):
            if number in (0, 9):
                assert folder.row(number, row).tolist() == rows_of(number)[row].tolist()
            else:
                said.setdefault(number, set()).add(bad(folder.row, number, row))
    assert said == {
        1: {(
            "embedding_shard",
            f"{path[1]}: the array is damaged: holds 92 bytes of numbers, and float32 (6, 4) is 96; the file is "
            "truncated.",
        )},
        2: {("embedding_shard", f"{path[2]}: is not a .npy file (it is empty).")},
        3: {(
            "embedding_shard",
            f"{path[3]}: its rows are [5], and those of the first array that was opened are [4]. All must be equal.",
        )},
        4: {(
            "embedding_shard",
            f"{path[4]}: is an array of shape (6, 2, 4), and image embeddings are (rows, dim).",
        )},
        5: {("embedding_shard", f"data.source.img_embeddings_url, shard 5: there is no array for it in {tmp_path}.")},
        6: {("embedding_shard", f"{path[6]}: holds int64, and embeddings are floating point.")},
        7: {(
            "embedding_shard",
            f"{path[7]}: is stored in Fortran order, in which a row is spread over the whole file. Save "
            "np.ascontiguousarray of it.",
        )},
        8: {(
            "embedding_shard",
            f"{path[8]}: holds Python objects, which are never read. Save it as float16, float32, float64 or an "
            "integer type.",
        )},
    }  # fmt: skip


def test_pooled_embeddings_are_no_text_encodings(tmp_path):
    folder = opened(fill(tmp_path, 0), kind="text")
    assert message(DataError, folder.check, 0) == (
        f"{tmp_path}/img_emb_0000.npy: is an array of shape (6, 4), and text embeddings are (rows, tokens, dim), one "
        "vector per token. It seems to hold pooled embeddings."
    )


def test_what_is_wrong_with_an_array_is_found_once(tmp_path):
    damage(tmp_path)
    folder = opened(tmp_path, cache=(cache := Local()))
    for row in range(5):
        bad(folder.row, 1, row)
    assert cache.asked == [f"{tmp_path}/img_emb_0001.npy"]


def test_a_network_that_fails_is_not_a_damaged_shard_and_is_asked_again(tmp_path):
    class Flaky(Local):
        def open(self, place):
            if not self.asked:
                self.asked.append("failed")
                raise EnvironmentProblem("the network is down")
            return super().open(place)

    folder = opened(fill(tmp_path, 0), cache=Flaky())
    with pytest.raises(EnvironmentProblem):
        folder.row(0, 0)
    assert folder.row(0, 0).tolist() == rows_of(0)[0].tolist()


def test_a_file_that_shrinks_while_it_is_mapped_is_an_error_and_no_crash(tmp_path):
    folder = opened(fill(tmp_path, 0, rows=5000, dim=64))
    folder.row(0, 4999)
    path = tmp_path / "img_emb_0000.npy"
    os.truncate(path, 4096)
    assert bad(folder.row, 0, 4999) == ("embedding_shard", f"{path}: the file became shorter while it was in use.")
    assert bad(folder.row, 0, 0)[0] == "embedding_shard"


def test_a_file_that_was_replaced_before_it_was_opened_is_an_error(tmp_path):
    folder = opened(fill(tmp_path, 0, 1), cache=FileCache(limit_bytes=0))
    fill(tmp_path, 1, rows=7)
    reason, said = bad(folder.row, 1, 6)
    assert reason == "embedding_shard"
    assert said.startswith(f"{tmp_path}/img_emb_0001.npy: the file changed after this run had looked at it.")
    assert folder.row(0, 0).tolist() == rows_of(0)[0].tolist()


def test_few_arrays_stay_mapped(tmp_path, monkeypatch):
    monkeypatch.setattr(embeddings, "MAX_OPEN", 3)
    folder = opened(fill(tmp_path, *range(8)))
    fds = len(list(Path("/proc/self/fd").iterdir()))
    for number in [*range(8), *range(8)]:
        assert folder.row(number, 1).tolist() == rows_of(number)[1].tolist()
    assert len(list(Path("/proc/self/fd").iterdir())) <= fds + 3


def test_many_threads_get_the_rows_of_their_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(embeddings, "MAX_OPEN", 2)
    path = damage(tmp_path)
    folder = opened(tmp_path)
    folder.check(0)
    start = threading.Barrier(8)

    def read(thread):
        start.wait()
        rng = np.random.default_rng(thread)
        for number, row in rng.integers(0, (10, 6), (300, 2)).tolist():
            try:
                found = folder.row(number, row)
            except BadSample as error:
                assert number not in (0, 9), error  # noqa: PT017
            else:
                assert found.tolist() == rows_of(number)[row].tolist(), path[number]

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(read, range(8)))


def test_only_the_shards_in_use_are_looked_at(tmp_path):
    folder = opened(fill(tmp_path, *range(6)), shards=[1, 4, 77])
    assert folder.numbers == {1, 4}
    assert bad(folder.row, 77, 0)[0] == "embedding_shard"


def test_the_fingerprint_is_of_kind_names_and_sizes_and_not_of_times_or_places(tmp_path):
    one, two = fill(tmp_path / "one", 0, 1), fill(tmp_path / "two", 0, 1)
    os.utime(two / "img_emb_0000.npy", (1, 1))
    fingerprint = opened(one).fingerprint
    assert opened(two).fingerprint == fingerprint
    fill(two, 1, rows=7)
    found = {fingerprint, opened(two).fingerprint, opened(one, shards=[0]).fingerprint, opened(one, "text").fingerprint}
    assert len(found) == 4


def test_an_empty_or_wrong_folder_says_what_it_holds(tmp_path):
    wanted = f"data.source.img_embeddings_url: {tmp_path} holds no arrays NAME_<shard number>.npy; it holds"
    assert message(DataError, opened, tmp_path) == f"{wanted} nothing. Give the folder in which they are."
    for name in ("a.tar", "b.tar", "README"):
        (tmp_path / name).touch()
    assert message(DataError, opened, tmp_path) == (f"{wanted} 2 .tar, 1 no suffix. Give the folder in which they are.")


def test_a_folder_without_any_of_the_shards_in_use_is_refused(tmp_path):
    fill(tmp_path, 0, 1)
    assert message(DataError, opened, tmp_path, shards=[5]) == (
        f"data.source.img_embeddings_url: none of the shards has an array in {tmp_path}."
    )


def test_a_template_names_the_file_of_each_shard(tmp_path):
    fill(tmp_path, 0, 2, name="emb_{:06d}.npy")
    folder = opened(tmp_path / "emb_{}.npy", shards=range(4))
    assert folder.numbers == {0, 2}
    assert folder.row(2, 0).tolist() == rows_of(2)[0].tolist()
    reason, said = bad(folder.row, 3, 0)
    assert reason == "embedding_shard"
    assert f"{tmp_path}/emb_000003.npy" in said
    assert opened(tmp_path / "emb_{}.npy", shards=[2], shard_width=6).numbers == {2}


@pytest.mark.parametrize(
    ("url", "options", "said"),
    [
        (
            "http://host/emb/",
            {},
            "http://host/emb/ cannot be listed, so the names of the arrays are not known. Give their name with {} in "
            "place of the shard number, such as http://host/emb/img_emb_{}.npy.",
        ),
        ("/x/emb_{}_{}.npy", {"shards": [0]}, "/x/emb_{}_{}.npy must have {} once, in place of the shard number."),
        ("/x/emb_{00..09}.npy", {}, "/x/emb_{00..09}.npy must have {} once, in place of the shard number."),
        ("/x/emb_{}.bin", {"shards": [0]}, "/x/emb_{}.bin must end in {}.npy."),
        ("/x/e_{}.npy", {}, "/x/e_{}.npy needs the numbers of the shards. Give data.source.end_shard."),
    ],
)
def test_a_url_of_the_wrong_form_is_refused(monkeypatch, url, options, said):
    monkeypatch.setattr(embeddings, "listing", lambda url: None)
    assert message(ConfigError, opened, url, **options) == f"data.source.img_embeddings_url: {said}"


def test_what_is_secret_in_a_url_is_not_shown(monkeypatch):
    secret = "https://me:hunter2@host/emb?token=hunter2"
    monkeypatch.setattr(embeddings, "listing", lambda url: None)
    said = message(ConfigError, opened, secret)
    assert "hunter2" not in said
    assert "https://host/emb" in said


def test_remote_files_are_bound_by_number_too(tmp_path, monkeypatch):
    """Whatever the cache calls its local files."""
    fill(tmp_path, 3, 4)

    class Fetching(Local):
        def open(self, place):
            self.asked.append(place.url)
            return (tmp_path / f"img_emb_{4 if place.url.endswith('_4.npy') else 3:04d}.npy").open("rb")

    cache = Fetching()
    monkeypatch.setattr(embeddings, "listing", lambda url: ["e_3.npy", "e_4.npy", "README"])
    monkeypatch.setattr(embeddings, "stat", lambda url: Place(url, size=None, version="1"))
    folder = opened("s3://bucket/emb", cache=cache)
    assert folder.row(4, 0).tolist() == rows_of(4)[0].tolist()
    assert folder.row(3, 0).tolist() == rows_of(3)[0].tolist()
    assert cache.asked == ["s3://bucket/emb/e_4.npy", "s3://bucket/emb/e_3.npy"]


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


def test_arrays_on_a_web_server_are_fetched_when_they_are_needed(tmp_path):
    fill(tmp_path / "served", 0, 1, 3, name="e_{:05d}.npy")
    path = tmp_path / "served/e_00001.npy"
    path.write_bytes(path.read_bytes()[:-4])
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=tmp_path / "served"))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    cache = FileCache(tmp_path / "cache", limit_bytes=10**6)
    try:
        url = f"http://127.0.0.1:{server.server_port}/e_{{}}.npy"
        folder = opened(url, cache=cache, shards=range(4), shard_width=5)
        assert folder.numbers == {0, 1, 3}
        assert folder.row(3, 2).tolist() == rows_of(3)[2].tolist()
        assert bad(folder.row, 1, 0)[1].endswith("/e_00001.npy: the array is damaged: holds 92 bytes of numbers, and "
                                                 "float32 (6, 4) is 96; the file is truncated.")  # fmt: skip
        assert bad(folder.row, 2, 0)[0] == "embedding_shard"
        assert folder.row(0, 5).tolist() == rows_of(0)[5].tolist()
    finally:
        cache.close()
        server.shutdown()
        server.server_close()

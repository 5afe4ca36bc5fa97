"""The cache: one download for all who want a file, a limit that holds, and nothing left by dead processes."""

import fcntl
import os
import random
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from eclosion.data.file_cache import LOCK, FileCache, cache_folder
from eclosion.data.pipes import pipes_allowed
from eclosion.data.places import NotFound, Patience, Place
from eclosion.data.remote import stat
from eclosion.errors import ConfigError, DataError, EnvironmentProblem

SIZE = 100_000
QUICK = Patience(deadline_seconds=0.5, first_wait_seconds=0.01, timeout_seconds=5, window_seconds=5)


def content(number):
    return random.Random(number).randbytes(SIZE)


class _Handler(BaseHTTPRequestHandler):
    """/<number>.tar is `content(number)`; numbers from 1000 on do not exist."""

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        number = int(self.path.partition("?")[0].strip("/").removesuffix(".tar"))
        self.server.asked.append(number)
        self.answer(content(number), number)

    def answer(self, body=b"", number=0):
        self.send_response(200 if number < 1000 else 404)
        self.send_header("Content-Length", str(SIZE))
        self.send_header("ETag", '"1"')
        self.end_headers()
        if body:
            self.wfile.write(body[: SIZE // 2])
            self.wfile.flush()
            while not self.server.flowing.wait(0.02) and not self.server.over.is_set():
                pass
            self.wfile.write(body[SIZE // 2 :])

    def log_message(self, *args):
        pass


class _Server(ThreadingHTTPServer):
    daemon_threads, block_on_close = True, False
    request_queue_size = 64  # with less, some wait a second to be let in

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.asked, self.flowing, self.over = [], threading.Event(), threading.Event()
        self.flowing.set()

    def place(self, number):
        return Place(f"http://127.0.0.1:{self.server_port}/{number}.tar", SIZE, 'etag "1"')

    def places(self, numbers):
        return [self.place(number) for number in numbers]

    def handle_error(self, request, client_address):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    with _Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.over.set()
        server.shutdown()
        thread.join()


@pytest.fixture
def make(tmp_path):
    """Caches of one folder, as several processes have them; closed at the end."""
    caches = []

    def make(num_files=10, **options):
        caches.append(FileCache(tmp_path / "cache", limit_bytes=num_files * SIZE, patience=QUICK, **options))
        return caches[-1]

    yield make
    for cache in caches:
        cache.close()


def kept(cache):
    """Names of the whole files in a cache, and of all others."""
    files = cache.folder / "files"
    names = {path.name for path in files.iterdir()} - {".lock"} if files.exists() else set()
    return {name for name in names if "." not in name}, {name for name in names if "." in name}


def keys(places):
    return {place.key for place in places}


def until(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.005)


def test_a_file_is_fetched_once_and_then_found_by_this_process_and_others(server, make):
    place = server.place(1)
    first, second = make(), make()
    path = first.path(place)
    assert path.read_bytes() == content(1)
    assert first.path(place) == second.path(place) == path
    with second.open(place) as file:
        assert os.pread(file.fileno(), 10, 5) == content(1)[5:15]
    assert server.asked == [1]
    assert kept(first) == ({place.key}, set())
    first.path(Place(place.url, SIZE, 'etag "1"'))
    assert server.asked == [1]
    with pytest.raises(DataError, match="changed after this run had looked at it"):
        first.path(Place(place.url, SIZE, 'etag "0"'))


def test_local_files_are_used_where_they_are_and_must_not_change(tmp_path, make):
    file = tmp_path / "0.tar"
    file.write_bytes(b"one")
    cache, place = make(num_files=0), stat(str(file))
    assert cache.path(place) == file
    assert cache.path(stat(file.as_uri())) == file
    with cache.open(place) as opened:
        assert opened.read() == b"one"
    cache.fetch_ahead([place])
    file.write_bytes(b"another")
    with pytest.raises(DataError, match="changed after this run had looked at it"):
        cache.open(place)
    file.unlink()
    with pytest.raises(NotFound):
        cache.open(place)
    assert not cache.folder.exists()


def test_threads_that_want_one_file_share_one_download(server, make):
    server.flowing.clear()
    cache, place = make(), server.place(1)
    with ThreadPoolExecutor(8) as pool:
        paths = [pool.submit(cache.path, place) for _ in range(8)]
        until(lambda: server.asked)
        time.sleep(0.1)
        server.flowing.set()
        assert {path.result().read_bytes() for path in paths} == {content(1)}
    assert server.asked == [1]


PROCESS = """
import random
import sys
from pathlib import Path
from eclosion.data.file_cache import FileCache
from eclosion.data.places import Place
_, folder, limit, port, ahead, *numbers = sys.argv


def place(number):
    return Place(f"http://127.0.0.1:{port}/{number}.tar", 100_000, 'etag "1"')


assert "torch" not in sys.modules
cache = FileCache(Path(folder), limit_bytes=int(limit))
print("ready", flush=True)
sys.stdin.readline()
cache.fetch_ahead([place(number) for number in ahead.split()])
for number in numbers:
    with cache.open(place(number)) as file:
        assert file.read() == random.Random(int(number)).randbytes(100_000), number
print("done", flush=True)
"""


def start(server, tmp_path, numbers, *, num_files=10, ahead=()):
    """A process that fetches some files, one after the other, once `go` is called."""
    arguments = [tmp_path / "cache", num_files * SIZE, server.server_port, " ".join(map(str, ahead)), *numbers]
    return subprocess.Popen(
        [sys.executable, "-c", PROCESS, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def go(*processes):
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()


def end(*processes):
    for process in processes:
        out, _ = process.communicate(timeout=30)
        assert (out, process.returncode) == ("done\n", 0)


def test_processes_that_want_one_file_share_one_download(server, make, tmp_path):
    server.flowing.clear()
    processes = [start(server, tmp_path, [1]) for _ in range(2)]
    go(*processes)
    until(lambda: server.asked)
    time.sleep(0.2)
    server.flowing.set()
    end(*processes)
    assert server.asked == [1]
    assert kept(make()) == ({server.place(1).key}, set())


def test_a_file_that_another_process_finishes_while_its_lock_is_taken_is_used(server, make, monkeypatch):
    cache, place, real = make(), server.place(1), fcntl.flock

    def flock(fd, operation):
        partial = cache.folder / "files" / f"{place.key}.partial"
        if partial.exists() and not server.asked:
            server.asked.append("by another")
            partial.write_bytes(content(1))
            partial.rename(partial.with_suffix(""))
        real(fd, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    assert cache.path(place).read_bytes() == content(1)
    assert server.asked == ["by another"]
    assert kept(cache) == ({place.key}, set())


def test_the_lock_of_a_file_that_is_gone_is_no_right_to_the_next_one(server, make, monkeypatch):
    cache, place, real, others = make(), server.place(1), fcntl.flock, []

    def flock(fd, operation):
        if not others:  # in this moment, another process removes the file, makes a new one and locks it
            partial = cache.folder / "files" / f"{place.key}.partial"
            partial.unlink()
            others.append(partial.open("w"))
            real(others[0].fileno(), fcntl.LOCK_EX)
            threading.Timer(0.2, lambda: (server.asked.append("the other ends"), others[0].close())).start()
        real(fd, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    assert cache.path(place).read_bytes() == content(1)
    assert server.asked == ["the other ends", 1]


def test_what_a_killed_process_was_fetching_is_fetched_anew_and_its_remains_go(server, make, tmp_path):
    server.flowing.clear()
    processes = [start(server, tmp_path, [number]) for number in (1, 2)]
    go(*processes)
    until(lambda: len(server.asked) == 2)
    cache = make()
    until(lambda: len(kept(cache)[1]) == 2)
    for process in processes:
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
    assert kept(cache) == (set(), {f"{server.place(n).key}.partial" for n in (1, 2)})
    server.flowing.set()
    assert cache.path(server.place(1)).read_bytes() == content(1)
    assert kept(cache) == ({server.place(1).key}, set())


def test_a_process_that_stands_still_with_a_file_is_named_and_not_waited_for_without_end(server, make, tmp_path):
    server.flowing.clear()
    process = start(server, tmp_path, [1])
    go(process)
    cache = make()
    until(lambda: kept(cache)[1] and server.asked)
    with pytest.raises(EnvironmentProblem, match=r"1.tar: another process fetches it .* has not got further for"):
        cache.path(server.place(1))
    server.flowing.set()
    end(process)
    assert cache.path(server.place(1)).read_bytes() == content(1)


def test_what_was_used_longest_ago_goes_first_and_the_limit_holds(server, make):
    cache = make(num_files=3)
    for number in (1, 2, 3, 1, 4):
        cache.path(server.place(number))
    assert kept(cache)[0] == keys(server.places([1, 3, 4]))
    cache.path(server.place(3))
    cache.path(server.place(5))
    assert kept(cache)[0] == keys(server.places([3, 4, 5]))
    make(num_files=2).path(server.place(6))
    assert kept(cache)[0] == keys(server.places([5, 6]))


def test_the_cache_agrees_with_a_list_that_forgets_its_oldest(server, make):
    cache, rng, model, fetched = make(num_files=4), random.Random(0), [], []
    for _ in range(60):
        number = rng.randrange(7)
        if number in model:
            model.remove(number)
        else:
            fetched.append(number)
        model = [*model, number][-4:]
        cache.path(server.place(number))
        assert kept(cache) == (keys(server.places(model)), set())
    assert server.asked == fetched


def test_several_processes_with_too_little_room_get_every_file_right(server, make, tmp_path):
    rng = random.Random(1)
    processes = [start(server, tmp_path, [rng.randrange(6) for _ in range(25)], num_files=3) for _ in range(3)]
    go(*processes)
    most, cache = 0, make(num_files=3)
    while any(process.poll() is None for process in processes):
        most = max(most, occupied(cache.folder / "files"))
        time.sleep(0.002)
    end(*processes)
    assert SIZE <= most <= 3 * SIZE
    assert kept(cache)[1] == set()


def occupied(folder):
    """Bytes in a cache, while no process makes room or gives a file its name."""
    if not (folder / LOCK).exists():
        return 0
    with (folder / LOCK).open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with suppress(FileNotFoundError):
            return sum(path.stat().st_size for path in folder.iterdir())
    return 0


def test_a_file_larger_than_the_limit_is_refused_with_the_option_to_raise(server, make, tmp_path):
    cache = make(num_files=1)
    cache.path(server.place(1))
    with pytest.raises(ConfigError, match=r"data.source.cache_limit_gb: .*/2.tar has .* GiB, and the cache may hold"):
        cache.path(Place(server.place(2).url, SIZE + 1, ""))
    with pipes_allowed(), pytest.raises(ConfigError, match="GiB and more, and the cache may hold"):
        cache.path(Place("pipe:yes", None, ""))
    assert server.asked == [1]
    (tmp_path / "x").write_bytes(b"x" * SIZE)
    with pipes_allowed():
        place = stat(f"pipe:cat {tmp_path}/x")
        assert cache.path(place).read_bytes() == b"x" * SIZE
        assert cache.path(place) == cache.path(place)
    assert kept(cache) == ({place.key}, set())


def test_an_open_file_stays_readable_when_its_room_is_needed(server, make):
    cache = make(num_files=1)
    with cache.open(server.place(1)) as file:
        cache.path(server.place(2))
        assert kept(cache)[0] == {server.place(2).key}
        assert file.read() == content(1)


def test_a_file_that_is_removed_before_it_is_opened_is_fetched_again(server, make, monkeypatch):
    cache, real, removed = make(), FileCache._fetched, []

    def fetched(self, place):
        path = real(self, place)
        if len(removed) < 3:
            removed.append(path)
            path.unlink()
        return path

    monkeypatch.setattr(FileCache, "_fetched", fetched)
    with cache.open(server.place(1)) as file:
        assert file.read() == content(1)
    assert server.asked == [1] * 4


def test_a_file_that_was_cut_is_fetched_again(server, make):
    cache = make()
    os.truncate(cache.path(server.place(1)), SIZE - 1)
    assert cache.path(server.place(1)).read_bytes() == content(1)
    assert server.asked == [1, 1]


def test_files_are_fetched_ahead_in_order_and_as_far_as_half_of_the_room(server, make):
    cache = make(num_files=8)
    cache.path(server.place(0))
    cache.fetch_ahead(server.places(range(1, 100)))
    until(lambda: kept(cache)[0] == keys(server.places(range(5))))
    time.sleep(0.1)
    assert sorted(server.asked) == [0, 1, 2, 3, 4]
    for number in range(1, 12):
        assert cache.path(server.place(number)).read_bytes() == content(number)
    until(lambda: len(server.asked) == 16)
    assert sorted(server.asked) == list(range(16))
    assert all(abs(place - number) <= 3 for place, number in enumerate(server.asked))  # three at a time, at most
    assert len(kept(cache)[0]) <= 8


def test_processes_of_one_run_share_what_may_be_fetched_ahead(server, make):
    cache = make(num_files=8, num_processes=2)
    cache.fetch_ahead(server.places(range(10)))
    until(lambda: len(kept(cache)[0]) == 2)
    time.sleep(0.1)
    assert sorted(server.asked) == [0, 1]


def test_what_is_under_way_is_waited_for_and_what_is_not_is_fetched_at_once(server, make):
    server.flowing.clear()
    cache = make(num_files=20)
    cache.fetch_ahead(server.places(range(1, 6)))
    until(lambda: sorted(server.asked) == [1, 2])
    with ThreadPoolExecutor(3) as pool:
        paths = {number: pool.submit(cache.path, server.place(number)) for number in (2, 5)}
        until(lambda: sorted(server.asked) == [1, 2, 5])
        server.flowing.set()
        assert all(path.result().read_bytes() == content(number) for number, path in paths.items())
    until(lambda: sorted(server.asked) == [1, 2, 3, 4, 5])


def test_a_new_plan_takes_the_place_of_the_old_one(server, make):
    server.flowing.clear()
    cache = make(num_files=20)
    cache.fetch_ahead(server.places(range(1, 6)))
    until(lambda: sorted(server.asked) == [1, 2])
    cache.fetch_ahead(server.places([2, 7]))
    server.flowing.set()
    until(lambda: kept(cache) == (keys(server.places([1, 2, 7])), set()))
    cache.fetch_ahead([])
    cache.fetch_ahead(server.places([1, 2]))
    time.sleep(0.05)
    assert server.asked[2:] == [7]


def test_what_was_fetched_ahead_is_not_removed_for_what_is_fetched_ahead(server, make):
    cache = make(num_files=4)
    for number in (0, 1, 2, 3):
        cache.path(server.place(number))
    cache.fetch_ahead(server.places([4, 5, 6]))
    until(lambda: kept(cache) == (keys(server.places([2, 3, 4, 5])), set()))
    cache.path(server.place(9))  # somebody waits for it: the oldest goes
    assert kept(cache)[0] == keys(server.places([3, 4, 5, 9]))
    cache.path(server.place(4))
    until(lambda: server.place(6).key in kept(cache)[0])
    assert {server.place(n).key for n in (4, 5, 6)} <= kept(cache)[0]


def test_what_was_fetched_ahead_stays_even_if_it_was_not_used_for_long(server, make):
    cache = make(num_files=4)
    cache.fetch_ahead(server.places([4]))
    until(lambda: kept(cache) == ({server.place(4).key}, set()))
    for number in (1, 2, 3):
        cache.path(server.place(number))
    cache.fetch_ahead(server.places([4, 6]))
    until(lambda: kept(cache) == (keys(server.places([4, 2, 3, 6])), set()))


def test_while_others_take_all_room_what_was_fetched_ahead_stays(server, make):
    cache, other = make(num_files=4), make(num_files=4)
    cache.fetch_ahead(server.places([4]))
    until(lambda: kept(cache) == ({server.place(4).key}, set()))
    server.flowing.clear()
    with ThreadPoolExecutor(3) as pool:
        paths = [pool.submit(other.path, server.place(number)) for number in (1, 2, 3)]
        until(lambda: occupied(cache.folder / "files") == 4 * SIZE)
        cache.fetch_ahead(server.places([4, 5]))
        time.sleep(0.2)
        assert server.place(4).key in kept(cache)[0]
        server.flowing.set()
        assert all(path.result() for path in paths)
    until(lambda: keys(server.places([4, 5])) <= kept(cache)[0])


def test_an_error_ahead_is_told_to_who_asks_for_the_file_and_the_others_go_on(server, make):
    cache = make()
    cache.fetch_ahead(server.places([1000, 1, 1001, 2]))
    until(lambda: kept(cache) == (keys(server.places([1, 2])), set()))
    for _ in range(2):
        with pytest.raises(NotFound, match=r"/1000.tar: does not exist"):
            cache.path(server.place(1000))
    assert sorted(server.asked) == [1, 2, 1000, 1000, 1001]


def test_closing_stops_what_is_under_way_at_once(server, make):
    server.flowing.clear()
    others = set(threading.enumerate())
    cache = make()
    cache.fetch_ahead(server.places([1, 2, 3]))
    until(lambda: sorted(server.asked) == [1, 2])
    with ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(cache.path, server.place(number)) for number in (1, 4)]
        until(lambda: sorted(server.asked) == [1, 2, 4])
        before = time.monotonic()
        cache.close()
        for path in waiting:
            with pytest.raises(RuntimeError, match="closed"):
                path.result(timeout=2)
        assert time.monotonic() - before < 1
    assert kept(cache) == (set(), set())
    assert not [t for t in set(threading.enumerate()) - others if t.name.startswith("eclosion-ahead")]
    with pytest.raises(RuntimeError, match="closed"):
        cache.path(server.place(1))
    cache.close()


def test_a_program_that_forgets_to_close_ends_all_the_same(server, tmp_path):
    server.flowing.clear()
    process = start(server, tmp_path, [], ahead=[1, 2])
    go(process)
    end(process)


@pytest.mark.parametrize("what", ["file", "no folder"])
def test_a_folder_that_cannot_be_used_is_named_with_the_cure(server, tmp_path, what, monkeypatch):
    folder = tmp_path / "file"
    folder.touch()
    if what == "no folder":
        folder = folder / "below"
    with (
        FileCache(folder, limit_bytes=10**9) as cache,
        pytest.raises(EnvironmentProblem, match=r"file.*ECLOSION_CACHE"),
    ):
        cache.path(server.place(1))


def test_names_in_the_cache_hold_no_secret_and_a_signature_makes_no_other_file(server, make):
    cache, place = make(), server.place(1)
    for sign in ("a", "b"):
        url = place.url.replace("http://", f"http://user-{sign}:secret-{sign}@") + f"?X-Amz-Signature=token-{sign}"
        path = cache.path(Place(url, SIZE, place.version))
        assert path.read_bytes() == content(1)
        assert path.name == place.key
    assert server.asked == [1]
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700


def test_the_folder_is_where_the_user_says_or_where_caches_are(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("ECLOSION_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    assert cache_folder() == tmp_path / ".cache" / "eclosion"
    monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
    assert cache_folder() == Path("/elsewhere/eclosion")
    monkeypatch.setenv("ECLOSION_CACHE", "~/mine")
    assert FileCache(limit_bytes=1).folder == tmp_path / "mine"
    monkeypatch.delenv("ECLOSION_CACHE")
    monkeypatch.setattr(sys, "platform", "darwin")
    assert cache_folder() == tmp_path / "Library" / "Caches" / "eclosion"

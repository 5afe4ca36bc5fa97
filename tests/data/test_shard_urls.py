"""From the URL in a config to shards: what it stands for, and what of it exists."""

import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import product

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from eclosion.data.pipes import pipes_allowed
from eclosion.data.shard_urls import MAX_SHARDS, NO_NUMBER, ShardUrl, expand
from eclosion.errors import ConfigError, DataError


def shards(url, **options):
    """What a command stands for: nothing is asked for of it, so these are the rules alone."""
    with pipes_allowed():
        found, missing = expand(f"pipe:cat {url}", **options)
    assert missing == []
    return [(shard.number, shard.url.removeprefix("pipe:cat ")) for shard in found]


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


@pytest.mark.parametrize(
    ("url", "options", "wanted"),
    [
        ("{}.tar", {"start_shard": 8, "end_shard": 10}, [(8, "000008.tar"), (9, "000009.tar"), (10, "000010.tar")]),
        ("{}.tar", {"end_shard": 1, "shard_width": 0}, [(0, "0.tar"), (1, "1.tar")]),
        ("a{}-of-9.tar", {"end_shard": 0, "shard_width": 2}, [(0, "a00-of-9.tar")]),
        ("a/{}/x.tar", {"end_shard": 0, "shard_width": 2}, [(0, "a/00/x.tar")]),
        ("{08..10}.tar", {}, [(8, "08.tar"), (9, "09.tar"), (10, "10.tar")]),
        ("{8..10}.tar", {}, [(8, "8.tar"), (9, "9.tar"), (10, "10.tar")]),
        ("{3..1}.tar", {}, [(3, "3.tar"), (2, "2.tar"), (1, "1.tar")]),
        ("{00..10..5}.tar", {}, [(0, "00.tar"), (5, "05.tar"), (10, "10.tar")]),
        ("{00..03}.tar", {"start_shard": 1, "end_shard": 2}, [(1, "01.tar"), (2, "02.tar")]),
        ("{0..1}-of-00099.tar", {}, [(0, "0-of-00099.tar"), (1, "1-of-00099.tar")]),
        ("{a,b}/{1,2}.tar", {}, [(1, "a/1.tar"), (2, "a/2.tar"), (1, "b/1.tar"), (2, "b/2.tar")]),
        ("{a,b}/{}.tar", {"end_shard": 1, "shard_width": 1},
         [(0, "a/0.tar"), (1, "a/1.tar"), (0, "b/0.tar"), (1, "b/1.tar")]),
        ("x{a,}.tar", {}, [(NO_NUMBER, "xa.tar"), (NO_NUMBER, "x.tar")]),
        ("p/laion-00104.tar", {}, [(104, "p/laion-00104.tar")]),
        ("p7/v2-part12x.00003.tar", {}, [(12, "p7/v2-part12x.00003.tar")]),
        ("p/train.tar", {}, [(NO_NUMBER, "p/train.tar")]),
        ("p/00104.tar -", {}, [(104, "p/00104.tar -")]),
        ("{}.tar | awk '{print $1, $2}' ${A,B}", {"end_shard": 0, "shard_width": 1},
         [(0, "0.tar | awk '{print $1, $2}' ${A,B}")]),
    ],
)  # fmt: skip
def test_what_a_url_stands_for(url, options, wanted):
    assert shards(url, **options) == wanted


TEXT = st.text(alphabet="ab01-_/. %$", max_size=8)


@given(TEXT, TEXT, st.integers(0, 10**6), st.integers(0, 20), st.integers(0, 9))
def test_numbers_put_in_are_the_inverse_of_taking_them_out(before, after, start, count, width):
    found = shards(f"{before}{{}}{after}x", start_shard=start, end_shard=start + count, shard_width=width)
    assert [number for number, _ in found] == list(range(start, start + count + 1))
    assert [url for _, url in found] == [
        f"{before}{n:0{width}d}{after}x" for n, _ in found
    ]  # Python's formatting agrees


@given(st.lists(st.lists(st.text(alphabet="abc012-.", max_size=3), min_size=2, max_size=4), min_size=1, max_size=3))
def test_lists_are_a_product(groups):
    wanted = ["x".join(words) for words in product(*groups)]
    assume(len(set(wanted)) == len(wanted))  # else it is refused
    found = [url for _, url in shards("x".join(f"{{{','.join(words)}}}" for words in groups))]
    assert found == wanted


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("{}/{}.tar", "has {} 2 times"),
        ("{0}.tar", r"write {} for the shard's number, without anything inside, and not {0}"),
        ("{:05d}.tar", "not {:05d}"),
        ("{0.__class__}.tar", "neither {} nor a range"),
        ("{a..c}.tar", "neither {} nor a range"),
        ("{0..}.tar", "neither {} nor a range"),
        ("{a,{b,c}}.tar", "lists within lists"),
        ("{}}.tar", "a brace without its partner"),
        ("{.tar", "a brace without its partner"),
        ("", "is empty"),
        ("{0..1000000}.tar", "stands for 1000001 shards"),
        ("{0..999999999999999999}{0..999999999999999999}.tar", "stands for 10{36} shards"),
        ("{1,1}.tar", "names a shard twice"),
        ("file://elsewhere/{0..1}.tar", "this machine"),
        ("nothing://x/{0..1}.tar", "not a protocol"),
        ("zip://{0..1}.tar::https://h/x", "chained"),
    ],
)
def test_a_url_that_cannot_be_read_is_refused_with_the_cure(url, message):
    pattern = message if "10{36}" in message else re.escape(message)
    with pytest.raises(ConfigError, match=pattern):
        expand(url)


def test_ranges_are_counted_and_not_made():
    with pytest.raises(ConfigError, match=f"makes 1000002 shards.*limit is {MAX_SHARDS}"):
        expand("/nowhere/{}.tar", end_shard=1_000_001)
    with pytest.raises(ConfigError, match="end_shard: 3 is less than start_shard=4"):
        expand("/nowhere/{}.tar", start_shard=4, end_shard=3)
    with pytest.raises(ConfigError, match="0 or more"):
        expand("/nowhere/{}.tar", start_shard=-1)
    with pytest.raises(ConfigError, match="leave nothing of"):
        shards("{0..3}.tar", start_shard=4)
    with pytest.raises(ConfigError, match="no number to compare"):
        shards("train.tar", start_shard=4)


def test_without_a_last_shard_all_that_exist_are_taken_in_order(tmp_path):
    touch(
        tmp_path,
        "00010.tar",
        "00002.tar",
        "00000.tar",
        "00002.json",
        "a00001.tar",
        "1.tar",
        "000003.tar",
        "x",
        "d/00004.tar",
    )
    for end in (None, 9_999_999, 10**12):
        found, missing = expand(f"{tmp_path}/{{}}.tar", end_shard=end, shard_width=5)
        assert found == [ShardUrl(n, f"{tmp_path}/{n:05d}.tar") for n in (0, 2, 10)]
        assert missing == []
    found, _ = expand(f"{tmp_path}/{{}}.tar", start_shard=1, shard_width=5)
    assert [shard.number for shard in found] == [2, 10]
    found, _ = expand(f"{tmp_path.as_uri()}/{{}}.tar", shard_width=5)
    assert [shard.url for shard in found] == [f"{tmp_path.as_uri()}/{n:05d}.tar" for n in (0, 2, 10)]


def test_numbers_with_more_digits_than_the_width_count(tmp_path):
    touch(tmp_path, "99.tar", "100.tar", "0101.tar")
    assert [shard.number for shard in expand(f"{tmp_path}/{{}}.tar", shard_width=2)[0]] == [99, 100]


def test_shards_beside_the_working_folder_are_found(tmp_path, monkeypatch):
    touch(tmp_path, "7.tar", "sub/8.tar")
    monkeypatch.chdir(tmp_path)
    assert expand("{}.tar", shard_width=1)[0] == [ShardUrl(7, "7.tar")]
    assert expand("./{}.tar", shard_width=1)[0] == [ShardUrl(7, "./7.tar")]
    assert expand("sub/{}.tar", shard_width=1)[0] == [ShardUrl(8, "sub/8.tar")]
    assert expand("7.tar")[0] == [ShardUrl(7, "7.tar")]


def test_the_number_may_be_a_folder(tmp_path):
    touch(tmp_path, "00/images.tar", "01/other.tar", "02/images.tar", "x/images.tar")
    found, _ = expand(f"{tmp_path}/{{}}/images.tar", shard_width=2)
    assert [shard.number for shard in found] == [0, 2]


def test_missing_shards_are_counted_in_one_message_or_left_out(tmp_path):
    touch(tmp_path, "0.tar", "3.tar", "9.tar", "10.tar", "12.tar")
    with pytest.raises(DataError) as caught:
        expand(f"{tmp_path}/{{}}.tar", end_shard=9, shard_width=1)
    assert f"7 of 10 shards do not exist: {tmp_path}/1.tar, {tmp_path}/2.tar, {tmp_path}/4.tar and 4 more." in str(
        caught.value
    )
    assert "skip_missing_shards" in str(caught.value)
    for url in (f"{tmp_path}/{{}}.tar", f"{tmp_path}/{{0..9}}.tar", f"{tmp_path}/{{9,8,7,6,5,4,3,2,1,0}}.tar"):
        found, missing = expand(url, end_shard=9, shard_width=1, skip_missing=True)
        assert sorted(shard.number for shard in found) == [0, 3, 9]
        assert sorted(missing) == [f"{tmp_path}/{n}.tar" for n in (1, 2, 4, 5, 6, 7, 8)]


@pytest.mark.parametrize("skip", [False, True])
def test_no_shard_at_all_is_an_error_that_sees_the_wrong_width(tmp_path, skip):
    touch(tmp_path, "00000.tar", "00001.tar")
    hint = re.escape("But there is 00000.tar: set data.source.shard_width=5.")
    for end in (None, 2):
        with pytest.raises(DataError, match=hint):
            expand(f"{tmp_path}/{{}}.tar", end_shard=end, skip_missing=skip)
    with pytest.raises(DataError, match=r"none with a higher number. The folder has 00000.tar and 1 more"):
        expand(f"{tmp_path}/img-{{}}.tar")
    with pytest.raises(DataError, match="none with a higher number"):
        expand(f"{tmp_path}/nowhere/{{}}.tar")
    with pytest.raises(DataError, match=r"00007.tar does not exist"):
        expand(f"{tmp_path}/00007.tar", skip_missing=skip)


def test_a_folder_is_answered_with_what_to_write(tmp_path):
    touch(tmp_path, "img-0000.tar", "img-0001.tar", "notes.txt")
    with pytest.raises(ConfigError) as caught:
        expand(str(tmp_path))
    assert f"Write {tmp_path}/img-{{}}.tar with data.source.shard_width=4 for the 2 that look like" in str(caught.value)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"is a folder.*Write it as .*/empty/{}.tar"):
        expand(f"{tmp_path}/empty")
    with pytest.raises(ConfigError, match="is a folder"):
        expand("https://host.invalid/shards/")


class _Handler(BaseHTTPRequestHandler):
    def do_HEAD(self):
        self.server.asked.append(self.path)
        self.send_response(200 if self.path in self.server.there else 404)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *args):
        pass


class _Server(ThreadingHTTPServer):
    request_queue_size = 64  # with less, some wait a second to be let in


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    server = _Server(("127.0.0.1", 0), _Handler)
    server.asked, server.there = [], set()
    server.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_where_nothing_can_be_listed_the_last_number_is_asked_for(server):
    for end in (None, 9_999_999):
        with pytest.raises(ConfigError, match=r"end_shard: how many shards .* cannot be listed there. Give the number"):
            expand(f"{server.url}/{{}}.tar", end_shard=end)
    with pipes_allowed(), pytest.raises(ConfigError, match="Give the number of the last one"):
        expand("pipe:cat {}.tar")
    with pytest.raises(ConfigError, match="too many to look for one by one"):
        expand(f"{server.url}/{{}}.tar", end_shard=200_000)
    with pytest.raises(ConfigError, match="--allow-pipe"):
        expand("pipe:cat {}.tar", end_shard=3)
    assert server.asked == []


def test_shards_of_a_web_server_are_looked_for_once_each(server):
    server.there = {f"/{n:06d}.tar?k=v" for n in range(30)} - {"/000007.tar?k=v"}
    url = f"{server.url}/{{}}.tar?k=v"
    with pytest.raises(DataError, match=r"1 of 30 shards do not exist: http://[^?]*/000007.tar\. "):
        expand(url, end_shard=29)
    assert sorted(server.asked) == [f"/{n:06d}.tar?k=v" for n in range(30)]
    found, missing = expand(url, end_shard=29, skip_missing=True)
    assert [shard.number for shard in found] == [n for n in range(30) if n != 7]
    assert missing == [f"{server.url}/000007.tar"]
    found, _ = expand(url.replace("{}", "000003"))
    assert found == [ShardUrl(3, url.replace("{}", "000003"))]


def test_a_config_with_the_default_upper_bound_asks_a_store_once(monkeypatch):
    import fsspec

    store = fsspec.filesystem("memory")
    for number in (0, 1, 5):
        store.pipe_file(f"/shards-here/{number:06d}.tar", b"x")
    asked = []
    monkeypatch.setattr(type(store), "info", lambda self, path, **more: asked.append(path))
    found, _ = expand("memory://shards-here/{}.tar", end_shard=9_999_999)
    assert [shard.number for shard in found] == [0, 1, 5]
    with pytest.raises(DataError, match="99998 of 100001 shards do not exist"):
        expand("memory://shards-here/{}.tar", end_shard=100_000)
    assert asked == []

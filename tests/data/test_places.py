"""What a URL is called in messages, and what tells one file from another."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eclosion.data.places import Place, local_path, one_line, quoted, scheme_of, shown
from eclosion.errors import ConfigError

SECRET = "hunter2-s3cr3t"


@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("data/00000.tar", "data/00000.tar"),
        ("file:///data/00000.tar", "file:///data/00000.tar"),
        (f"https://user:{SECRET}@host:8080/a/00000.tar?sig={SECRET}#{SECRET}", "https://host:8080/a/00000.tar"),
        (f"https://{SECRET}@host/00000.tar", "https://host/00000.tar"),
        (f"https://user:{SECRET}/half@host/00000.tar", "https://..."),
        (f"ftp://user:{SECRET}@[::1]:21/x.tar", "ftp://[::1]:21/x.tar"),
        (f"s3://key:{SECRET}@bucket/00000.tar", "s3://bucket/00000.tar"),
        ("hf://datasets/me/set@main/00000.tar", "hf://datasets/me/set@main/00000.tar"),
        ("abfs://container@account/00000.tar", "abfs://container@account/00000.tar"),
        ("pipe:cat /data/00000.tar", "pipe:cat /data/00000.tar"),
        (
            f"pipe:curl -sH 'Authorization: {SECRET}' https://u:{SECRET}@h/0.tar?t={SECRET}",
            "pipe:curl ... https://h/0.tar",
        ),
        (f"pipe:TOKEN={SECRET} fetch 00000.tar | gzip -d", "pipe:... 00000.tar ..."),
        (f"pipe:/usr/bin/aws s3 cp s3://b/00000.tar --key {SECRET} -", "pipe:aws ... s3://b/00000.tar ..."),
        ("data/a\nb\x1b[31m.tar", r"data/a\nb\x1b[31m.tar"),
    ],
)
def test_what_is_shown_of_a_url_holds_no_secret_and_one_line(url, text):
    assert shown(url) == text
    assert SECRET not in repr(Place(url, 1, ""))


@given(st.text(alphabet="abcXYZ019%._~-", min_size=6, max_size=30), st.sampled_from(["http", "https", "s3", "sftp"]))
def test_no_password_token_or_fragment_is_ever_shown(secret, scheme):
    for url in (
        f"{scheme}://user:{secret}@host/x.tar",
        f"{scheme}://{secret}:@host/x.tar",
        f"{scheme}://host/x.tar?token={secret}",
        f"{scheme}://host/x.tar#{secret}",
    ):
        assert shown(url) == f"{scheme}://host/x.tar"
        assert secret not in quoted(f"cannot open {url} (really)")


def test_the_words_of_others_are_cut_and_lose_the_secrets_in_their_urls():
    said = quoted(f"fatal:\n  HEAD https://u:{SECRET}@h/x.tar?sig={SECRET}: no\x07\r\n" + "x" * 10_000)
    assert said.startswith(r"fatal: HEAD https://h/x.tar: no\x07 xxx") or said.startswith("fatal: HEAD https://h/x.tar")
    assert SECRET not in said
    assert len(said) < 300
    assert one_line("a" * 300, limit=5) == "aaaaa..."


def test_the_same_file_behind_another_signature_is_the_same():
    def key(url, size=1, version="etag 1"):
        return Place(url, size, version).key

    aws = "https://h/0.tar?X-Amz-Date={}&X-Amz-Signature={}"
    assert key(aws.format(1, 2)) == key(aws.format(3, 4)) == key("https://h/0.tar")
    assert key("https://me:secret@h/0.tar") == key("https://h/0.tar")
    assert key("https://h/0.tar?se=2026&sig=abc") == key("https://h/0.tar?se=2027&sig=def")
    others = [
        key("https://h/0.tar"),
        key("https://h/0.tar?id=1"),
        key("https://h/0.tar?id=2"),
        key("http://h/0.tar"),
        key("https://h/0.tar", 2),
        key("https://h/0.tar", None),
        key("https://h/0.tar", 1, "etag 2"),
        key("pipe:cat 0.tar"),
        key("pipe:cat 1.tar"),
    ]
    assert len(set(others)) == len(others)
    assert all(re.fullmatch("[0-9a-f]{32}", one) for one in others)


def test_schemes_and_local_paths(tmp_path):
    assert [scheme_of(u) for u in ("a/b", "/a:b", "S3://x", "pipe:cat x", "file:///x", "c:x")] == [
        "", "", "s3", "pipe", "file", ""
    ]  # fmt: skip
    assert local_path(str(tmp_path)) == tmp_path
    assert str(local_path("file:///a%20b/c.tar")) == "/a b/c.tar"
    assert str(local_path("file://localhost/c.tar")) == "/c.tar"
    assert local_path("s3://a/b") is None
    assert local_path("pipe:cat x") is None
    with pytest.raises(ConfigError, match="this machine"):
        local_path("file://other/c.tar")

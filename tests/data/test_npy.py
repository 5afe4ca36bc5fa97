"""Arrays from anyone: what NumPy wrote reads as NumPy reads it, everything else is an error that says why."""

import io
import os
import struct
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from eclosion.data.npy import MAX_HEADER, open_npy, parse_npy
from eclosion.errors import DataError, EnvironmentProblem

DTYPES = [order + kind for order in "<>" for kind in ("f2", "f4", "f8", "i2", "i4", "i8", "u2", "u4", "u8")]
DTYPES += ["|i1", "|u1"]


def saved(array, version=None):
    file = io.BytesIO()
    np.lib.format.write_array(file, array, version=version, allow_pickle=True)
    return file.getvalue()


def written(header, data=b"", version=(1, 0), length=None):
    """A file with any header, as bytes or text."""
    raw = header.encode("latin-1") if isinstance(header, str) else header
    length = len(raw) if length is None else length
    return b"\x93NUMPY" + bytes(version) + struct.pack("<H" if version == (1, 0) else "<I", length) + raw + data


def literal(descr="'<f4'", order="False", shape="(2, 3)"):
    return f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, }}\n"


def refused(data, name="x.npy"):
    with pytest.raises(DataError) as caught:
        parse_npy(data, name)
    message = str(caught.value)
    assert message.startswith(f"{name}: ")
    assert "\n" not in message
    assert len(message) < 400
    return message.removeprefix(f"{name}: ")


def assert_same(found, wanted):
    assert (found.shape, found.dtype) == (wanted.shape, wanted.dtype)
    assert found.tobytes() == wanted.tobytes()
    assert not found.flags.writeable


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_numpy_wrote_reads_as_it_was(tmp_path, dtype, version):
    values = np.random.default_rng(0).integers(0, 100, (5, 3, 2)).astype(dtype)
    for array in (values, np.asfortranarray(values), values[:0], values[0, 0, 0], values[:, 0, 0]):
        path = tmp_path / "x.npy"
        path.write_bytes(saved(array, version))
        assert_same(parse_npy(path.read_bytes(), "x.npy"), array)
        assert_same(open_npy(path, "x.npy"), array)


def test_an_array_from_a_file_is_mapped_and_outlives_its_file(tmp_path):
    path = tmp_path / "x.npy"
    np.save(path, np.arange(6.0).reshape(2, 3))
    array = open_npy(path, "x")
    assert array.base.size() == path.stat().st_size
    path.unlink()
    assert array.tolist() == [[0, 1, 2], [3, 4, 5]]


def test_a_huge_file_costs_no_memory(tmp_path):
    path = tmp_path / "x.npy"
    head = written(literal("'<f2'", shape=f"({2**20}, 77, 1024)"))
    path.write_bytes(head)
    os.truncate(path, len(head) + 2**20 * 77 * 1024 * 2)  # 154 GiB, of which the disk holds one block
    tracemalloc.start()
    try:
        assert open_npy(path, "x")[2**20 - 1, 76].tolist() == [0] * 1024
        assert tracemalloc.get_traced_memory()[1] < 200_000
    finally:
        tracemalloc.stop()


GOOD = literal()
TWELVE = b"\0" * 24  # 2 x 3 numbers of 4 bytes


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is not a .npy file (it is empty)."),
        (b"\x93NUMP", "is not a .npy file (it begins otherwise)."),
        (b"PK\3\4 an .npz", "is not a .npy file (it begins otherwise)."),
        (b"\x93NUMPY\1", "is a .npy file of version 1. Versions 1.0 to 3.0 are read."),
        (written(GOOD, TWELVE, (4, 0)), "is a .npy file of version 4.0. Versions 1.0 to 3.0 are read."),
        (written(GOOD, TWELVE, (1, 1)), "is a .npy file of version 1.1. Versions 1.0 to 3.0 are read."),
        (b"\x93NUMPY\1\0\x76", "the array is damaged: the file ends within its header."),
        (written(GOOD, TWELVE, length=200), "the array is damaged: the file ends within its header."),
        (
            written(GOOD + " " * MAX_HEADER, TWELVE, (2, 0)),
            f"the array is damaged: its header has {len(GOOD) + MAX_HEADER} bytes, and the limit is {MAX_HEADER}.",
        ),
        (
            written(GOOD, TWELVE[:-1]),
            "the array is damaged: holds 23 bytes of numbers, and float32 (2, 3) is 24; the file is truncated.",
        ),
        (
            written(GOOD, TWELVE + b"\0"),
            "the array is damaged: holds 25 bytes of numbers, and float32 (2, 3) is 24; something stands behind the "
            "array.",
        ),
        (
            written(literal(shape=f"({2**62}, {2**62})")),
            f"the array is damaged: its shape ({2**62}, {2**62}) is more than any memory can hold.",
        ),
        (  # 0 bytes, which would fit
            written(literal(shape=f"(0, {2**63})")),
            f"the array is damaged: its shape (0, {2**63}) is more than any memory can hold.",
        ),
        (  # times 4 it is 2**64, which is 0 in 64 bits
            written(literal(shape=f"({2**62},)")),
            f"the array is damaged: its shape ({2**62},) is more than any memory can hold.",
        ),
        (
            written(literal(shape="(2, -3)"), TWELVE),
            "the array is damaged: its header is not a plain literal: "
            "\"{'descr': '<f4', 'fortran_order': False, 'shape': (2, -3), }\".",
        ),
        (
            written(literal(shape="[2, 3]"), TWELVE),
            "the array is damaged: its shape is [2, 3], and must be a tuple of whole numbers.",
        ),
        (
            written(literal(shape="(True, 6)"), TWELVE),
            "the array is damaged: its shape is (True, 6), and must be a tuple of whole numbers.",
        ),
        (
            written(literal(shape="(6)"), TWELVE),
            "the array is damaged: its shape is 6, and must be a tuple of whole numbers.",
        ),
        (
            written(literal(shape="(1,)" * 1 + " " * 0).replace("(1,)", "(" + "1, " * 33 + ")"), b"\0" * 4),
            "the array is damaged: it has 33 dimensions, and the limit is 32.",
        ),
        (written(literal(order="1"), TWELVE), "the array is damaged: fortran_order is not True or False."),
        (
            written(literal("'|O'"), TWELVE),
            "holds Python objects, which are never read. Save it as float16, float32, float64 or an integer type.",
        ),
        (
            written(literal("[('a', '<f4')]"), TWELVE),
            "holds records. Save it as float16, float32, float64 or an integer type.",
        ),
        (
            written(literal("'<U6'"), TWELVE),
            "holds numbers of type '<U6'. Save it as float16, float32, float64 or an integer type.",
        ),
        (
            written(literal("'<c8'"), TWELVE),
            "holds numbers of type '<c8'. Save it as float16, float32, float64 or an integer type.",
        ),
        (
            written(literal("'float32'"), TWELVE),
            "holds numbers of type 'float32'. Save it as float16, float32, float64 or an integer type.",
        ),
        (
            written("{'descr': '<f4', 'shape': (2, 3), }", TWELVE),
            "the array is damaged: its header must have descr, fortran_order and shape, and is "
            "\"{'descr': '<f4', 'shape': (2, 3), }\".",
        ),
        (
            written("('descr', 'fortran_order', 'shape')"),
            "the array is damaged: its header must have descr, fortran_order and shape, and is "
            "\"('descr', 'fortran_order', 'shape')\".",
        ),
    ],
)  # fmt: skip
def test_what_is_no_array_is_refused_with_the_reason(data, message):
    assert refused(data) == message


@pytest.mark.parametrize(
    "header",
    [
        "__import__('os').system('true')",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), 'more': 1}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), **{}}",
        "{'descr': '\\x3cf4', 'fortran_order': False, 'shape': (2, 3)}",  # a warning, were it parsed
        "{'descr': '<f4', 'fortran_order': 0or 1, 'shape': (2, 3)}",  # the same
        "{'descr': '<f4', 'fortran_order': False, 'shape': (2L, 3L)}",  # Python 2 wrote this
        "{'descr': '<f4', 'fortran_order': False, 'shape': (6 if 1 else 0,)}",
        "{[]: 1}",
        "{" * 9000,
        "(" * 4000 + ")" * 4000,
        "-" * 9000 + "1",
        "1" * 9000,
        "{'descr': '<f4', 'fortran_order': False, 'shape': (" + "9" * 9000 + ",)}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (" + "9" * 4000 + ",)}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (" + "1," * 4000 + ")}",
        "'" * 9000,
        "\0",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (\u00b2,)}",
    ],
)
def test_a_hostile_header_is_refused_at_once(header):
    began = time.perf_counter()
    refused(written(header, TWELVE))
    assert time.perf_counter() - began < 2


def test_no_object_is_ever_unpickled(tmp_path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "sprung"),)

    refused(saved(np.array([Trap()], object)))
    assert not (tmp_path / "sprung").exists()


def corpus(number, seed):
    """Files that NumPy wrote, each damaged in some way."""
    rng = np.random.default_rng(seed)
    arrays = [np.arange(12, dtype=dtype).reshape(shape) for dtype in DTYPES for shape in ((3, 4), (2, 3, 2), (12,))]
    for _ in range(number):
        data = bytearray(saved(arrays[rng.integers(len(arrays))], (int(rng.integers(1, 4)), 0)))
        for _ in range(rng.integers(1, 3)):
            at = int(rng.integers(len(data)))
            near = int(rng.integers(min(80, len(data))))
            kind = rng.integers(7)
            if kind == 0:
                data[near] ^= 1 << int(rng.integers(8))
            elif kind == 1:
                data[at] = rng.integers(256)
            elif kind == 6:  # another literal of the same length
                old, new = [(b"<", b">"), (b"False", b"True "), (b"f", b"i"), (b"i", b"u"), (b", ", b" ,")][near % 5]
                data[:80] = data[:80].replace(old, new)
            elif kind == 2:
                del data[at:]
            elif kind == 3:
                data[at:at] = rng.bytes(int(rng.integers(1, 40)))
            elif kind == 4:
                del data[near : near + int(rng.integers(1, 5))]
            else:
                digits = [i for i, byte in enumerate(data[:100]) if 48 <= byte <= 57]
                where = digits[rng.integers(len(digits))] if digits else near
                data[where : where + 1] = str(rng.integers(10 ** rng.integers(1, 18))).encode()
            data = data or bytearray(1)
        yield bytes(data)


def read_or_refuse(data, path=None):
    """True if an array came back, which is then what NumPy makes of the same bytes."""
    began = time.perf_counter()
    try:
        found = parse_npy(data, "x.npy") if path is None else open_npy(path, "x.npy")
    except DataError as error:
        message = str(error)
        found = None
    finally:
        assert time.perf_counter() - began < 2
    if found is None:
        assert message.startswith("x.npy: ")
        assert "\n" not in message
        return False
    assert_same(found, np.lib.format.read_array(io.BytesIO(data), allow_pickle=False))
    return True


def test_600_damaged_files_each_read_as_numpy_reads_them_or_are_refused():
    tracemalloc.start()
    try:
        read = [read_or_refuse(data) for data in corpus(600, seed=1)]
        assert tracemalloc.get_traced_memory()[1] < 4_000_000
    finally:
        tracemalloc.stop()
    assert 20 < sum(read) < 400  # the mutants are neither all harmless nor all hopeless


def test_damaged_files_are_refused_on_disk_as_in_memory(tmp_path):
    path = tmp_path / "x.npy"
    for data in corpus(150, seed=2):
        path.write_bytes(data)
        assert read_or_refuse(data, path) == read_or_refuse(data)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=4) | st.sampled_from(["<f4", ">i2", "|u1", "|O"]),
    lambda inner: st.lists(inner, max_size=3) | st.lists(inner, max_size=3).map(tuple),
    max_leaves=6,
)
shapes = st.lists(st.integers(-1, 2**64) | st.integers(0, 4), max_size=5).map(tuple)
headers = st.fixed_dictionaries({"descr": st.sampled_from(DTYPES) | values, "fortran_order": st.booleans() | values,
                                 "shape": shapes | values}).map(repr)  # fmt: skip


@settings(max_examples=250, deadline=2000, database=None)
@given(header=headers | st.text(max_size=60), data=st.binary(max_size=64), version=st.sampled_from([1, 2, 3]))
@example(header=literal(shape="(3, 4)"), data=bytes(range(48)), version=2)
@example(header=literal("'|u1'", "True", "(0, 7)"), data=b"", version=1)
def test_any_header_reads_as_numpy_reads_it_or_is_refused(header, data, version):
    read_or_refuse(written(header.encode("utf-8", "replace"), data, (version, 0)))


def test_a_missing_file_a_folder_and_a_pipe_are_named(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name, message in [
        ("none", "x: the file does not exist."),
        (".", "x: is not a file. Give a .npy file."),
        ("pipe", "x: is not a file. Give a .npy file."),
    ]:
        with pytest.raises(DataError) as caught:
            open_npy(tmp_path / name, "x")
        assert str(caught.value) == message


def test_too_many_open_files_are_not_the_fault_of_the_file(tmp_path, monkeypatch):
    def refuse(*args):
        raise OSError(24, "Too many open files")

    np.save(tmp_path / "x.npy", np.zeros(3))
    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(
        EnvironmentProblem, match=r"^x: cannot be opened \(Too many open files\)\. Raise `ulimit -n`\.$"
    ):
        open_npy(Path(tmp_path / "x.npy"), "x")

"""Files of torch.save from strangers: loaded if they are plain data, refused in one line if not, and never run."""

import collections
import io
import os
import pickle
import struct
import zipfile
from pathlib import Path

import pytest
import torch

from eclosion.checkpoint import foreign
from eclosion.checkpoint.foreign import Inert, read_torch_file
from eclosion.errors import CheckpointError

VERSION = "packaging.version.Version"


def saved(path: Path, value: object) -> Path:
    torch.save(value, path)
    return path


def archive(path: Path, pickled: bytes, *, compression: int = zipfile.ZIP_STORED, **members: bytes) -> Path:
    """An archive such as torch.save makes, around any pickle."""
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr("x/data.pkl", pickled)
        file.writestr("x/version", b"3\n")
        file.writestr("x/byteorder", b"little")
        for name, content in members.items():
            file.writestr(f"x/data/{name}", content)
    return path


def refusal(path: Path, **options: object) -> str:
    """The message with which a file is refused: one line that names it."""
    with pytest.raises(CheckpointError) as caught:
        read_torch_file(path, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    return message


def outcome(path: Path) -> dict[str, object] | None:
    """What a file holds, or None if it is refused, in one line."""
    try:
        return read_torch_file(path)
    except CheckpointError as error:
        message = str(error)
    assert "\n" not in message
    return None


# --- what is loaded --------------------------------------------------------------------------------------------------


def test_plain_data_and_tensors_come_back_as_torch_load_gives_them(tmp_path):
    value = {
        "model": collections.OrderedDict(a=torch.randn(3, 4), b=torch.arange(5), c=torch.randn(2).half()),
        "parameter": torch.nn.Parameter(torch.randn(2, 2)),
        "scalar": torch.tensor(True),
        "settings": {"x": (1, 2.5, None, True, "text", [2**40, -1])},
        "empty": torch.zeros(0, 3),
    }
    path = saved(tmp_path / "a.pth", value)
    ours, theirs = read_torch_file(path), torch.load(path, weights_only=True)
    assert ours["settings"] == theirs["settings"] == value["settings"]
    for key in ("parameter", "scalar", "empty"):
        torch.testing.assert_close(ours[key], theirs[key], rtol=0, atol=0)
    for name, tensor in theirs["model"].items():
        torch.testing.assert_close(ours["model"][name], tensor, rtol=0, atol=0)


def test_a_module_state_with_shared_and_strided_tensors_comes_back(tmp_path):
    net = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    path = saved(tmp_path / "a.pth", {"a": net.state_dict(), "b": net.state_dict(), "t": torch.randn(4, 3).T})
    ours = read_torch_file(path)
    torch.testing.assert_close(ours["b"], net.state_dict(), rtol=0, atol=0)
    assert ours["t"].stride() == (1, 3)


def test_an_object_of_a_named_class_is_kept_and_does_nothing(tmp_path):
    from packaging.version import Version

    path = saved(tmp_path / "a.pth", {"version": Version("1.15.6"), "a": torch.ones(2)})
    found = read_torch_file(path, inert=(VERSION, "packaging.version._Version"))
    assert isinstance(found["version"], Inert)
    assert not isinstance(found["version"], Version)
    assert VERSION in refusal(path)


def test_a_file_without_check_sums_is_read(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        path = saved(tmp_path / "a.pth", {"a": torch.ones(3)})
    finally:
        torch.serialization.set_crc32_options(True)
    assert read_torch_file(path)["a"].tolist() == [1, 1, 1]


# --- what would be run -----------------------------------------------------------------------------------------------


class Gadget:
    """An object whose pickle calls something when it is loaded."""

    def __init__(self, function: object, *args: object) -> None:
        self.call = (function, args)

    def __reduce__(self) -> object:
        return self.call


def raw(*parts: bytes | tuple[str, str]) -> bytes:
    """A pickle from its instructions; a pair is the name of something that it asks for."""
    return b"\x80\x02" + b"".join(p if isinstance(p, bytes) else f"c{p[0]}\n{p[1]}\n".encode() for p in parts) + b"."


MARK = "the file that a gadget would make"
TOUCH = f"open({MARK!r}, 'w').close()"
PICKLES = {
    "os.system": lambda: pickle.dumps({"a": Gadget(os.system, f"touch '{MARK}'")}, 2),
    "eval": lambda: pickle.dumps({"a": Gadget(eval, TOUCH)}, 2),
    "exec": lambda: pickle.dumps(Gadget(exec, TOUCH), 2),
    "inside a tensor's arguments": lambda: pickle.dumps(
        {"a": Gadget(torch._utils._rebuild_parameter, Gadget(eval, TOUCH), True, {})}, 2
    ),
    "a class of its own": lambda: pickle.dumps({"a": Gadget(Gadget, eval, TOUCH)}, 2),
    "getattr": lambda: pickle.dumps(Gadget(getattr, Gadget(__import__, "os"), "system"), 2),
    "functools.partial": lambda: raw(("functools", "partial"), ("builtins", "eval"), b"\x85R", b"(X\x01\0\0\x001tR"),
    "a newer protocol": lambda: pickle.dumps({"a": Gadget(eval, TOUCH)}, 4),
    "the oldest protocol": lambda: pickle.dumps({"a": Gadget(eval, TOUCH)}, 0),
    "instance": lambda: b"(S'1'\nios\nsystem\n.",
    "object": lambda: raw(b"(", ("builtins", "eval"), b"X\x01\0\0\x001o"),
    "by number": lambda: raw(b"\x82\x01)R"),
    "name from the stack": lambda: b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x01x\x85R.",
    "torch.load": lambda: raw(("torch", "load"), b"X\x01\0\0\0x\x85R"),
    "torch.hub": lambda: raw(("torch.hub", "load"), b"X\x01\0\0\0xX\x01\0\0\0x\x86R"),
    "attribute of what is allowed": lambda: raw(("torch._utils", "_rebuild_tensor_v2.__globals__"), b"."),
    "numpy": lambda: raw(("numpy.core.multiarray", "_reconstruct"), b")R"),
}


@pytest.mark.parametrize("name", PICKLES)
def test_what_would_be_run_is_refused_and_not_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = refusal(archive(tmp_path / "a.pth", PICKLES[name]()))
    assert "nothing in it was run" in message
    assert not Path(MARK).exists()


def test_the_gadgets_would_run_where_nobody_looks(tmp_path, monkeypatch):
    """The control: pickle itself runs them."""
    monkeypatch.chdir(tmp_path)
    pickle.loads(PICKLES["os.system"]())
    assert Path(MARK).exists()


def test_nothing_is_loaded_before_every_instruction_is_looked_at(tmp_path, monkeypatch):
    """A gadget at the end of a long pickle stops it as one at the beginning does."""
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("loaded"))
    value = {str(i): i for i in range(1000)} | {"last": Gadget(eval, TOUCH)}
    assert "eval" in refusal(archive(tmp_path / "a.pth", pickle.dumps(value, 2)))


def test_setting_attributes_of_a_function_is_refused(tmp_path):
    """BUILD would put an attribute on torch's own function, for as long as the process lives."""
    pickled = raw(("torch._utils", "_rebuild_tensor_v2"), b"}X\x04\0\0\0evilK\x01sb")
    refusal(archive(tmp_path / "a.pth", pickled))
    assert not hasattr(torch._utils._rebuild_tensor_v2, "evil")


# --- what would take the machine down --------------------------------------------------------------------------------


def test_a_packed_archive_is_refused_before_it_is_unpacked(tmp_path):
    path = archive(tmp_path / "a.pth", b"\x80\x02}." + bytes(1 << 20), compression=zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 10_000
    assert "claims" in refusal(path)


def test_members_that_lie_on_each_other_are_refused(tmp_path):
    """Two entries of the directory for the same bytes: the content is larger than the file."""
    path = archive(tmp_path / "a.pth", pickle.dumps({}, 2), big=bytes(100_000))
    content = path.read_bytes()
    begin = content.rindex(b"x/data/big") - 46
    entry = content[begin : begin + 46 + 10]
    more = b"".join(entry.replace(b"big", f"b{i:02}".encode()) for i in range(20))
    end = content.rindex(b"PK\x05\x06")
    count, size, start = struct.unpack("<HII", content[end + 10 : end + 20])
    tail = struct.pack("<HHHHIIH", 0, 0, count + 20, count + 20, size + len(more), start, 0)
    path.write_bytes(content[:end] + more + b"PK\x05\x06" + tail)
    assert "claims" in refusal(path)


def test_a_directory_without_end_is_refused_before_it_is_read(tmp_path, monkeypatch):
    path = archive(tmp_path / "a.pth", pickle.dumps({}, 2))
    content = bytearray(path.read_bytes())
    content[-10:-6] = struct.pack("<I", 200 << 20)
    path.write_bytes(content)
    monkeypatch.setattr(zipfile, "ZipFile", lambda *_: pytest.fail("opened"))
    assert "members" in refusal(path)


def test_a_large_directory_of_zip64_is_refused_as_well(tmp_path):
    large = b"PK\x06\x06" + struct.pack("<QHHIIQQQQ", 44, 45, 45, 0, 0, 1, 1, 1 << 40, 0)
    locator = b"PK\x06\x07" + struct.pack("<IQI", 0, 0, 1)
    short = b"PK\x05\x06" + struct.pack("<HHHHIIH", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    path = tmp_path / "a.pth"
    path.write_bytes(large + locator + short)
    assert "members" in refusal(path)


def test_a_tensor_that_claims_more_numbers_than_it_has_is_refused(tmp_path):
    """A few bytes seen with stride 0 as a terabyte: harmless until it is copied."""
    path = saved(tmp_path / "a.pth", {"a": torch.zeros(1).expand(1 << 20, 1 << 18)})
    assert "claims" in refusal(path)


@pytest.mark.parametrize(
    ("numel", "offset", "shape"), [(1 << 40, 0, 1 << 20), (4, 1 << 40, 1), (4, -8, 1), (-4, 0, 1), (4, 0, -1)]
)
def test_a_storage_that_claims_to_lie_elsewhere_is_refused(numel, offset, shape, tmp_path):
    """What a tensor sees must lie inside of the bytes that belong to it."""

    class Claim:
        def __reduce__(self) -> tuple:
            return torch._utils._rebuild_tensor_v2, (self, offset, (shape,), (1,), False, collections.OrderedDict())

    class Pickler(pickle.Pickler):
        def persistent_id(self, value: object) -> object:
            inside = isinstance(value, Claim) and self.seen
            self.seen = self.seen or isinstance(value, Claim)
            return ("storage", torch.FloatStorage, "0", "cpu", numel) if inside else None

        seen = False

    made = io.BytesIO()
    Pickler(made, 2).dump({"a": Claim()})
    refusal(archive(tmp_path / "a.pth", made.getvalue(), **{"0": bytes(16)}))


def test_an_archive_of_torchscript_is_refused(tmp_path, monkeypatch):
    """It holds code, and torch.load would hand it to another loader."""
    monkeypatch.setattr(torch.jit, "load", lambda *_, **__: pytest.fail("loaded"))
    path = archive(tmp_path / "a.pt", pickle.dumps({}, 2))
    with zipfile.ZipFile(path, "a") as file:
        file.writestr("x/constants.pkl", pickle.dumps((), 2))
    assert "TorchScript" in refusal(path)


def test_two_members_that_differ_in_case_are_refused(tmp_path):
    """One would be looked at, and the other loaded."""
    path = tmp_path / "a.pth"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("x/DATA.pkl", PICKLES["eval"]())
        file.writestr("x/data.pkl", pickle.dumps({}, 2))
        file.writestr("x/version", b"3\n")
    assert "not one that torch.save wrote" in refusal(path)


def test_tuples_inside_tuples_without_end_are_refused(tmp_path):
    """The hash of a hundred thousand of them would overflow the stack, and with it the process."""
    deep = b"}" + b")" + b"\x85" * 200_000 + b"K\x01s"
    assert "tuples" in refusal(archive(tmp_path / "a.pth", raw(deep)))
    through_the_memo = b"})q\x00" + b"".join(b"h" + bytes([i]) + b"\x85q" + bytes([i + 1]) for i in range(200))
    assert "tuples" in refusal(archive(tmp_path / "b.pth", raw(through_the_memo, b"K\x01s")))


def test_lists_that_hold_themselves_are_refused(tmp_path):
    ring: dict[str, object] = {}
    ring["ring"] = ring
    assert "deeper" in refusal(archive(tmp_path / "a.pth", pickle.dumps(ring, 2)))


def test_a_tree_that_doubles_at_each_level_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(foreign, "MAX_VALUES", 10_000)
    value: object = []
    for _ in range(40):
        value = [value, value]
    assert "more values" in refusal(archive(tmp_path / "a.pth", pickle.dumps({"a": value}, 2)))


def test_a_whole_number_without_end_is_refused(tmp_path):
    assert "bits" in refusal(archive(tmp_path / "a.pth", pickle.dumps({"a": 1 << 1000}, 2)))


# --- what is broken --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "not a file of torch.save"),
        (b"PK", "not a file of torch.save"),
        (pickle.dumps({"a": 1}), "not a file of torch.save"),
        (b"\x93NUMPY" + bytes(200), "not a file of torch.save"),
    ],
)
def test_what_is_no_archive_is_told(content, said, tmp_path):
    path = tmp_path / "a.pth"
    path.write_bytes(content)
    assert said in refusal(path)


def test_another_zip_archive_and_a_value_that_is_no_mapping_are_told(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        file.writestr("readme.txt", "hello")
    assert "not one that torch.save wrote" in refusal(tmp_path / "a.zip")
    assert "mapping" in refusal(saved(tmp_path / "b.pth", [torch.ones(1)]))
    assert "mapping" in refusal(saved(tmp_path / "c.pth", torch.ones(1)))


def test_a_missing_file_and_a_folder_are_told(tmp_path):
    assert "No such file" in refusal(tmp_path / "none.pth")
    assert "directory" in refusal(tmp_path)


def test_every_flipped_bit_of_a_small_file_is_an_error_or_changes_nothing(tmp_path):
    """Weights have a check sum, too; what has none is padding and the directory's notes."""
    path = saved(tmp_path / "a.pth", {"weight": torch.arange(8.0), "step": 7})
    content, broken = path.read_bytes(), tmp_path / "b.pth"
    found = 0
    for place in range(0, len(content), 3):
        flipped = bytearray(content)
        flipped[place] ^= 1 << (place % 8)
        broken.write_bytes(flipped)
        value = outcome(broken)
        found += value is None
        if value is not None:
            assert value["weight"].tolist() == list(range(8))
            assert value["step"] == 7
    assert found > 50


def test_a_file_cut_at_any_place_is_an_error(tmp_path):
    content = saved(tmp_path / "a.pth", {"weight": torch.arange(8.0)}).read_bytes()
    for end in range(0, len(content) - 1, 23):
        (tmp_path / "b.pth").write_bytes(content[:end])
        refusal(tmp_path / "b.pth")


def test_random_pickles_of_allowed_instructions_are_errors_and_no_crash(tmp_path):
    """Whatever the loader makes of instructions that are allowed and make no sense."""
    numbers = torch.Generator().manual_seed(0)
    names = b"ccollections\nOrderedDict\n", b"ctorch._utils\n_rebuild_tensor_v2\n", b"ctorch\nFloatStorage\n"
    values = b"}", b"]", b")", b"(", b"h\x00", b"K\x01", b"N", b"\x88", b"X\x01\0\0\x000"
    made_of_them = b"t", b"\x85", b"\x86", b"\x87", b"q\x00", b"s", b"u", b"a", b"e", b"R", b"\x81", b"b", b"Q"
    pieces = (*names, *values, *made_of_them)
    found = []
    for _ in range(400):
        picks = torch.randint(len(pieces), (12,), generator=numbers).tolist()
        found.append(outcome(archive(tmp_path / "a.pth", raw(b"}", *(pieces[i] for i in picks)), **{"0": bytes(4)})))
    assert None in found


def test_reading_leaves_the_list_of_what_torch_loads_as_it_was(tmp_path):
    before = torch.serialization.get_safe_globals()
    read_torch_file(saved(tmp_path / "a.pth", {"a": 1}), inert=(VERSION,))
    assert torch.serialization.get_safe_globals() == before

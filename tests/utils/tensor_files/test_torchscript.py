"""TorchScript archives read without running them, against ``torch.jit.load``."""

import io
import os
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

from reclip_d2.errors import ReclipError
from reclip_d2.utils.tensor_files import read_tensor_file
from tests.helpers import tiny_clip


class Small(nn.Module):
    """Parameters, buffers, a plain tensor attribute, shared weights, views, lists and other values."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.second = nn.Sequential(nn.Conv2d(2, 3, 2, bias=False), nn.BatchNorm2d(3))
        self.tied = self.first
        self.low = nn.Parameter(torch.randn(5).half())
        self.register_buffer("columns", torch.arange(12.0).view(3, 4).T)
        self.register_buffer("part", torch.arange(10)[3:7])
        self.register_buffer("empty", torch.zeros(0, 2))
        self.register_buffer("number", torch.tensor(2.5, dtype=torch.float64))
        self.flags: list[int] = [1, 2]
        self.mask = torch.tensor([True, False])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.first(x) + self.flags[0]


def read_torchscript_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Content of an archive."""
    file = read_tensor_file(path, "file")
    assert file.is_torchscript
    return file.content


def save_script(path: Path) -> torch.jit.ScriptModule:
    module = torch.jit.script(Small())
    module.save(str(path))
    return module


def test_state_dict_is_recovered(tmp_path):
    path = tmp_path / "small.pt"
    expected = {**save_script(path).state_dict(), "mask": torch.tensor([True, False])}
    found = read_torchscript_tensors(path)
    missing = {name for name in expected if name not in found}
    assert all(name.startswith(("tied.", "first.")) for name in missing)  # one of the two names of a shared module
    assert len(missing) <= 2 and not set(found) - set(expected)
    for name, tensor in found.items():
        assert tensor.dtype == expected[name].dtype and torch.equal(tensor, expected[name]), name


def test_tiny_clip_traced(tmp_path):
    clip, path = tiny_clip(seed=4, quick_gelu=True), tmp_path / "clip.pt"
    inputs = (torch.randn(1, 3, 32, 32), torch.randint(1, 100, (1, 77)))
    torch.jit.trace(clip, inputs, check_trace=False, strict=False).save(str(path))
    found = read_torchscript_tensors(path)
    state = clip.state_dict()
    assert set(found) - set(state) == {"attn_mask"}
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())


def test_other_files_are_not_torchscript(tmp_path):
    torch.save({"a": torch.zeros(2)}, tmp_path / "state.pt")
    assert not read_tensor_file(tmp_path / "state.pt", "file").is_torchscript


def rewrite(path: Path, replace: dict[str, bytes], leave_out: tuple[str, ...] = ()) -> None:
    """Replace or leave out entries of an archive, named without their folder."""
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries.items():
            short = name.split("/", 1)[1]
            if short not in leave_out:
                archive.writestr(name, replace.get(short, content))


class _Call:
    """Pickled as a call of any function."""

    def __init__(self, function, *arguments) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


@pytest.mark.parametrize("function", [os.mkdir, Path.touch, print, eval, getattr, torch.load])
def test_a_pickle_that_calls_anything_is_refused(tmp_path, function):
    path, marker = tmp_path / "small.pt", tmp_path / "marker"
    save_script(path)
    rewrite(path, {"data.pkl": pickle.dumps(_Call(function, str(marker)), protocol=2)})
    with pytest.raises(ReclipError, match=r"it names .*, which does not belong in weights: it contains code"):
        read_torchscript_tensors(path)
    assert not marker.exists()


def test_code_of_the_archive_is_not_needed_nor_run(tmp_path):
    path = tmp_path / "small.pt"
    save_script(path)
    expected = read_torchscript_tensors(path)
    with zipfile.ZipFile(path) as archive:
        code = [name.split("/", 1)[1] for name in archive.namelist() if "/code/" in name]
    rewrite(path, {name: b"raise SystemExit" for name in code})
    with pytest.raises(Exception):  # noqa: B017  (what torch.jit.load thinks of it)
        torch.jit.load(path)
    found = read_torchscript_tensors(path)
    assert set(found) == set(expected) and all(torch.equal(found[name], expected[name]) for name in found)


def build_pickle(body: bytes) -> bytes:
    return b"\x80\x02" + body + b"."


def opcodes(value: object) -> bytes:
    """A value's pickle without protocol and stop."""
    return pickle.dumps(value, protocol=2)[2:-1]


def module_of(attributes: bytes) -> bytes:
    """Opcodes of a TorchScript module whose attributes' dictionary is on the stack after ``attributes``."""
    return b"c__torch__.M\nM\n)\x81" + attributes + b"b"


def tensor_of(offset: object, size: object, stride: object, storage: bytes = b"FloatStorage", key: str = "0") -> bytes:
    """Opcodes of a tensor."""
    pid = b"(" + opcodes("storage") + b"ctorch\n" + storage + b"\n" + opcodes(key) + opcodes("cpu") + opcodes(4) + b"tQ"
    arguments = b"(" + pid + opcodes(offset) + opcodes(size) + opcodes(stride) + b"\x89" + opcodes({}) + b"t"
    return b"ctorch._utils\n_rebuild_tensor_v2\n" + arguments + b"R"


def archive_with(path: Path, pickled: bytes, storage: bytes = bytes(16)) -> Path:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("m/data.pkl", pickled)
        archive.writestr("m/code/__torch__.py", "")
        archive.writestr("m/data/0", storage)
    path.write_bytes(stream.getvalue())
    return path


def attribute(tensor: bytes) -> bytes:
    return build_pickle(module_of(b"}(" + opcodes("w") + tensor + b"u"))


def test_hand_made_archive(tmp_path):
    storage = torch.tensor([1.0, 2.0, 3.0, 4.0]).numpy().tobytes()
    path = archive_with(tmp_path / "a.pt", attribute(tensor_of(1, (2,), (2,))), storage)
    assert read_torchscript_tensors(path)["w"].tolist() == [2.0, 4.0]


@pytest.mark.parametrize(
    "tensor",
    [
        tensor_of(0, (5,), (1,)),
        tensor_of(3, (2,), (1,)),
        tensor_of(0, (2, 2), (4, 1)),
        tensor_of(-1, (2,), (1,)),
        tensor_of(0, (-2,), (1,)),
        tensor_of(0, (2**40, 2**40), (0, 0)),
        tensor_of(0, (3,), (1,), b"DoubleStorage"),
        tensor_of(0, (2,), (1,), key="7"),
        tensor_of(0, (2,), (1,), key="../code/__torch__.py"),
    ],
)
def test_tensors_beyond_their_storage(tmp_path, tensor):
    with pytest.raises(ReclipError, match=r"storage|negative|lacks its entry"):
        read_torchscript_tensors(archive_with(tmp_path / "a.pt", attribute(tensor)))


@pytest.mark.parametrize(
    "body",
    [
        tensor_of("0", (2,), (1,)),
        tensor_of(0, (2,), (1, 1)),
        tensor_of(0, [2], [1]),
        b"ctorch._utils\n_rebuild_tensor_v2\n}(" + opcodes("__defaults__") + b"Nub",  # state for a stand-in
        b"c__torch__.M\nM\n)\x81" + opcodes([1]) + b"b",  # a module with a list for its state
        opcodes(("storage", 1)) + b"Q",
        b"cos\nsystem\n" + opcodes(("true",)) + b"R",
        b"ctorch\nload\n",
        b"c__torch__.M\nM\n)\x81",  # a module that never got its state
        b"",
    ],
)
def test_rubbish(tmp_path, body):
    with pytest.raises(ReclipError, match=r"cannot be read as tensors"):
        read_torchscript_tensors(archive_with(tmp_path / "a.pt", build_pickle(body)))


def test_big_endian_and_cut_archives(tmp_path):
    path = tmp_path / "small.pt"
    save_script(path)
    rewrite(path, {"byteorder": b"big"})
    with pytest.raises(ReclipError, match="little-endian"):
        read_torchscript_tensors(path)
    save_script(path)
    rewrite(path, {"data/0": bytes(3)})
    with pytest.raises(ReclipError, match="storage 0"):
        read_torchscript_tensors(path)
    rewrite(path, {}, leave_out=("data/0",))
    with pytest.raises(ReclipError, match="lacks its entry data/0"):
        read_torchscript_tensors(path)

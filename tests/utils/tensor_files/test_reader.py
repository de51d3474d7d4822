"""Weight files of every format, against the saved tensors; and other, damaged or hostile files."""

from __future__ import annotations

import argparse
import collections
import io
import json
import os
import pickle
import struct
import tarfile
import tracemalloc
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from reclip_d2.errors import ReclipError
from reclip_d2.utils.files import MissingFileError
from reclip_d2.utils.tensor_files import check_tensors, plain_name, read_tensor_file, state_dict_of


def refusal(path: Path) -> str:
    with pytest.raises(ReclipError) as caught:
        read_tensor_file(path, "checkpoint")
    message = str(caught.value)
    assert message.startswith(f"checkpoint {path}") and "\n" not in message
    return message


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(equal, a, b))
    return type(a) is type(b) and a == b


# ---- what programs write -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("zipped", [True, False])
def test_a_training_checkpoint_is_what_torch_load_gives(tmp_path, zipped):
    """A state dict with its attributes, parameters, views, shared storages, an optimizer's state, and plain values."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    optimizer.step()
    base = torch.arange(24.0)
    content = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "parameter": nn.Parameter(torch.randn(3)),
        "views": [base[2:6], base.view(4, 6).T, base[::5]],
        "types": [torch.ones(3, dtype=getattr(torch, t)) for t in ("float16", "bfloat16", "float64", "int64", "bool")],
        "empty": torch.zeros(0, 2),
        "number": torch.tensor(2.5),
        "values": {"epoch": 3, "loss": 0.5, "name": "ä", "none": None, "flag": True, 7: (1, [2])},
    }
    path = tmp_path / "a.pth"
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    found = read_tensor_file(path, "checkpoint").content
    wanted = torch.load(path, weights_only=True)
    wanted["model"] = dict(wanted["model"])
    wanted["parameter"] = wanted["parameter"].detach()
    assert equal(found, wanted)
    check_tensors(found, "checkpoint")


def test_values_beside_the_tensors(tmp_path):
    """What training programs save with the weights; torch.load(weights_only=True) refuses most of it."""
    values = {
        "epoch": np.int64(7),
        "best": np.float32(0.5),
        "args": argparse.Namespace(lr=0.1),
        "output": Path("a/b"),
        "counts": collections.defaultdict(list, {"a": [1]}),
        "device": torch.device("cpu"),
        "dtype": torch.float16,
        "size": torch.Size([2, 3]),
        "array": np.arange(6.0).reshape(2, 3),
    }
    torch.save({**values, "state_dict": {"w": torch.ones(2)}}, tmp_path / "a.pth")
    found = read_tensor_file(tmp_path / "a.pth", "checkpoint").content
    assert found["epoch"] == 7 and type(found["epoch"]) is int and found["best"] == 0.5
    assert found["args"] is None and found["output"] is None and found["device"] is None
    assert found["counts"] == {"a": [1]} and found["size"] == (2, 3)
    assert np.array_equal(found["array"], values["array"])
    assert list(state_dict_of(found, "checkpoint a.pth")) == ["w"]


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_pickled_arrays(tmp_path, protocol):
    arrays = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.asfortranarray(np.eye(2, 3)), "c": np.int8(3)}
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"model": arrays}, protocol))
    state = state_dict_of(read_tensor_file(tmp_path / "a.pkl", "file").content, "file")
    assert state["a"].tolist() == [[0, 1, 2], [3, 4, 5]] and torch.equal(state["b"], torch.eye(2, 3).double())
    assert set(state) == {"a", "b"}


def test_arrays_of_python_2_and_of_other_byte_orders(tmp_path):
    """Python 2 wrote the bytes of an array as text."""
    values = np.array([1.0, -2.0], dtype=">f4")
    pickled = pickle.dumps({"a": values}, 2)
    assert b"_codecs" in pickled  # Python 3's way to write bytes in protocol 2
    raw = values.tobytes()
    body = (
        b"\x80\x02}U\x01acnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
        b"(K\x01K\x02\x85cnumpy\ndtype\nU\x02f4K\x00K\x01\x87R(K\x03U\x01>NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
        b"\x89U\x08" + raw + b"tbs."
    )
    for content in (pickled, body):
        (tmp_path / "a.pkl").write_bytes(content)
        state = state_dict_of(read_tensor_file(tmp_path / "a.pkl", "file").content, "file")
        assert state["a"].tolist() == [1.0, -2.0]


def test_the_content_tells_the_format(tmp_path):
    state = {"w": torch.arange(4.0)}
    path = tmp_path / "wrong.pth"
    safetensors.torch.save_file(state, path, metadata={"identity": "x"})
    file = read_tensor_file(path, "checkpoint")
    assert torch.equal(file.content["w"], state["w"]) and file.metadata == {"identity": "x"}
    path = tmp_path / "wrong.safetensors"
    torch.save(state, path)
    assert torch.equal(read_tensor_file(path, "checkpoint").content["w"], state["w"])


def test_archives_without_checksums(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"w": torch.arange(4.0)}, tmp_path / "a.pth")
    finally:
        torch.serialization.set_crc32_options(True)
    assert read_tensor_file(tmp_path / "a.pth", "checkpoint").content["w"].tolist() == [0, 1, 2, 3]


# ---- names ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "module.a.w",
        "_orig_mod.a.w",
        "module._orig_mod.a.w",
        "_orig_mod.module.a.w",
        "a._orig_mod.w",
        "module.module.a.w",
    ],
)
def test_prefixes(name):
    assert plain_name(name) == "a.w"
    assert list(state_dict_of({"state_dict": {name: torch.zeros(1), "epoch": 3}}, "file")) == ["a.w"]


def test_names_inside_a_model_stay():
    assert plain_name("a.module.w") == "a.module.w"


def test_two_tensors_of_one_name():
    with pytest.raises(ReclipError, match="file contains two tensors for w: save one model"):
        state_dict_of({"w": torch.zeros(1), "module.w": torch.zeros(1)}, "file")


# ---- tensors that are not weights ----------------------------------------------------------------------------------


def quantised() -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (lambda: torch.eye(2).to_sparse(), "a sparse tensor"),
        (lambda: torch.eye(2).to_sparse_csr(), "a sparse tensor"),
        (lambda: torch.empty(3, device="meta"), "a meta tensor, which has no values"),
        (quantised, "a quantised tensor"),
        (lambda: torch.ones(2, dtype=torch.complex64), "of type complex64"),
        (lambda: torch.ones(2).to(torch.float8_e4m3fn), "of type float8_e4m3fn"),
        (lambda: torch.ones(2, dtype=torch.uint16), "of type uint16"),
        (lambda: torch.tensor([1.0, float("nan")]), "not finite"),
        (lambda: torch.tensor([1.0, float("-inf")]).half(), "not finite"),
        (lambda: torch.tensor([float("inf"), float("-inf")]).bfloat16(), "not finite"),
    ],
)
@pytest.mark.filterwarnings("ignore:Sparse CSR")
def test_unusual_tensors_are_refused_by_name(tmp_path, make, what):
    torch.save({"model": {"a.weight": torch.ones(2), "b.weight": make()}}, tmp_path / "a.pth")
    content = read_tensor_file(tmp_path / "a.pth", "checkpoint").content
    with pytest.raises(ReclipError, match=rf"file: model\.b\.weight (is|has values that are) {what}"):
        check_tensors(content, "file")
    with pytest.raises(ReclipError, match=rf"file: b\.weight (is|has values that are) {what}"):
        check_tensors(state_dict_of(content, "file"), "file")


def test_large_values_are_finite():
    check_tensors({"a": torch.full((4,), 3e38), "b": torch.full((3,), 1e308, dtype=torch.float64)}, "file")


# ---- files of other kinds ------------------------------------------------------------------------------------------

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22e\nsize 354355280\n"


def tar_of(content: bytes) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        info = tarfile.TarInfo("a")
        info.size = len(content)
        archive.addfile(info, io.BytesIO(content))
    return stream.getvalue()


def zip_of(**entries: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return stream.getvalue()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".pkl"])
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "it is empty"),
        (LFS, "a Git LFS pointer in place of the file: fetch the file itself with git lfs pull"),
        (b"<!DOCTYPE html>\n<html lang=en>", "a web page (HTML): download the file itself"),
        (b"\n  <HTML><head>", "a web page (HTML)"),
        (b'{"error": "Invalid username or password."}', """a text file that begins with '{"error": "Invalid"""),
        (b"404: Not Found", "a text file that begins with '404: Not Found'"),
        (bytes(5000), "full of zeros"),
        (b"\x1f\x8b\x08\0\0", "a gzip archive: unpack it"),
        (tar_of(b"x"), "a tar archive: unpack it"),
        (zip_of(a=b"x"), "a ZIP archive without tensors"),
        (b"PK\x05\x06" + bytes(18), "a ZIP archive without tensors"),
        (b"\x89HDF\r\n\x1a\n", "an HDF5 file"),
        (b"\x01\x02\x03\x04" * 100, "damaged, or a file of another program"),
    ],
)
def test_what_a_file_is(tmp_path, suffix, content, words):
    path = tmp_path / f"model{suffix}"
    path.write_bytes(content)
    assert f"cannot be read as tensors: it is {words}".replace("it is it is", "it is") in refusal(path)


def test_what_is_no_file(tmp_path):
    with pytest.raises(MissingFileError, match=r"checkpoint .*none\.pth does not exist"):
        read_tensor_file(tmp_path / "none.pth", "checkpoint")
    assert "is a folder" in refusal(tmp_path)
    os.mkfifo(tmp_path / "pipe.pth")
    assert "is a named pipe" in refusal(tmp_path / "pipe.pth")
    (tmp_path / "loop.pth").symlink_to(tmp_path / "loop.pth")
    assert "is a loop of symbolic links" in refusal(tmp_path / "loop.pth")


# ---- damage --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["zip", "legacy", "safetensors", "pickle"])
@pytest.mark.parametrize("part", [0.03, 0.5, 0.95, 0.999])
def test_truncated_files(tmp_path, form, part):
    path, state = tmp_path / "a.bin", {"first.weight": torch.randn(100, 10), "second.weight": torch.randn(50)}
    if form == "safetensors":
        safetensors.torch.save_file(state, path)
    elif form == "pickle":
        path.write_bytes(pickle.dumps({name: value.numpy() for name, value in state.items()}))
    else:
        torch.save(state, path, _use_new_zipfile_serialization=form == "zip")
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * part)])
    assert "truncated" in refusal(path) or "copy or download it again" in refusal(path)


def test_one_changed_bit(tmp_path):
    path = tmp_path / "a.pth"
    torch.save({"w": torch.full((1000,), 2.0)}, path)
    content = bytearray(path.read_bytes())
    content[content.index(struct.pack("<f", 2.0) * 100) + 402] ^= 1
    path.write_bytes(content)
    assert torch.load(path, weights_only=True)["w"].max() != 2  # not detected elsewhere
    assert "the checksum of its entry data/0 is wrong" in refusal(path)


# ---- hostile files -------------------------------------------------------------------------------------------------


def refused_in_little_memory(path: Path, limit: int = 48 << 20) -> str:
    tracemalloc.start()
    try:
        message = refusal(path)
        assert tracemalloc.get_traced_memory()[1] < limit
    finally:
        tracemalloc.stop()
    return message


def rewritten(path: Path, entries: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)


def test_a_compression_bomb(tmp_path):
    path = tmp_path / "bomb.pth"
    torch.save({"w": torch.zeros(100 << 20, dtype=torch.uint8)}, path)
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    rewritten(path, entries, zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 1 << 20
    assert "would unpack to 100" in refused_in_little_memory(path)


def test_a_bomb_of_entries_that_lie_about_their_size(tmp_path):
    """The directory promises little; what the stream holds beyond that is not read."""
    path = tmp_path / "bomb.pth"
    torch.save({"w": torch.zeros(8 << 20, dtype=torch.uint8)}, path)
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    rewritten(path, entries, zipfile.ZIP_DEFLATED)
    content = path.read_bytes().replace(struct.pack("<I", 8 << 20), struct.pack("<I", 16))
    path.write_bytes(content)
    assert "cannot be read as tensors" in refused_in_little_memory(path, 16 << 20)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (lambda: torch.zeros(1).expand(100_000, 100_000), "reaches beyond storage"),
        (lambda: [torch.zeros(1 << 16)] + [None] * 10, None),
    ],
)
def test_tensors_that_are_larger_than_the_file(tmp_path, value, words):
    path = tmp_path / "a.pth"
    torch.save({"w": value()}, path)
    if words:
        assert words in refused_in_little_memory(path)
    else:
        assert read_tensor_file(path, "checkpoint").content


def test_many_names_of_one_storage(tmp_path):
    shared = torch.zeros(1 << 20)
    torch.save({str(i): shared for i in range(3)}, tmp_path / "tied.pth")
    tied = read_tensor_file(tmp_path / "tied.pth", "checkpoint").content
    tied["0"].fill_(1.0)
    assert len(tied) == 3 and not tied["1"].any() and not tied["2"].any()  # each has separate memory
    shared = torch.zeros(8 << 20)
    torch.save({str(i): shared for i in range(300)}, tmp_path / "bomb.pth")
    assert "many times larger than itself" in refusal(tmp_path / "bomb.pth")


def safetensors_file(path: Path, header: bytes, data: bytes = b"", length: int | None = None) -> Path:
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + data)
    return path


def entry(shape: list, start: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


@pytest.mark.parametrize(
    ("header", "length", "words"),
    [
        ({"a": entry([4], 0, 16)}, 2**50, "declares a header of"),
        ({"a": entry([4], 0, 16)}, 1 << 24, "truncated"),
        ({"a": entry([4], 0, 16)}, 20, "has a damaged header"),
        ({"a": entry([5], 0, 16)}, None, "'a' has another size in its header"),
        ({"a": entry([2**40], 0, 2**42)}, None, "truncated"),
        ({"a": entry([-4], 0, -16)}, None, "'a' has another size"),
        ({"a": entry([2**70, 0], 0, 0)}, None, "is damaged"),
        ({"a": entry([4], 0, 16), "b": entry([4], 0, 16)}, None, "is damaged"),
        ({"a": entry([4], 0, 16, "F77")}, None, "is damaged"),
        ({"a": {"dtype": "F32"}}, None, "has a damaged header"),
        ({"a": 3}, None, "has a damaged header"),
        ([], None, "has a damaged header"),
    ],
)
def test_safetensors_headers(tmp_path, header, length, words):
    text = json.dumps(header).encode()
    text = text if text[:1] == b"{" else b"{" + text + b"}"
    path = safetensors_file(tmp_path / "a.safetensors", text, bytes(16), length)
    assert words in refused_in_little_memory(path)


def test_a_deep_and_a_wide_header(tmp_path, monkeypatch):
    deep = b'{"a":' * 100_000 + b"1" + b"}" * 100_000
    assert "has a damaged header" in refusal(safetensors_file(tmp_path / "deep.safetensors", deep))
    monkeypatch.setattr("reclip_d2.utils.tensor_files.safetensors_file._MAX_TENSORS", 10)
    wide = json.dumps({str(i): entry([0], 0, 0) for i in range(11)}).encode()
    assert "more than any model has" in refusal(safetensors_file(tmp_path / "wide.safetensors", wide))


def pickled_archive(path: Path, body: bytes) -> Path:
    rewritten(path, {"m/data.pkl": b"\x80\x02" + body + b".", "m/version": b"3\n"})
    return path


def test_a_memo_that_asks_for_memory(tmp_path):
    """LONG_BINPUT 2**31 - 1: the memo of pickle's C code would be an array of 32 GiB."""
    path = pickled_archive(tmp_path / "a.pth", b"}r\xff\xff\xff\x7f")
    assert read_tensor_file(path, "checkpoint").content == {}


@pytest.mark.parametrize(
    "body",
    [
        b"}N" + b"\x85" * 300_000 + b"Ns",
        b"}(N" + b"\x85" * 300_000 + b"Nu",
        b"(N" + b"\x85" * 300_000 + b"Nd",
        b"\x8f(N" + b"\x85" * 300_000 + b"\x90",
        b"(N" + b"\x85" * 300_000 + b"\x91",
        b"ccollections\nOrderedDict\n]N" + b"\x85" * 300_000 + b"N\x86a\x85R",
    ],
)
def test_deep_tuples_are_not_hashed(tmp_path, body):
    """The hash of a tuple is recursive: it would end the process with a segmentation fault."""
    message = refusal(pickled_archive(tmp_path / "a.pth", body))
    assert "a key that is neither a name nor a number" in message or "it contains a set" in message


def test_bytes_that_are_promised(tmp_path):
    """BYTEARRAY8 of 1 TiB: Python would make room before it reads."""
    path = pickled_archive(tmp_path / "a.pth", b"\x96" + struct.pack("<Q", 1 << 40))
    assert "copy or download it again" in refused_in_little_memory(path)


@pytest.mark.parametrize(
    "body",
    [
        b"cos\nsystem\n\x8c\x04trueq\x00\x85R",
        b"cbuiltins\neval\n\x8c\x011\x85R",
        b"cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85R",
        b"ctorch\nload\n",
        b"ctorch._utils\n_rebuild_tensor_v2\n}\x8c\x0c__defaults__Nsb",
        b"(cos\nsystem\no",
        b"(\x8c\x04trueios\nsystem\n",
        b"\x82\x01",
        b"cnumpy\nndarray\nK\x01\x85R",
    ],
)
def test_pickles_that_call_or_name_other_things(tmp_path, body):
    assert "cannot be read as tensors" in refusal(pickled_archive(tmp_path / "a.pth", body))


def test_containers_that_hold_themselves_or_are_deep(tmp_path):
    path = pickled_archive(tmp_path / "a.pth", b"}q\x00X\x01\x00\x00\x00ah\x00s")  # d = {}; d["a"] = d
    assert read_tensor_file(path, "checkpoint").content == {"a": None}
    twice: list[Any] = []
    for _ in range(60):  # 2 ** 60 leaves, 60 lists
        twice = [twice, twice]
    torch.save({"a": twice}, tmp_path / "c.pth")
    assert read_tensor_file(tmp_path / "c.pth", "checkpoint").content
    assert "nested too deep" in refusal(pickled_archive(tmp_path / "d.pth", b"]" * 5000 + b"a" * 4999))


def test_two_entries_of_one_name(tmp_path):
    path = tmp_path / "a.pth"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with zipfile.ZipFile(path, "w") as archive:
            for _ in range(2):
                archive.writestr("m/data.pkl", b"\x80\x02}.")
    assert "ZIP archive without tensors" in refusal(path) or "two entries" in refusal(path)

"""Files of tensors: read as torch reads them, with every flipped bit found or harmless, and nothing else let in."""

import argparse
import io
import pickle
import random
import struct
import zipfile
from collections import Counter, OrderedDict

import numpy as np
import pytest
import torch

from d2distill.common.engine.tensor_files import (
    append_digest,
    has_digest,
    read_safetensors,
    read_torch_file,
    state_digest,
    write_safetensors,
    write_torch_file,
)
from d2distill.common.engine.weight_files import read_weights
from d2distill.common.errors import CheckpointError

BASE = torch.arange(24.0)
SHARED = BASE.view(4, 6)
CONTENT = {
    "whole": SHARED,
    "transposed": SHARED.t(),
    "part": BASE[3:7],
    "empty": torch.empty(0, 3),
    "number": torch.tensor(3),
    "bfloat16": torch.ones(3, dtype=torch.bfloat16),
    "bool": torch.tensor([True, False]),
    "channels_last": torch.rand(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "complex": torch.ones(2, dtype=torch.complex64),
    "parameter": torch.nn.Parameter(torch.ones(2)),
    "expanded": torch.arange(3).expand(4, 3),
}
UNTYPED = {"uint16": torch.ones(3, dtype=torch.uint16), "float8": torch.ones(3).to(torch.float8_e4m3fn)}
BESIDE = {
    "options": argparse.Namespace(lr=0.1, name="x"),
    "accuracy": np.float64(71.5),
    "count": np.int64(3),
    "plain": [None, 1, 2.5, True, "text", b"raw", (2**70,), {1, 2}, {"a": {}}, 1j],
    "torch": [torch.Size([2, 3]), torch.device("cpu"), torch.float16],
    "milestones": Counter({30: 1}),
}


def same(one, two):
    return one.dtype == two.dtype and one.stride() == two.stride() and torch.equal(one.float(), two.float())


def saved(content, legacy=False):
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=not legacy)
    return file


@pytest.mark.parametrize("legacy", [False, True])
def test_what_torch_saves(legacy):
    model = OrderedDict(CONTENT if legacy else {**CONTENT, **UNTYPED})
    model._metadata = {"": {"version": 2}}
    tagged = torch.ones(1)
    tagged.tag = 1
    content = {"model": model, **BESIDE, "tagged": [tagged, torch.nn.Parameter(torch.ones(2))]}
    found, digest = read_torch_file(saved(content, legacy))
    assert not digest and {name: found[name] for name in BESIDE} == BESIDE
    assert list(found["model"]) == list(model) and found["model"]._metadata == model._metadata
    assert all(same(value, model[name]) for name, value in found["model"].items() if name != "complex")
    assert torch.equal(found["model"]["complex"], model["complex"]) and same(found["tagged"][0], tagged)
    assert found["model"]["whole"].data_ptr() == found["model"]["transposed"].data_ptr()
    assert not any(value.requires_grad for value in found["model"].values())


def written(content):
    file = io.BytesIO()
    write_torch_file(content, file)
    return file


def test_a_digest_is_not_in_the_way_of_others(tmp_path):
    (tmp_path / "f.pth").write_bytes(written(CONTENT).getvalue())
    for options in ({}, {"mmap": True}):
        assert torch.equal(torch.load(tmp_path / "f.pth", weights_only=True, **options)["whole"], SHARED)
    assert zipfile.ZipFile(tmp_path / "f.pth").testzip() is None
    assert read_torch_file(written(CONTENT))[1]


def undetected(content, bits, read):
    """Places of flips that are read without an error, after looking that they made no difference."""
    right, found = read(content), set()
    for place in range(len(content)):
        for bit in bits:
            try:
                assert read(content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :]) == right
                found.add(place)
            except AssertionError:
                raise
            except Exception:
                continue
    return found


SMALL = {"model": {"a": torch.arange(3.0), "b": torch.tensor(7)}, "description": "text"}


def digest_of(content):
    content, _ = read_torch_file(io.BytesIO(content))
    return state_digest(content["model"], {"is": content["description"]})


def test_a_flipped_bit_anywhere_is_found_by_the_digest():
    content = written(SMALL).getvalue()
    # Not in what says that there is a digest: then there is none.
    assert undetected(content, range(8), digest_of) == {*range(len(content) - 81, len(content) - 64)}


def test_a_flipped_bit_without_a_digest_is_found_or_harmless():
    """A folder's attribute among them."""
    content = saved(SMALL).getvalue()
    for bits in ((4,), (random.Random(0).randrange(4),)):
        undetected(content, bits, digest_of)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_file_that_is_cut_off(legacy):
    content = saved(SMALL, legacy).getvalue()
    for length in range(0, len(content), 7):
        with pytest.raises(
            (EOFError, LookupError, ValueError, struct.error, zipfile.BadZipFile, pickle.UnpicklingError)
        ):
            read_torch_file(io.BytesIO(content[:length]))


def test_a_flipped_bit_of_safetensors(tmp_path):
    path, file = tmp_path / "f.safetensors", io.BytesIO()
    write_safetensors(SMALL["model"], {"d2distill": "{}"}, file)

    def read(content):
        path.write_bytes(content)
        state, facts = read_safetensors(path)
        return state_digest(state, {"is": facts["d2distill"]})

    found = undetected(file.getvalue(), (0,), read)
    # The name of the digest's entry, of which there is none then.
    name = file.getvalue().index(b'"digest"')
    assert {*range(name + 1, name + 7)} <= found and len(found) < 20


def test_a_digest_in_onnx_is_a_property(tmp_path):
    onnx = pytest.importorskip("onnx")
    graph = onnx.helper.make_graph([], "g", [], [])
    model = onnx.helper.make_model(graph)
    model.metadata_props.add(key="d2distill", value="{}")
    onnx.save(model, tmp_path / "f.onnx")
    with open(tmp_path / "f.onnx", "r+b") as file:
        append_digest(file)
        assert has_digest(file)
    onnx.checker.check_model(loaded := onnx.load(tmp_path / "f.onnx"))
    assert [entry.key for entry in loaded.metadata_props] == ["d2distill", "digest"]
    content = (tmp_path / "f.onnx").read_bytes()
    found = undetected(content, range(8), lambda content: has_digest(io.BytesIO(content)) * 0)
    assert found == {*range(len(content) - 81, len(content) - 64)}


def archive(path, pickled, records=(), **options):
    with zipfile.ZipFile(path, "w", **options) as file:
        for name, data in {"f/data.pkl": pickled, **dict(records)}.items():
            file.writestr(name, data)
    return str(path)


class Call:
    def __init__(self, call, *arguments):
        self.call, self.arguments = call, arguments

    def __reduce__(self):
        return self.call, self.arguments


def tensor(size=b"K\x03", stride=b"K\x01", number=b"K\x03", offset=b"K\x00"):
    """{"w": a tensor} as torch pickles it, with other numbers."""
    storage = b"((X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu" + number + b"tQ"
    rest = offset + size + b"\x85" + stride + b"\x85\x89}t"
    return b"\x80\x02}X\x01\x00\x00\x00wctorch._utils\n_rebuild_tensor_v2\n" + storage + rest + b"Rs."


DATA = {"f/data/0": struct.pack("<3f", 1, 2, 3)}
OBJECTS = Call(np.float64(0).__reduce__()[0], Call(np.dtype, "O,O"), b"12345678" * 2)
HUGE = b"\x8a\x05\x00\x00\x00\x00\x01"  # 2**32
HOSTILE = {
    "a scalar of an object type": (pickle.dumps({"w": OBJECTS}, 2), {}, "is not a plain number"),
    "code": (pickle.dumps({"w": Call(eval, "1")}, 2), {}, "more than weights: a pickled .*eval"),
    "memory": (pickle.dumps({"w": Call(bytearray, 2**32)}, 2), {}, "more than weights: a pickled .*bytearray"),
    "torch's memory": (pickle.dumps({"w": Call(torch.FloatTensor, 2**30)}, 2), {}, "a pickled torch.FloatTensor"),
    "a class that is changed": (b"\x80\x02cargparse\nNamespace\nN}X\x01\x00\x00\x00aK\x01s\x86b.", {}, "type has no"),
    "more numbers than there are": (tensor(number=HUGE), DATA, "storage 0 has 12 bytes, not 4294967296 numbers"),
    "fewer numbers than there are": (tensor(number=b"K\x02"), DATA, "storage 0 has 12 bytes"),
    "a view beyond its memory": (tensor(size=b"K\x04"), DATA, "out of bounds"),
    "a view before its memory": (tensor(offset=b"J\xff\xff\xff\xff"), DATA, "invalid storage offset -1"),
    "a number that is repeated": (tensor(size=HUGE, stride=b"K\x00"), DATA, "4294967296 elements has 3 in the file"),
    "no record": (tensor(), {}, "no item named 'f/data/0'"),
    "two networks": (tensor(), {"g/data.pkl": b""}, "not one of torch.save"),
    "another byte order": (tensor(), {**DATA, "f/byteorder": b"big"}, "another byte order"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_archives(tmp_path, case):
    pickled, records, message = HOSTILE[case]
    source = archive(tmp_path / "f.pth", pickled, records)
    with pytest.raises(CheckpointError, match=f"^{source} .*{message}"):
        read_weights(source)
    assert not hasattr(argparse.Namespace, "a")


def test_archives_that_are_small_but_for_their_content(tmp_path):
    assert read_weights(archive(tmp_path / "f.pth", tensor(), DATA))["w"].tolist() == [1, 2, 3]
    zeros = {"f/data/0": bytes(10**6)}
    deflated = archive(tmp_path / "deflated.pth", tensor(), zeros, compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(CheckpointError, match="its records are larger than the file"):
        read_weights(deflated)
    with pytest.raises(CheckpointError, match="is compressed or marked as a folder"):
        read_weights(archive(tmp_path / "f.pth", tensor(), DATA, compression=zipfile.ZIP_BZIP2))
    # Of one record the directory tells that it has all bytes of the file.
    path = tmp_path / "claims.pth"
    archive(path, tensor(), DATA)
    content = bytearray(path.read_bytes())
    entry = content.rindex(b"PK\x01\x02")
    content[entry + 20 : entry + 28] = struct.pack("<II", 2**31, 2**31)
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="its records are larger than the file"):
        read_weights(str(path))


def test_a_record_marked_as_a_folder(tmp_path):
    """torch.load gives memory that was never written."""
    path = tmp_path / "f.pth"
    torch.save({"w": torch.arange(3.0)}, path)
    content = bytearray(path.read_bytes())
    entry = content.rindex(b"PK\x01\x02", 0, content.rindex(b"/data/0"))
    content[entry + 38] |= 0x10
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="record data/0 is compressed or marked as a folder"):
        read_weights(str(path))


def test_files_from_before_torch_1_6_allocate_what_is_there(tmp_path):
    path = tmp_path / "f.pth"
    torch.save({"w": torch.arange(3.0)}, path, _use_new_zipfile_serialization=False)
    content = path.read_bytes()
    claim = b"cpuq\x06K\x03N"
    assert content.count(claim) == 1
    for number, message in ((HUGE, "its storages are larger than the file"), (b"K\x04", "storage .* is cut off")):
        path.write_bytes(content.replace(claim, claim[:5] + number + b"N"))
        with pytest.raises(CheckpointError, match=message):
            read_weights(str(path))
    # A storage that is in no list has no content.
    key = content[content.index(b"FloatStorage") :].split(b"X")[1][4:].split(b"q")[0]
    names = b"]q\x00X" + struct.pack("<I", len(key)) + key + b"q\x01a."
    assert content.count(names) == 1
    path.write_bytes(content.replace(names, b"]q\x00."))
    with pytest.raises(CheckpointError, match="its storages are not all there"):
        read_weights(str(path))

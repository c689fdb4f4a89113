"""Pickles of Detectron2's and Caffe2's model zoos are read; whatever else a pickle may name is refused."""

import builtins
import os
import pickle
import tracemalloc
from collections import OrderedDict, defaultdict

import numpy as np
import pytest
import torch

from d2distill.common.engine.safe_pickle import load_arrays
from d2distill.common.errors import CheckpointError, DataError


def written(path, content, protocol=2):
    path.write_bytes(content if isinstance(content, bytes) else pickle.dumps(content, protocol))
    return path


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_what_a_model_zoo_file_may_hold(tmp_path, protocol):
    shared = np.asfortranarray(np.arange(6, dtype=np.float16).reshape(2, 3))
    content = {
        "model": OrderedDict([("a", shared), ("b", np.arange(3, dtype=">f4")), ("count", np.int64(7))]),
        "nested": [{"again": shared}, (np.float32(0.5), None, True, "text", b"raw", 1.5)],
        "__author__": "Detectron2 Model Zoo",
    }
    loaded = load_arrays(written(tmp_path / "f.pkl", content, protocol), CheckpointError)
    assert type(loaded["model"]) is dict and list(loaded["model"]) == ["a", "b", "count"]
    np.testing.assert_array_equal(loaded["model"]["a"], shared)
    assert loaded["model"]["a"].dtype == np.float16 and loaded["nested"][0]["again"] is loaded["model"]["a"]
    np.testing.assert_array_equal(loaded["model"]["b"], [0, 1, 2])
    assert loaded["model"]["count"] == 7 and loaded["nested"][1] == (0.5, None, True, "text", b"raw", 1.5)
    assert loaded["__author__"] == "Detectron2 Model Zoo" and loaded["model"]["b"].flags.writeable


# {"blobs": {"conv1_w": array([1, 2], float32)}, "order": OrderedDict([("a", 1)])} as Python 2's cPickle writes it.
PYTHON2 = (
    b"\x80\x02}q\x01(U\x05blobsq\x02}q\x03U\x07conv1_wq\x04cnumpy.core.multiarray\n_reconstruct\nq\x05cnumpy\nndarray\n"
    b"q\x06K\x00\x85U\x01b\x87Rq\x07(K\x01K\x02\x85cnumpy\ndtype\nq\x08U\x02f4K\x00K\x01\x87Rq\t(K\x03U\x01<NNNJ\xff\xff"
    b"\xff\xffJ\xff\xff\xff\xffK\x00tb\x89U\x08\x00\x00\x80?\x00\x00\x00@tbsU\x05orderccollections\nOrderedDict\n]]"
    b"(U\x01aK\x01ea\x85Ru."
)


def test_python_2(tmp_path):
    loaded = load_arrays(written(tmp_path / "f.pkl", PYTHON2), CheckpointError)
    np.testing.assert_array_equal(loaded["blobs"]["conv1_w"], np.array([1, 2], np.float32))
    assert loaded["order"] == {"a": 1}


class Evil:
    def __init__(self, call, *args):
        self.call, self.args = call, args

    def __reduce__(self):
        return self.call, self.args


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize(
    ("value", "named"),
    [
        (Evil(os.mkdir, "pwned"), r"posix\.mkdir"),
        (Evil(eval, "__import__('os').mkdir('pwned')"), r"(builtins|__builtin__)\.eval"),
        (Evil(getattr, "x", "join"), "getattr"),
        (Evil(builtins.__import__, "os"), "__import__"),
        (OrderedDict(a=Evil(os.system, "mkdir pwned")), r"posix\.system"),
        (defaultdict(list), r"collections\.defaultdict"),
        (torch.zeros(2), r"torch\._utils\._rebuild_tensor_v2"),
        (np.array([Evil(os.mkdir, "pwned")], dtype=object), "mkdir|object is not a plain number"),
    ],
)
def test_everything_else_is_refused(tmp_path, monkeypatch, value, named, protocol):
    monkeypatch.chdir(tmp_path)
    path = written(tmp_path / "f.pkl", {"model": {"a": value}}, protocol)
    with pytest.raises(CheckpointError, match=rf"refused to read {path}.*({named})"):
        load_arrays(path, CheckpointError)
    with pytest.raises(DataError):
        load_arrays(path)
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize(
    ("dtype", "data"),
    [
        ("f4", b"1234567"),
        ("f4", "text"),
        ("O", b"12345678"),
        ("f8,O", b"1234567812345678"),
        ("V8", b"12345678"),
        ("u1", 2),
    ],
)
def test_an_array_with_forged_content(tmp_path, dtype, data):
    """The bytes must fill the shape, and be numbers: of an object type they would be pointers.

    A number in their place would be so many bytes of memory.
    """

    class Forged:
        def __reduce__(self):
            build = np.zeros(1).__reduce__()[0]
            return build, (np.ndarray, (0,), b"b"), (1, (2,), np.dtype(dtype), False, data)

    with pytest.raises(DataError, match="refused"):
        load_arrays(written(tmp_path / "f.pkl", Forged()))


def test_cut_anywhere(tmp_path):
    for length in range(len(PYTHON2)):
        with pytest.raises(CheckpointError, match=r"refused to read .*f\.pkl: ."):
            load_arrays(written(tmp_path / "f.pkl", PYTHON2[:length]), CheckpointError)


def test_memory_is_for_what_is_there(tmp_path):
    """Not for place 2**24 - 1 among the objects that a pickle may refer to again."""
    path = written(tmp_path / "f.pkl", b"\x80\x02Nr\xff\xff\xff\x00.")
    tracemalloc.start()
    assert load_arrays(path) is None
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10**7
    with pytest.raises(DataError, match="cut off"):
        load_arrays(written(path, b"\x80\x05\x96\x00\x00\x10\x00\x00\x00\x00\x00abc."))


def test_a_class_is_left_as_it_is(tmp_path):
    """Its attributes are set for the whole process."""
    path = written(tmp_path / "f.pkl", b"\x80\x02cnumpy\ndtype\nN}X\x05\x00\x00\x00valueK\x01s\x86b.")
    with pytest.raises(DataError, match="a type has no state"):
        load_arrays(path)


@pytest.mark.parametrize("tuples", [b"\x85" * 10**6, b"2\x86" * 40])
def test_a_key_of_tuples_of_tuples(tmp_path, tuples):
    """Python's hash of the first ends the process, and of the second, with 2**40 of them, takes days."""
    with pytest.raises(DataError, match="its tuples hold too many others"):
        load_arrays(written(tmp_path / "f.pkl", b"\x80\x02})" + tuples + b"Ns."))
    flat = {(1, (2, "a")): tuple(range(1000)), (): [((),) * 1000]}
    assert load_arrays(written(tmp_path / "f.pkl", flat)) == flat

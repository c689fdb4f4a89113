"""A teacher that remembers gives what the teacher gives, and runs it for what it has not seen only."""

import errno
import json
import math
import os

import numpy as np
import pytest
import torch
from torch import nn

from d2distill.classification.models import build_model
from d2distill.common import row_file
from d2distill.common.cached_teacher import CachedTeacher, TeacherMemory, spread_rest
from d2distill.common.errors import ConfigError
from d2distill.common.outputs import Batch, Outputs
from d2distill.common.teachers import LiveTeacher
from tests.interruptions import assert_identical

SAMPLES, VARIANTS, CLASSES = 40, 3, 10
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return build_model("wrn_16_1", CLASSES)


class Counted(LiveTeacher):
    """Counts the images that the network is given."""

    seen = 0

    def __call__(self, inputs, batch):
        self.seen += len(inputs)
        return super().__call__(inputs, batch)


@pytest.fixture
def build(network, tmp_path):
    def build_source(needs=("logits",), network=network, **memory):
        source = Counted(network, lambda images: images.float() / 100 - 1)
        source.needs = {*needs}
        settings = {"folder": tmp_path / "cache", "name": "wrn/16 1", "identity": {"weights": "a"}, "samples": SAMPLES}
        settings |= {"variants": VARIANTS, "max_bytes": 2**30, **memory}
        memory = TeacherMemory(**settings)
        with torch.autocast("cpu", memory.precision, enabled=memory.precision is not None):
            example = call(source, [0])
        source.seen = 0
        return CachedTeacher(source, example, memory, CPU)

    return build_source


def images_of(index, key):
    """Of each sample and variant its own."""
    rng = [np.random.default_rng([int(i), int(k) + 1]) for i, k in zip(index, key, strict=True)]
    images = [torch.from_numpy(each.integers(0, 256, (3, 16, 16), np.uint8)) for each in rng]
    return torch.stack(images) if images else torch.empty(0, 3, 16, 16, dtype=torch.uint8)


def call(source, index, key=None):
    index = torch.as_tensor(index)
    key = index % VARIANTS if key is None else torch.as_tensor(key)
    return source(images_of(index, key), Batch(index=index, host_index=index, key=key))


def as_dict(outputs):
    return {name: value for name, value in vars(outputs).items() if value is not None}


def test_what_is_known_is_not_computed(build):
    source = build(("logits", "pooled", "feats", "preacts"))
    first = call(source, range(20))
    live = call(source.source, range(20))
    assert source.source.seen == 32 + 20  # two chunks of 16
    for name in ("logits", "pooled"):
        torch.testing.assert_close(getattr(first, name), getattr(live, name), rtol=1e-5, atol=1e-5)
    for name in ("feats", "preacts"):
        for one, two in zip(getattr(first, name), getattr(live, name), strict=True):
            torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)
    source.source.seen = 0
    for again in (source, build(("logits", "pooled", "feats", "preacts"))):
        assert_identical(as_dict(call(again, range(20))), as_dict(first))
        assert again.source.seen == 0
    call(source, [0, 20])
    assert source.source.seen == 16
    call(source, [0], key=[2])
    assert source.source.seen == 32


def test_parts_are_shared_between_methods(build):
    call(build(("logits", "pooled")), range(16))
    for needs in (("logits",), ("pooled",)):
        source = build(needs)
        outputs = call(source, range(16))
        assert source.source.seen == 0
        assert [name for name in ("logits", "pooled", "feats") if getattr(outputs, name) is not None] == [*needs]
    source = build(("logits", "feats"))
    call(source, range(16))
    assert source.source.seen == 16


@pytest.mark.parametrize("name", ["wrn_16_1", "resnet14", "vgg8", "ShuffleV1"])
def test_a_row_depends_on_its_image_alone(build, name, tmp_path):
    """To the bit, wherever it stands, and whatever others are missing."""
    network = build_model(name, CLASSES)
    whole = build(("logits", "pooled"), network)
    rng, reference = np.random.default_rng(0), call(whole, range(SAMPLES))
    for trial in range(4):
        source = build(("logits", "pooled"), network, folder=tmp_path / str(trial))
        seen = torch.zeros(SAMPLES, CLASSES)
        for index in np.split(rng.permutation(SAMPLES), np.sort(rng.choice(SAMPLES, 5))):
            outputs = call(source, index)
            seen[index] = outputs.logits
            assert torch.equal(outputs.pooled, reference.pooled[index])
        assert torch.equal(seen, reference.logits)


def test_no_image_at_all(build):
    outputs = call(build(("logits", "feats")), torch.zeros(0, dtype=torch.long))
    assert outputs.logits.shape == (0, CLASSES) and outputs.feats[0].shape[0] == 0


@pytest.mark.parametrize("batch", [Batch(), Batch(host_index=torch.arange(4)), Batch(key=torch.arange(4))])
def test_images_without_numbers_go_to_the_teacher(build, batch):
    source, images = build(), images_of(range(4), range(4))
    assert torch.equal(source(images, batch).logits, source.source(images, batch).logits)
    numbered = Batch(host_index=torch.arange(4), key=torch.arange(4) % VARIANTS, view=1)
    assert torch.equal(source(images, numbered).logits, source.source(images, numbered).logits)
    assert len(source.missing(0, SAMPLES * VARIANTS)) == SAMPLES * VARIANTS


def test_a_negative_key_is_never_kept(build):
    source = build()
    first, second = call(source, [5, 6], key=[-1, 0]), call(source, [5, 6], key=[-1, 0])
    assert torch.equal(first.logits, second.logits) and source.source.seen == 32
    assert len(source.missing(0, SAMPLES * VARIANTS)) == SAMPLES * VARIANTS - 1


def test_bound(build, log):
    of_image = VARIANTS * 8 * (CLASSES // 2 + 1)
    source = build(max_bytes=10 * of_image + 5)
    assert source.samples == 10
    assert "logits of 40 images x 3 variants x 48 bytes = 0.00576 MB" in log.text
    assert "MODEL.TEACHER.CACHE_GB 1.445e-06 holds the first 10 images, the others are computed each time" in log.text
    first = call(source, range(5, 15))
    assert source.source.seen == 16
    second = call(source, range(5, 15))
    assert source.source.seen == 32 and torch.equal(first.logits, second.logits)
    assert os.path.getsize(source.folder / "logits.0.rows") == 10 * of_image
    everything = build()
    assert torch.equal(call(everything, range(5, 15)).logits, first.logits)
    nothing = build(max_bytes=10, folder=source.folder.parent / "other")
    assert torch.equal(call(nothing, range(5, 15)).logits, first.logits) and not nothing.folder.exists()


def test_the_log_says_the_size_before_anything_is_kept(build, log):
    build(("logits", "pooled"), samples=1_000_000, variants=162, max_bytes=2**40)
    (line,) = [record.message for record in log.records]
    # 10 logits and a vector of 64, with a checksum each
    assert "logits and pooled of 1000000 images x 162 variants x 312 bytes = 50.54 GB, of which 0.0" in line


def test_anything_else_is_another_folder(build):
    folders = [build().folder]
    folders.append(build(identity={"weights": "b"}).folder)
    folders.append(build(logits_dtype=torch.float16).folder)
    folders.append(build(top_k=3).folder)
    folders.append(build(precision=torch.bfloat16).folder)
    assert len({*folders}) == 5 and build(samples=5).folder == folders[0]
    shown = json.loads((folders[1] / "identity.json").read_text())
    assert shown["weights"] == "b" and shown["arithmetic"]["torch"] == torch.__version__
    assert folders[0].name.startswith("wrn_16_1-")


def test_torn_rows_are_computed_again(build):
    source = build(("logits", "pooled"))
    first = call(source, range(32))
    with open(source.folder / "pooled.0.rows", "r+b") as file:
        file.seek(3 * VARIANTS * 8 * 33 + 100)  # index 3, key 0
        file.write(bytes(50))
    source.source.seen = 0
    again = call(source, range(32))
    assert source.source.seen == 16
    assert_identical(as_dict(again), as_dict(first))
    call(source, range(32))
    assert source.source.seen == 16


def test_half_precision_logits_round_once(build):
    exact, half = call(build(), range(8)).logits, build(logits_dtype=torch.float16)
    for _ in range(2):
        logits = call(half, range(8)).logits
        assert logits.dtype == torch.float32 and torch.equal(logits, exact.half().float())
    assert ((logits - exact).abs() <= exact.abs() / 2048 + 2**-25).all()
    assert half.source.seen == 16


def test_autocast_keeps_its_type(build):
    source = build(("logits", "feats"), precision=torch.bfloat16)
    live = build(("logits", "feats")).source
    with torch.autocast("cpu", torch.bfloat16):
        expected = call(live, range(16))
    for _ in range(2):
        outputs = call(source, range(16))
        assert_identical([outputs.logits, outputs.feats], [expected.logits, expected.feats])
    assert outputs.logits.dtype == torch.bfloat16 and source.source.seen == 16


class Given(nn.Module):
    """Gives these logits for images whose first pixel is their number."""

    def __init__(self, logits):
        super().__init__()
        self.logits = logits

    def outputs(self, images):
        return Outputs(self.logits[images[:, 0, 0, 0].long()])


@pytest.mark.parametrize(("classes", "scale"), [(1000, 5.0), (40_000, 10.0), (6, 1e4)])
def test_the_largest_logits_keep_their_probability_and_the_rest_is_spread(tmp_path, classes, scale):
    torch.manual_seed(0)
    k, logits = 5, scale * torch.randn(8, classes)
    source = LiveTeacher(Given(logits), lambda images: images)
    source.needs = {"logits"}
    memory = TeacherMemory(tmp_path, "t", {}, 8, 1, 2**30, top_k=k)
    cached = CachedTeacher(source, Outputs(logits[:1]), memory, CPU)
    index = torch.arange(8)
    images = index.view(-1, 1, 1, 1).expand(-1, 3, 4, 4)
    batch = Batch(host_index=index, key=torch.zeros_like(index))
    results = [cached(images, batch).logits for _ in range(2)]
    assert torch.equal(*results)
    whole, kept = logits.double().softmax(1), results[0].double().softmax(1)
    largest = logits.topk(k).indices
    torch.testing.assert_close(kept.gather(1, largest), whole.gather(1, largest), rtol=1e-5, atol=1e-12)
    assert torch.equal(results[0].gather(1, largest), logits.gather(1, largest))
    others = kept.scatter(1, largest, math.nan)
    rest = 1 - whole.gather(1, largest).sum(1)
    for row, mass in zip(others, rest, strict=True):
        values = row[~row.isnan()]
        assert len(values) == classes - k and (values == values[0]).all()
        torch.testing.assert_close(values.sum(), mass, rtol=1e-3, atol=1e-9)
    # 5 values and the rest in fp32, 5 classes in int16 or int32, whole words, and a checksum
    assert cached.row_bytes == 8 * math.ceil((6 * 4 + 5 * (2 if classes < 2**15 else 4)) / 8) + 8


def test_all_logits_are_kept_where_there_are_no_more(build):
    assert torch.equal(call(build(top_k=CLASSES), range(8)).logits, call(build(), range(8)).logits)


def test_spread_rest():
    logits = spread_rest(
        torch.tensor([[3.0, 2.0]]), torch.tensor([[4, 1]], dtype=torch.int16), torch.tensor([[-1.0]]), 5
    )
    assert logits.tolist() == [[-1.0, 2.0, -1.0, -1.0, 3.0]]


def test_a_full_disk_ends_the_writing_only(build, log, monkeypatch):
    source = build()
    known = call(source, range(8)).logits
    write = os.pwrite

    def fail(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(row_file.os, "pwrite", fail)
    outputs = call(source, range(12))
    assert torch.equal(outputs.logits[:8], known)
    assert "is no longer written to: No space left on device; what is there is used" in log.text
    monkeypatch.setattr(row_file.os, "pwrite", write)
    call(source, range(12))
    assert len(source.missing(0, SAMPLES * VARIANTS)) == SAMPLES * VARIANTS - 8
    assert log.text.count("No space left") == 1


def test_it_is_compiled_for_the_rows_that_are_computed_at_a_time(build, monkeypatch):
    source, calls = build(), []
    monkeypatch.setattr(source.source, "compile", lambda *arguments: calls.append(arguments))
    source.compile(64)
    assert calls == [(16,)]


def test_a_folder_that_cannot_be_used(build, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"MODEL\.TEACHER\.CACHE .*file cannot be used: .*; choose another folder"):
        build(folder=tmp_path / "file")

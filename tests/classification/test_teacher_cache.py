"""MODEL.TEACHER.CACHE in trainings: what is learned stays the same, nothing stale is used, and the log says why."""

import json
import logging
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from d2distill.classification.data import ArrayDataset
from d2distill.classification.data.augment import AUGMENTATION_REGISTRY, Augmentation, build_augmentation
from d2distill.classification.data.replay import Replay
from d2distill.classification.inputs import resolve_inputs
from d2distill.classification.modeling import build_distiller
from d2distill.classification.teacher_cache import cache_teachers, cached_sources
from d2distill.classification.trainer import build_trainer, load_datasets
from d2distill.common import row_file
from d2distill.common.engine.checkpoint import save_student
from d2distill.common.engine.run_folder import read_metrics
from d2distill.common.errors import CheckpointError, ConfigError
from d2distill.common.teachers import LiveTeacher, TeacherEnsemble
from d2distill.tools.cache_teacher import main
from tests.classification.tiny_training import run, small_cfg, state
from tests.interruptions import assert_identical
from tests.processes import exit_code, in_job, run_ranks, start


@pytest.fixture
def cfg_of(tmp_path):
    def make(name="run", **settings):
        return small_cfg(
            tmp_path / name,
            **{"MODEL__TEACHER__CACHE": str(tmp_path / "cache"), "TEST__EVAL_PERIOD": 3, **settings},
        )

    return make


@pytest.fixture
def seen(monkeypatch):
    """How many images the teachers were given, in a list of one number."""
    count, call = [0], LiveTeacher.__call__

    def counted(self, inputs, batch):
        count[0] += len(inputs)
        return call(self, inputs, batch)

    monkeypatch.setattr(LiveTeacher, "__call__", counted)
    return count


def model_of(cfg):
    cfg = cfg.clone()
    train_set, _ = load_datasets(cfg)
    cfg = resolve_inputs(cfg)
    torch.manual_seed(0)
    model = build_distiller(cfg, num_samples=len(train_set))
    cache_teachers(cfg, model, train_set, steps=9)
    return model


def folders(cfg):
    return [source.folder.name for source in cached_sources(model_of(cfg).teacher_source)]


def test_a_cached_run_is_the_live_one_but_for_rounding(tmp_path, cfg_of):
    run(cfg_of("live", MODEL__TEACHER__CACHE="", LOG_PERIOD=1))
    run(cfg_of("cached", LOG_PERIOD=1))
    live, cached = (read_metrics(tmp_path / name) for name in ("live", "cached"))
    assert len(live) == 9
    for one, two in zip(live, cached, strict=True):
        for name in ("loss_ce", "loss_kd", "loss_dkd"):
            assert two[name] == pytest.approx(one[name], rel=1e-4)


def test_what_the_cache_held_changes_nothing(tmp_path, cfg_of, seen):
    run(cfg_of("empty"))
    first, empty = seen[0], state(tmp_path / "empty")
    run(cfg_of("full"))
    assert seen[0] == first
    (rows,) = tmp_path.glob("cache/*/logits.0.rows")
    data = bytearray(rows.read_bytes())
    for place in range(0, len(data), 500):
        data[place] ^= 8
    rows.write_bytes(bytes(len(data) // 3) + data[len(data) // 3 :])
    run(cfg_of("half, and torn"))
    for name in ("full", "half, and torn"):
        assert_identical(state(tmp_path / name), empty)


def test_methods_and_seeds_share_it(tmp_path, cfg_of, seen):
    save_student(tmp_path / "teacher.pth", model_of(cfg_of()).teacher.state_dict())
    settings = {"MODEL__TEACHER__WEIGHTS": str(tmp_path / "teacher.pth"), "TEST__TEACHER": False}
    settings |= {"SOLVER__EPOCHS": 1}
    run(cfg_of("a", **settings))
    first = seen[0]
    run(cfg_of("b", DISTILL__METHODS=["DKD"], MODEL__STUDENT__NAME="resnet14", **settings))
    assert seen[0] == first
    other = {"SEED": 4, "SOLVER__IMS_PER_BATCH": 8, "DATALOADER__NUM_WORKERS": 1}
    assert folders(cfg_of(**other, **settings)) == folders(cfg_of(**settings))


def run_killed_in_a_write(cfg, number):
    """A run that dies after half of its so many-th row."""
    write, count = os.pwrite, [0]

    def counted(file, data, offset):
        if len(data) > 1:  # not the byte that makes the file long
            count[0] += 1
            if count[0] == number:
                write(file, bytes(memoryview(data).cast("B"))[:20], offset)
                os.kill(os.getpid(), signal.SIGKILL)
        return write(file, data, offset)

    row_file.os.pwrite = counted
    run(cfg)


@pytest.mark.slow
@pytest.mark.parametrize("row", [5, 60])
def test_a_run_that_dies_within_a_write_is_resumed_as_if_it_had_not(tmp_path, cfg_of, row):
    run(cfg_of("unbroken", MODEL__TEACHER__CACHE=str(tmp_path / "other")))
    assert exit_code(start(run_killed_in_a_write, cfg_of("killed"), row)) == -signal.SIGKILL
    run(cfg_of("killed"), resume=True)
    assert_identical(state(tmp_path / "killed"), state(tmp_path / "unbroken"))


@pytest.mark.slow
def test_two_runs_at_once(tmp_path, cfg_of):
    run(cfg_of("alone", MODEL__TEACHER__CACHE=str(tmp_path / "other")))
    processes = [start(run, cfg_of(name)) for name in ("one", "two")]
    assert [exit_code(process) for process in processes] == [0, 0]
    for name in ("one", "two"):
        assert_identical(state(tmp_path / name), state(tmp_path / "alone"))


@pytest.mark.slow
def test_two_processes_of_a_run(tmp_path, cfg_of):
    """The last batch of an epoch has one sample: the process without gets it too, and must not keep its mix."""
    settings = {"DISTILL__METHODS": ["KD"], "DATASETS__TRAIN_SIZE": 33, "INPUT__REPLAY_EPOCHS": 2, "INPUT__CUTMIX": 1.0}
    for name in ("empty", "full"):
        assert run_ranks(2, in_job, run, cfg_of(name, **settings)) == [0, 0]
    assert_identical(state(tmp_path / "full"), state(tmp_path / "empty"))
    assert run_ranks(2, in_job, run, cfg_of("live", **settings, MODEL__TEACHER__CACHE="")) == [0, 0]
    for one, two in zip(*(read_metrics(tmp_path / name) for name in ("live", "full")), strict=True):
        assert two["loss_kd"] == pytest.approx(one["loss_kd"], rel=1e-4)


def test_the_cache_may_be_turned_off_and_on_when_a_run_is_resumed(tmp_path, cfg_of):
    run(cfg_of(SOLVER__EPOCHS=1))
    run(cfg_of(SOLVER__EPOCHS=2, MODEL__TEACHER__CACHE=""), resume=True)
    run(cfg_of(MODEL__TEACHER__CACHE_GB=1e-5), resume=True)
    assert [line["iteration"] for line in read_metrics(tmp_path / "run")][-1] == 8


def test_what_changes_the_training_may_not(cfg_of):
    run(cfg_of(SOLVER__EPOCHS=1))
    for key, message in (
        ("MODEL__TEACHER__CACHE_TOP_K", "MODEL.TEACHER.CACHE_TOP_K was 0, now 2"),
        ("MODEL__TEACHER__CACHE_DTYPE", "MODEL.TEACHER.CACHE_DTYPE was 'fp32', now 'fp16'"),
        ("INPUT__REPLAY_EPOCHS", "INPUT.REPLAY_EPOCHS was 0, now 2"),
    ):
        with pytest.raises(CheckpointError, match=message):
            run(cfg_of(SOLVER__EPOCHS=2, **{key: "fp16" if "DTYPE" in key else 2}), resume=True)


@pytest.mark.parametrize("key", ["CACHE_TOP_K", "CACHE_DTYPE"])
def test_settings_of_the_files_need_files(cfg_of, key):
    value = {"CACHE_TOP_K": 3, "CACHE_DTYPE": "fp16"}[key]
    with pytest.raises(ConfigError, match=rf"MODEL\.TEACHER\.{key} is of the files in MODEL\.TEACHER\.CACHE"):
        cfg_of(MODEL__TEACHER__CACHE="", **{f"MODEL__TEACHER__{key}": value})


@pytest.mark.parametrize(
    "settings",
    [
        {"MODEL__TEACHER__NAME": "wrn_16_2"},
        {"MODEL__TEACHER__PIXEL_MEAN": [1.0, 2.0, 3.0]},
        {"MODEL__TEACHER__PIXEL_STD": [80.0, 82.0, 83.0]},
        {"MODEL__TEACHER__CACHE_DTYPE": "fp16"},
        {"MODEL__TEACHER__CACHE_TOP_K": 3},
        {"DATASETS__TRAIN_SIZE": 39},
        {"DATASETS__VAL_FRACTION": 0.1},
        {"INPUT__SIZE": 24},
        {"INPUT__RESIZE": 20},
        {"INPUT__INTERPOLATION": "bicubic"},
        {"INPUT__AUGMENTATION": "crop_flip"},
        {"INPUT__AUGMENTATION": "none"},
        {"INPUT__REPLAY_EPOCHS": 2},
        {"SOLVER__AMP": "bf16"},
        {"SOLVER__COMPILE": "teacher"},
        {"SOLVER__MEMORY_FORMAT": "channels_last"},
    ],
    ids=lambda settings: "-".join(map(str, *settings.items())),
)
def test_other_images_or_another_teacher_are_another_folder(cfg_of, settings):
    assert folders(cfg_of(**settings)) != folders(cfg_of())


def test_other_weights_are_another_folder(tmp_path, cfg_of):
    cfg = cfg_of()
    network = model_of(cfg).teacher
    paths = []
    for name in ("a", "b"):
        paths.append(tmp_path / f"{name}.pth")
        save_student(paths[-1], network.state_dict())
        with torch.no_grad():
            network.fc.bias[0] += 1e-6
    found = [folders(cfg_of(MODEL__TEACHER__WEIGHTS=str(path))) for path in paths]
    assert found[0] != found[1]
    paths[0].rename(tmp_path / "moved.pth")
    assert folders(cfg_of(MODEL__TEACHER__WEIGHTS=str(tmp_path / "moved.pth"))) == found[0]


@pytest.mark.parametrize("settings", [{"SEED": 4}, {"SOLVER__IMS_PER_BATCH": 8}, {"INPUT__MIXUP": 0.3}])
def test_mixed_images_depend_on_their_batch(cfg_of, settings):
    replayed = {"INPUT__REPLAY_EPOCHS": 2, "DISTILL__METHODS": ["KD"]}
    assert (folders(cfg_of(**replayed, **settings)) == folders(cfg_of(**replayed))) == ("INPUT__MIXUP" not in settings)
    mixed = {**replayed, "INPUT__CUTMIX": 1.0}
    assert folders(cfg_of(**mixed, **settings)) != folders(cfg_of(**mixed))


@pytest.fixture
def image_folder(tmp_path):
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            (tmp_path / "images" / split / name).mkdir(parents=True)
            for number in range(4):
                pixels = rng.integers(0, 256, (20, 24, 3), np.uint8)
                Image.fromarray(pixels).save(tmp_path / "images" / split / name / f"{number}.png")
    return tmp_path / "images"


@pytest.mark.parametrize("change", ["time", "size", "name", "options"])
def test_other_files_are_another_folder(cfg_of, image_folder, change):
    settings = {"DATASETS__NAME": "folder", "DATASETS__ROOT": str(image_folder), "DATASETS__TRAIN_SIZE": 6}
    settings |= {"INPUT__AUGMENTATION": "crop", "MODEL__STUDENT__NAME": "cifar/resnet8"}
    settings |= {"MODEL__TEACHER__NAME": "cifar/resnet8", "MODEL__NUM_CLASSES": 0}
    before, file = folders(cfg_of(**settings)), image_folder / "train" / "cat" / "1.png"
    assert before == folders(cfg_of(**settings))
    stat = file.stat()
    if change == "time":
        os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1000))
    elif change == "size":
        file.write_bytes(file.read_bytes() + b"\0")
        os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    elif change == "name":
        file.rename(file.with_name("01.png"))
    else:
        settings["INPUT__EXIF_ORIENTATION"] = True
    assert len(before) == 1 and folders(cfg_of(**settings)) != before


class OwnCrop(Augmentation):
    """A recipe of a user's, with numbers that cannot be turned around."""

    shift = 0

    def draw(self, rng, height, width):
        return {"value": int(rng.integers(3))}

    def apply(self, image, params, size):
        return super().apply(image, params, size).clone().clamp(min=params["value"] + self.shift)

    def variants(self, size):
        return 3

    def number(self, params, size):
        return params["value"]


@pytest.fixture
def own_recipe():
    AUGMENTATION_REGISTRY.register_as("own_crop")(OwnCrop)
    yield
    AUGMENTATION_REGISTRY._obj_map.pop("own_crop")


def test_a_changed_recipe_is_another_folder(cfg_of, own_recipe, monkeypatch):
    before = folders(cfg_of(INPUT__AUGMENTATION="own_crop"))
    monkeypatch.setattr("inspect.getsource", lambda kind: f"{kind.__name__}, changed")
    assert folders(cfg_of(INPUT__AUGMENTATION="own_crop")) != before


def test_identity_in_plain_text(tmp_path, cfg_of):
    model_of(cfg_of())
    (path,) = tmp_path.glob("cache/wrn_16_1-*/identity.json")
    identity = json.loads(path.read_text())
    assert identity["teacher"]["name"] == "wrn_16_1" and identity["images"]["size"] == [16, 18, "bilinear"]
    assert identity["images"]["data set"] == "digits" and identity["images"]["augmentation"][0] == "Crop"
    assert not any(word in path.read_text() for word in ("SEED", "resnet8", "KD", str(tmp_path)))


def test_several_teachers_remember_each(cfg_of, seen):
    teachers = ["wrn_16_1", "resnet14"]
    source = model_of(cfg_of(MODEL__TEACHER__NAME=teachers)).teacher_source
    assert isinstance(source, TeacherEnsemble) and [s.memory.name for s in cached_sources(source)] == teachers
    for name in ("a", "b"):
        run(cfg_of(name, MODEL__TEACHER__NAME=teachers, SOLVER__EPOCHS=1))
        assert seen[0] == 2 * 3 * 16
    # One of them alone is the same teacher.
    assert folders(cfg_of()) == [source.sources[0].folder.name]


LIVE = "MODEL.TEACHER.CACHE is not used, the teacher runs in each step: "


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"INPUT__MIXUP": 0.2}, f"{LIVE}INPUT.MIXUP and CUTMIX make no image twice; INPUT.REPLAY_EPOCHS K repeats"),
        (
            {"INPUT__AUGMENTATION": "rotate_flip"},
            f"{LIVE}the augmentation RotateFlip makes no image twice; INPUT.REPLAY_EPOCHS K repeats the images of K",
        ),
        (
            {"INPUT__MIXUP": 0.2, "INPUT__REPLAY_EPOCHS": 2, "DATALOADER__SAMPLER": "balanced"},
            f"{LIVE}mixed images are numbered only with DATALOADER.SAMPLER shuffle and ON_ERROR raise",
        ),
        (
            {"INPUT__REPLAY_EPOCHS": 2},
            "INPUT.REPLAY_EPOCHS 2: the images of 2 epochs repeat over the whole run, in an order of their own in each "
            "epoch; without it, each epoch has new ones, and another student comes out",
        ),
    ],
)
def test_the_log_says_why_it_is_not_used(cfg_of, log, settings, line):
    model_of(cfg_of(DISTILL__METHODS=["KD"], **settings))
    assert line in log.text


def test_label_smoothing_alone_does_not_matter(cfg_of, seen):
    for name, smoothing in (("a", 0.1), ("b", 0.2)):
        run(cfg_of(name, SOLVER__LABEL_SMOOTHING=smoothing, DISTILL__METHODS=["KD"], SOLVER__EPOCHS=1))
        assert seen[0] == 3 * 16


def test_what_only_the_live_teacher_has(cfg_of, log):
    cfg = cfg_of()
    train_set, _ = load_datasets(cfg)
    cfg = resolve_inputs(cfg)
    model = build_distiller(cfg, num_samples=len(train_set))
    model.teacher_source.extras["head"] = lambda network, images: images
    model.teacher_source.needs.add("module:fc")
    cache_teachers(cfg, model, train_set, steps=9)
    assert isinstance(model.teacher_source, LiveTeacher)
    assert "a method asks it for head, module:fc, and only logits, pooled, feats, preacts are kept" in log.text


class Inverted(ArrayDataset):
    """Loads other pixels than those that it has."""

    def load(self, index):
        image, label = super().load(index)
        return 255 - image, label


def test_images_of_which_nothing_is_known(cfg_of, log):
    cfg = cfg_of()
    train_set, _ = load_datasets(cfg)
    images = train_set.dataset
    train_set.dataset = Inverted(images.info, images.images, images.labels, images.classes)
    cfg = resolve_inputs(cfg)
    model = build_distiller(cfg, num_samples=len(train_set))
    cache_teachers(cfg, model, train_set, steps=9)
    assert f"{LIVE}Inverted does not say which images it has; give it a content_digest()" in log.text


def batches_of(cfg):
    """What each step of a training gives the model."""
    trainer = build_trainer(cfg, *load_datasets(cfg))
    found, task = [], trainer.task
    for step, batch in enumerate(task.build_batches(0)):
        torch.manual_seed(step)
        batch = task.prepare(batch) if task.prepare else batch
        ((part, _),) = task.split_batch(batch, step)
        found.append(part)
    return found


def by_index(batches):
    """Each sample's image and key, by its index."""
    return {int(i): (x, int(k)) for b in batches for i, x, k in zip(b["index"], b["image"], b["key"], strict=True)}


@pytest.mark.parametrize("augmentation", ["crop", "rotate_flip"])
def test_replayed_epochs_repeat_the_images_in_another_order(cfg_of, augmentation):
    settings = {"INPUT__REPLAY_EPOCHS": 2, "SOLVER__EPOCHS": 4, "INPUT__AUGMENTATION": augmentation}
    batches = batches_of(cfg_of(**settings))
    epochs = [by_index(batches[i : i + 3]) for i in range(0, 12, 3)]
    assert [{key for _, key in epoch.values()} for epoch in epochs] == [{0}, {1}, {0}, {1}]
    for one, two in ((0, 2), (1, 3)):
        assert all(torch.equal(epochs[one][i][0], epochs[two][i][0]) for i in range(40))
    assert sum(torch.equal(epochs[0][i][0], epochs[1][i][0]) for i in range(40)) < 20
    assert not torch.equal(batches[0]["index"], batches[6]["index"])
    other = by_index(batches_of(cfg_of(SEED=9, **settings))[:3])
    assert all(torch.equal(epochs[0][i][0], other[i][0]) for i in range(40))


def test_replayed_mixing_repeats_order_and_partners(cfg_of):
    settings = {"INPUT__REPLAY_EPOCHS": 2, "SOLVER__EPOCHS": 4, "DISTILL__METHODS": ["KD"]}
    settings |= {"INPUT__MIXUP": 0.3, "INPUT__CUTMIX": 1.0}
    batches = batches_of(cfg_of(**settings))
    for one, two in zip(batches[:6], batches[6:], strict=True):
        assert all(torch.equal(one[name], two[name]) for name in ("image", "soft_target", "index", "key"))
    assert not torch.equal(batches[0]["image"], batches[3]["image"])
    other = batches_of(cfg_of(SEED=9, **settings))
    assert not torch.equal(batches[0]["index"], other[0]["index"])


def test_a_process_without_samples_does_not_keep_the_one_that_it_got(cfg_of):
    replay = Replay(2, 0, mixes=True)
    batch = {"index": torch.arange(1), "label": torch.zeros(1, dtype=torch.long)}
    assert replay.repeat(batch, 0, 3, 0.0, None)["key"].tolist() == [-1]
    assert replay.repeat(batch, 4, 3, 1.0, None)["key"].tolist() == [1]
    assert Replay(2).repeat(batch, 0, 3, 0.0, None)["key"].tolist() == [0]


@pytest.mark.parametrize("mixup", [0.0, 0.4])
def test_the_teacher_sees_the_replayed_epochs_only(tmp_path, cfg_of, seen, mixup):
    settings = {"INPUT__REPLAY_EPOCHS": 1, "DISTILL__METHODS": ["KD"], "INPUT__MIXUP": mixup}
    settings |= {"SOLVER__EPOCHS": 2, "TEST__EVAL_PERIOD": 2, "LOG_PERIOD": 1}
    run(cfg_of("cached", **settings))
    assert seen[0] == 3 * 16  # an epoch of 16 + 16 + 8
    run(cfg_of("live", MODEL__TEACHER__CACHE="", **settings))
    for one, two in zip(*(read_metrics(tmp_path / name) for name in ("live", "cached")), strict=True):
        assert two["loss_kd"] == pytest.approx(one["loss_kd"], rel=1e-4)


@pytest.mark.parametrize("name", ["none", "crop", "crop_flip"])
def test_numbers_of_variants_turn_around(name):
    recipe = build_augmentation(name)
    assert [recipe.number(recipe.numbered(n, 16), 16) for n in range(recipe.variants(16))] == [
        *range(recipe.variants(16))
    ]


def as_opts(cfg):
    """Every setting that the tests set, as KEY VALUE pairs."""
    keys = [
        "OUTPUT_DIR", "SEED", "MODEL.DEVICE", "MODEL.STUDENT.NAME", "MODEL.TEACHER.NAME", "MODEL.TEACHER.CACHE",
        "MODEL.TEACHER.WEIGHTS", "DISTILL.METHODS", "DATASETS.NAME", "DATASETS.TRAIN_SIZE", "INPUT.SIZE",
        "INPUT.REPLAY_EPOCHS", "INPUT.MIXUP", "INPUT.AUGMENTATION", "SOLVER.IMS_PER_BATCH", "DATALOADER.NUM_WORKERS",
    ]  # fmt: skip
    values = {}
    for key in keys:
        node = cfg
        for part in key.split("."):
            node = node[part]
        values[key] = node
    return [str(item) for pair in values.items() for item in pair]


@pytest.fixture
def console():
    """No handlers of the loggers that a command has set up."""
    yield
    for name in ("detectron2", "fvcore"):
        logging.getLogger(name).handlers.clear()


@pytest.mark.parametrize(
    "settings",
    [
        {"DATASETS__TRAIN_SIZE": 10, "INPUT__AUGMENTATION": "crop"},
        {"INPUT__REPLAY_EPOCHS": 2, "INPUT__AUGMENTATION": "rotate_flip"},
        {"INPUT__REPLAY_EPOCHS": 2, "INPUT__MIXUP": 0.4},
    ],
)
def test_the_command_fills_what_a_training_looks_up(tmp_path, cfg_of, seen, command, console, settings):
    teacher = tmp_path / "teacher.pth"
    save_student(teacher, model_of(cfg_of()).teacher.state_dict())
    settings = {"DISTILL__METHODS": ["KD"], "MODEL__TEACHER__WEIGHTS": str(teacher), **settings}
    cfg, before = cfg_of(**settings), seen[0]
    code, out, err = command(main, *as_opts(cfg))
    assert code == 0, err
    (size,) = [line for line in (out + err).splitlines() if " images x " in line]
    assert "wrn_16_1-" in size and "logits of" in size
    (source,) = cached_sources(model_of(cfg).teacher_source)
    rows = source.samples * source.memory.variants
    assert len(source.missing(0, rows)) == 0
    assert f"{rows}/{rows}" in err
    assert seen[0] - before >= rows
    before = seen[0]
    run(cfg)
    assert seen[0] == before
    if not settings.get("INPUT__MIXUP"):
        before = seen[0]
        command(main, *as_opts(cfg))
        assert seen[0] == before


def test_the_command_fills_what_is_missing(tmp_path, cfg_of, command, console):
    cfg = cfg_of(DATASETS__TRAIN_SIZE=5, DISTILL__METHODS=["KD"])
    teacher = tmp_path / "teacher.pth"
    save_student(teacher, model_of(cfg).teacher.state_dict())
    cfg = cfg_of(DATASETS__TRAIN_SIZE=5, DISTILL__METHODS=["KD"], MODEL__TEACHER__WEIGHTS=str(teacher))
    assert command(main, *as_opts(cfg))[0] == 0
    (rows,) = Path(tmp_path, "cache").glob(f"{folders(cfg)[0]}/logits.0.rows")
    whole = rows.read_bytes()
    rows.write_bytes(whole[:1000] + bytes(500) + whole[1500:])
    assert command(main, *as_opts(cfg))[0] == 0
    assert rows.read_bytes() == whole


def test_what_the_command_refuses(cfg_of, command, console, own_recipe):
    code, _, err = command(main, *as_opts(cfg_of(MODEL__TEACHER__CACHE="")))
    assert code == 2 and "MODEL.TEACHER.CACHE is empty: name the folder" in err
    code, _, err = command(main, *as_opts(cfg_of(DISTILL__METHODS=[])))
    assert code == 2 and "there is nothing to keep" in err
    code, _, err = command(main, *as_opts(cfg_of(INPUT__AUGMENTATION="own_crop", DISTILL__METHODS=["KD"])))
    assert code == 2 and "OwnCrop does not number its variants (Augmentation.numbered)" in err

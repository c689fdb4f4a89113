"""Every published configuration is loaded, built and stepped once; get_cfg's values are checked."""

import math
import re
from pathlib import Path

import pytest
import torch

from d2distill.classification.config import get_cfg, image_size, load_cfg, schedule_notes, validate
from d2distill.classification.data import dataset_info
from d2distill.classification.modeling import build_distiller
from d2distill.classification.models import build_model
from d2distill.classification.networks import network_info
from d2distill.classification.solver import build_lr_scheduler, build_optimizer
from d2distill.classification.trainer import load_datasets, train
from d2distill.common.config import chosen_methods
from d2distill.common.engine.writers import read_metrics
from d2distill.common.errors import ConfigError
from tests.goldens.fill import array

CONFIGS = sorted((Path(__file__).resolve().parents[2] / "configs" / "cls").glob("*.yaml"))
RUNNABLE = [path for path in CONFIGS if not path.name.startswith("base_")]
DKD_BETAS = {
    "r56_r20": 2, "r110_r32": 2, "r32x4_r8x4": 8, "wrn40_2_wrn16_2": 6, "wrn40_2_wrn40_1": 6, "vgg13_vgg8": 6,
    "vgg13_mv2": 6, "r32x4_shuv1": 8, "r32x4_shuv2": 8, "wrn40_2_shuv1": 8, "r50_mv2": 8,
}  # fmt: skip

NEVER_NEGATIVE = (
    "DATASETS.TRAIN_SIZE", "INPUT.SIZE", "SOLVER.WEIGHT_DECAY", "SOLVER.WARMUP_EPOCHS", "SOLVER.CLIP_GRAD_NORM",
    "DISTILL.CE_WEIGHT", "DATALOADER.NUM_WORKERS",
)  # fmt: skip


def load(path, *opts):
    return load_cfg(str(path), ["MODEL.DEVICE", "cpu", "MODEL.TEACHER.WEIGHTS", "", *opts])


@pytest.mark.slow
@pytest.mark.parametrize("path", RUNNABLE, ids=lambda path: path.stem)
def test_config_is_built_and_stepped(path):
    # Networks of convolutions take small images as well.
    large = path.stem.startswith(("imagenet", "folder")) and "deit" not in path.stem
    own = ["MODEL.NUM_CLASSES", "6", "MODEL.STUDENT.WEIGHTS", ""] if path.stem.startswith("folder") else []
    cfg = load(path, *(["INPUT.SIZE", "64"] if large else []), *own)
    assert cfg.OUTPUT_DIR == str(Path("output", path.stem).resolve())
    torch.manual_seed(0)
    model = build_distiller(cfg, num_samples=50)
    optimizer = build_optimizer(model, cfg.SOLVER)
    build_lr_scheduler(optimizer, cfg.SOLVER, epoch_length=10)
    size, classes = image_size(cfg), cfg.MODEL.NUM_CLASSES or dataset_info(cfg.DATASETS.NAME).num_classes
    batch = {"image": array(0, 2, 3, size, size) * 50 + 120, "label": torch.tensor([0, classes - 1])}
    batch["index"] = torch.tensor([3, 4])
    losses = model(batch, 1)
    assert set(losses) == {"loss_ce", *(f"loss_{name.lower()}" for name in cfg.DISTILL.METHODS)}
    before = [p.detach().clone() for p in model.student.parameters()]
    sum(losses.values()).backward()
    optimizer.step()
    assert all(torch.isfinite(p).all() for p in model.student.parameters())
    assert any(not torch.equal(a, b) for a, b in zip(before, model.student.parameters(), strict=True))


@pytest.mark.parametrize(("pair", "beta"), DKD_BETAS.items())
def test_published_cifar_pairs(pair, beta):
    path = CONFIGS[0].parent
    dkd, kd = load(path / f"cifar100_{pair}_dkd.yaml"), load(path / f"cifar100_{pair}_kd.yaml")
    assert dkd.DISTILL.METHODS == ["DKD"] and dkd.DISTILL.DKD.BETA == beta and dkd.DISTILL.CE_WEIGHT == 1.0
    assert (dkd.DISTILL.DKD.ALPHA, dkd.DISTILL.DKD.T, dkd.DISTILL.DKD.WARMUP) == (1.0, 4.0, 20)
    assert kd.DISTILL.METHODS == ["KD"] and kd.DISTILL.CE_WEIGHT == 0.1
    assert (kd.DISTILL.KD.WEIGHT, kd.DISTILL.KD.T) == (0.9, 4.0)
    assert dkd.MODEL == kd.MODEL and dkd.SOLVER == kd.SOLVER
    small = pair.endswith(("mv2", "shuv1", "shuv2"))
    assert dkd.SOLVER.BASE_LR == (0.01 if small else 0.05) and dkd.SOLVER.EPOCHS == 240
    for name in (dkd.MODEL.TEACHER.NAME, dkd.MODEL.STUDENT.NAME):
        assert any(load(p).MODEL.STUDENT.NAME == name for p in RUNNABLE if p.stem.count("_") < 3), name


def test_the_imagenet_recipe_of_mmrazor():
    """8 x 32 images and its rate; the mimic loss from the first step on (its DKDLoss: tau 1, alpha 1, beta 0.5)."""
    cfg = load(CONFIGS[0].parent / "imagenet_r34_r18_dkd_mmrazor.yaml")
    solver, dkd = cfg.SOLVER, cfg.DISTILL.DKD
    assert (cfg.MODEL.TEACHER.NAME, cfg.MODEL.STUDENT.NAME) == ("ResNet34", "ResNet18")
    assert (solver.IMS_PER_BATCH, solver.BASE_LR, solver.MOMENTUM, solver.WEIGHT_DECAY) == (256, 0.1, 0.9, 1e-4)
    assert (solver.EPOCHS, solver.STEPS, solver.GAMMA, solver.OPTIMIZER) == (100, [30, 60, 90], 0.1, "SGD")
    assert (dkd.WEIGHT, dkd.ALPHA, dkd.BETA, dkd.T, dkd.WARMUP, cfg.DISTILL.CE_WEIGHT) == (1, 1, 0.5, 1, 0, 1)


def test_stages_of_mobilenetv1_as_published():
    """ReviewKD takes all four and the pooled vector; AT leaves the first out and pairs from the shallow end."""
    shapes = {
        "reviewkd": [(128, 256), (256, 512), (512, 1024), (1024, 2048), (1024, 2048)],
        "at": [(256, 256), (512, 512), (1024, 1024)],
    }
    for name, pairs in shapes.items():
        cfg = load(CONFIGS[0].parent / f"imagenet_r50_mv1_{name}.yaml")
        student, teacher = (
            network_info(build_model(f"imagenet/{node.NAME}", 1000), 224)
            for node in (cfg.MODEL.STUDENT, cfg.MODEL.TEACHER)
        )
        (method,) = chosen_methods(cfg).values()
        stages = method(cfg.DISTILL[name.upper()], student, teacher).select_pairs(student, teacher)
        assert [(s[0], t[0]) for s, t in zip(*stages, strict=True)] == pairs


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (["DISTILL.METHODS", ["DKT"]], r"no method DKT \(did you mean .*DKD"),
        (["DISTILL.METHODS", ["KD", "KD"]], "twice"),
        (["DISTILL.METHODS", ["KD"]], "MODEL.TEACHER.NAME is empty"),
        (["MODEL.STUDENT.NAME", ""], "MODEL.STUDENT.NAME is empty"),
        (["DATASETS.NAME", "cifar1000"], r"did you mean cifar100"),
        (["SOLVER.EPOCHS", 0], "SOLVER.EPOCHS is 0"),
        (["SOLVER.OPTIMIZER", "SDG"], r"SOLVER.OPTIMIZER SDG .*did you mean SGD"),
        (["SOLVER.LR_SCHEDULE", "cosin"], "did you mean cosine"),
        (["SOLVER.STEPS", [20, 10]], r"SOLVER.STEPS is \[20, 10\], but must be a list of increasing numbers"),
        (["SEED", -1], "SEED is -1"),
        (["MODEL.STUDENT.PIXEL_MEAN", [1.0]], "takes 3 numbers"),
        (["MODEL.TEACHER.NAME", "vgg8", "MODEL.TEACHER.PIXEL_STD", [1.0, 0.0, 1.0]], "takes 3 positive numbers"),
        (["MODEL.TEACHER.NAME", ["vgg8", "vgg13"], "MODEL.TEACHER.WEIGHTS", "a.pth"], "WEIGHTS has 1 entries for 2"),
        (["MODEL.TEACHER.NAME", ["vgg8", "vgg13"], "MODEL.TEACHER.SHARES", [1.0, 0.0]], "SHARES must be positive"),
        (["SOLVER.AMP", "fp8"], "SOLVER.AMP fp8"),
        (["SOLVER.OPTIMIZER", "DOT"], "DOT needs a method"),
        (["SOLVER.OPTIMIZER", "DOT", "SOLVER.DELTA", 0.2], "SOLVER.DELTA"),
        (["MODEL.DEVICE", "cuda:99"], "GPU"),
        (["MODEL.DEVICE", "quantum"], "MODEL.DEVICE quantum"),
        (["DISTILL.METHODS", [1]], "DISTILL.METHODS is .* a list of names"),
        (["MODEL.TEACHER.NAME", [1, 2]], "a name, or a list of names"),
        (["MODEL.TEACHER.SHARES", ["a"]], "a list of numbers"),
        (["MODEL.STUDENT.PIXEL_MEAN", ["a", "b", "c"]], r"takes 3 numbers .* but is \['a', 'b', 'c'\]"),
        (["MODEL.TEACHER.NAME", ["vgg8", "vgg13"], "MODEL.TEACHER.PIXEL_STD", [[1, 2, 3], 5]], "takes 3 .* but is 5"),
        (["SOLVER.BASE_LR", -0.1], "SOLVER.BASE_LR is -0.1, but must be at least 0"),
        (["SOLVER.MOMENTUM", 1.5], "at least 0 and below 1"),
        (["SOLVER.NESTEROV", True, "SOLVER.MOMENTUM", 0], "NESTEROV needs a momentum"),
        *(([key, -1], f"{key} is -1.*, but must be at least 0") for key in NEVER_NEGATIVE),
    ],
)
def test_impossible_settings(opts, message):
    cfg = get_cfg()
    cfg.merge_from_list(["MODEL.STUDENT.NAME", "resnet8", *opts])
    with pytest.raises(ConfigError, match=message):
        validate(cfg)


@pytest.mark.parametrize(("size", "left"), [(0, 1297), (1297, 1297), (40, 40)])
def test_as_many_samples_as_were_asked_for(size, left):
    cfg = get_cfg()
    cfg.merge_from_list(["DATASETS.NAME", "digits", "DATASETS.TRAIN_SIZE", size])
    assert len(load_datasets(cfg)[0]) == left and cfg.MODEL.NUM_CLASSES == 10
    cfg.DATASETS.TRAIN_SIZE = 1298
    with pytest.raises(ConfigError, match="TRAIN_SIZE is 1298, but there are 1297 samples"):
        load_datasets(cfg)


@pytest.mark.parametrize(
    ("text", "opts", "message"),
    [
        ("IMPORTS: foo.py\n", [], r"IMPORTS takes a list, but was given foo\.py; write \[foo\.py\]"),
        ("IMPORTS: [5]\n", [], "IMPORTS is .* a list of names"),
        ("", ["IMPORTS", "[foo.py]"], "IMPORTS: foo.py: FileNotFoundError"),
    ],
)
def test_imports_that_name_nothing(tmp_path, text, opts, message):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_cfg(str(tmp_path / "c.yaml"), opts)


def test_imports_on_a_command_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "touch.py").write_text("open('touched', 'w').close()\n")
    cfg = load_cfg("", ["IMPORTS", "[touch.py]", "MODEL.STUDENT.NAME", "resnet8"])
    assert (tmp_path / "touched").exists() and cfg.IMPORTS == [str(tmp_path / "touch.py")]


def test_a_config_file_that_is_none(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"--config-file .*no such file"):
        load_cfg(str(tmp_path / "c.yaml"))


@pytest.mark.parametrize(
    ("given", "found"), [("", "output/c"), ("run", "run"), ("~/run", "home/run"), ("2024", "2024"), ("/x", "/x")]
)
def test_the_run_folders_settings_name_it_from_anywhere(tmp_path, monkeypatch, given, found):
    (tmp_path / "c.yaml").write_text("MODEL: {STUDENT: {NAME: resnet8}}\n")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    cfg = load_cfg("c.yaml", ["OUTPUT_DIR", given])
    assert cfg.OUTPUT_DIR == str(tmp_path / found)
    (tmp_path / "config.yaml").write_text(cfg.dump())
    monkeypatch.chdir("/")
    assert load_cfg(str(tmp_path / "config.yaml")) == cfg


def test_files_of_a_configuration_are_found_from_anywhere(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "a.pth").touch()
    monkeypatch.chdir(tmp_path / "here")
    cfg = load_cfg("", ["MODEL.STUDENT.NAME", "resnet8", "MODEL.STUDENT.WEIGHTS", "a.pth", "DATASETS.ROOT", "../data"])
    assert cfg.MODEL.STUDENT.WEIGHTS == str(tmp_path / "here" / "a.pth")
    assert cfg.DATASETS.ROOT == str(tmp_path / "data")
    teachers = ["MODEL.TEACHER.NAME", "[vgg8, vgg8]", "MODEL.TEACHER.WEIGHTS", "[a.pth, timm:x]"]
    cfg = load_cfg("", ["MODEL.STUDENT.NAME", "resnet8", *teachers])
    assert cfg.MODEL.TEACHER.WEIGHTS == [str(tmp_path / "here" / "a.pth"), "timm:x"]


@pytest.mark.parametrize(
    ("opts", "notes"),
    [
        ([], []),
        (["SOLVER.EPOCHS", 160], [r"SOLVER.EPOCHS is 160: .* not lowered at 180, 210 of SOLVER.STEPS .*set STEPS"]),
        (["SOLVER.EPOCHS", 2, "SOLVER.LR_SCHEDULE", "cosine"], []),
        (["SOLVER.EPOCHS", 2, "SOLVER.STEPS", [1], "SOLVER.WARMUP_EPOCHS", 5], ["warm-up of SOLVER.WARMUP_EPOCHS 5"]),
        (["SOLVER.EPOCHS", 2, "SOLVER.STEPS", [0.5, 0.75]], [r"is 2: .* not lowered at 0.75 of SOLVER.STEPS"]),
        (
            ["SOLVER.EPOCHS", 2, "SOLVER.STEPS", [], "DISTILL.METHODS", ["KD", "DKD"]],
            ["SOLVER.EPOCHS is 2: the run ends in the warm-up of DISTILL.DKD.WARMUP 20"],
        ),
    ],
)
def test_what_a_short_run_never_reaches(opts, notes):
    cfg = get_cfg()
    cfg.merge_from_list(opts)
    found = schedule_notes(cfg)
    assert len(found) == len(notes) and all(re.search(*pair) for pair in zip(notes, found, strict=True))


@pytest.mark.parametrize(
    ("settings", "factors"),
    [
        ({"EPOCHS": 4, "STEPS": [1, 3], "GAMMA": 0.1}, [1, 1, 0.1, 0.1, 0.1, 0.1, 0.01, 0.01]),
        ({"EPOCHS": 4, "STEPS": [2, 50]}, [1, 1, 1, 1, 0.1, 0.1, 0.1, 0.1]),
        # Shares of the run count up to whole epochs, also where several fall into one.
        ({"EPOCHS": 4, "STEPS": [0.3, 0.75], "GAMMA": 0.1}, [1, 1, 1, 1, 0.1, 0.1, 0.01, 0.01]),
        ({"EPOCHS": 2, "STEPS": [0.3, 0.5, 0.9]}, [1, 1, 0.01, 0.01]),
        ({"EPOCHS": 1, "STEPS": [0.3, 0.6]}, [1, 1]),
        ({"EPOCHS": 2, "LR_SCHEDULE": "cosine"}, [1, 0.85355, 0.5, 0.14645]),
        ({"EPOCHS": 4, "STEPS": [], "WARMUP_EPOCHS": 2}, [0.001, 0.25075, 0.5005, 0.75025, 1, 1, 1, 1]),
    ],
)
def test_learning_rates(settings, factors):
    solver = get_cfg().SOLVER
    for key, value in settings.items():
        solver[key] = value
    optimizer = build_optimizer(torch.nn.Linear(1, 1), solver)
    scheduler = build_lr_scheduler(optimizer, solver, epoch_length=2)
    rates = []
    for _ in factors:
        rates.append(optimizer.param_groups[0]["lr"] / solver.BASE_LR)
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx(factors, rel=1e-4)


@pytest.mark.parametrize(
    ("name", "settings", "expected"),
    [
        ("SGD", {"NESTEROV": True, "MOMENTUM": 0.8}, {"nesterov": True, "momentum": 0.8, "weight_decay": 0.3}),
        ("DOT", {"DELTA": 0.05, "MOMENTUM": 0.8}, {"delta": 0.05, "momentum": 0.8, "weight_decay": 0.3}),
        ("AdamW", {}, {"weight_decay": 0.3}),
    ],
)
def test_optimizers_take_their_settings(name, settings, expected):
    solver = get_cfg().SOLVER
    for key, value in {"OPTIMIZER": name, "BASE_LR": 0.02, "WEIGHT_DECAY": 0.3, **settings}.items():
        solver[key] = value
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4)).requires_grad_()
    model[0].bias.requires_grad_(False)
    groups = build_optimizer(model, solver).param_groups
    assert {"lr": 0.02, **expected}.items() <= groups[0].items()
    assert sum(len(group["params"]) for group in groups) == 3  # the frozen one is left out
    if name == "AdamW":  # only matrices and kernels decay
        assert [[p.ndim for p in group["params"]] for group in groups] == [[4], [1, 1]]
        assert groups[1]["weight_decay"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("path", [p for p in RUNNABLE if p.stem.startswith("digits_")], ids=lambda path: path.stem)
def test_two_epochs_on_digits(path, tmp_path):
    """From its YAML, through the trainer: loader, schedule, evaluation, checkpoints."""
    opts = ["SOLVER.EPOCHS", "2", "TEST.EVAL_PERIOD", "2", "DATASETS.TRAIN_SIZE", "40", "SOLVER.IMS_PER_BATCH", "16"]
    results = train(load(path, *opts, "OUTPUT_DIR", str(tmp_path)))
    last = read_metrics(tmp_path)[-1]
    assert last["iteration"] == 5 and last["top1"] == results["top1"] and 0 <= results["top1"] <= results["top5"] <= 100
    assert all(math.isfinite(value) for value in last.values())

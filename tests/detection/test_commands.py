"""The command line of detection, and stock Detectron2 with the files of its runs."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from detectron2.modeling import BACKBONE_REGISTRY

from d2distill.commands import train_det
from d2distill.common.distillers import DISTILLERS
from d2distill.common.engine.writers import read_metrics
from tests.detection.tiny_training import STEPS, TINY, run, state, tiny_cfg
from tests.interruptions import assert_identical
from tests.processes import run_ranks, script


def train(processes, *arguments):
    assert run_ranks(processes, script, "detection/train_net.py", *arguments) == [0] * processes


def write(cfg, path):
    path.write_text(cfg.dump())
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny):
    """A run with many detections."""
    folder = tmp_path_factory.mktemp("trained")
    settings = {"MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0.0, "DISTILL.REVIEWKD.WEIGHT": 1e-3}
    cfg = tiny_cfg("rcnn", folder / "run", **settings)
    write(cfg, folder / "tiny.yaml")
    run(cfg)
    return folder


def predictions(folder):
    return json.loads(Path(folder, "inference", "tiny_val", "coco_instances_results.json").read_text())


STOCK = """
import json, sys
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg
from detectron2.data import build_detection_test_loader
from detectron2.data.datasets import register_coco_instances
from detectron2.evaluation import COCOEvaluator, inference_on_dataset
from detectron2.modeling import build_model

root, folder, settings = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
register_coco_instances("tiny_val", {}, f"{root}/tiny/annotations/val.json", f"{root}/tiny/val")
cfg = get_cfg()
cfg.merge_from_list(settings)
model = build_model(cfg).eval()
left = DetectionCheckpointer(model).load(f"{folder}/student_final.pth")
results = inference_on_dataset(
    model, build_detection_test_loader(cfg, "tiny_val"), COCOEvaluator("tiny_val", output_dir=f"{folder}/stock")
)
ours = [name for name in sys.modules if name.split(".")[0] in ("common", "classification", "detection")]
print("\\nRESULT", json.dumps([type(model).__name__, ours, results["bbox"]["AP"]]))
"""


@pytest.mark.slow
def test_stock_detectron2_gives_the_same_detections(trained, tiny, tmp_path):
    cfg = tiny_cfg("rcnn", trained / "run")
    keys = ["RESNETS", "FPN", "ANCHOR_GENERATOR", "RPN", "ROI_HEADS", "ROI_BOX_HEAD", "BACKBONE"]
    nodes = {f"MODEL.{key}": cfg.MODEL[key] for key in keys}
    settings = [x for name, node in nodes.items() for key, value in node.items() for x in (f"{name}.{key}", value)]
    settings += ["MODEL.PIXEL_MEAN", cfg.MODEL.PIXEL_MEAN, "MODEL.PIXEL_STD", cfg.MODEL.PIXEL_STD]
    settings += ["MODEL.DEVICE", "cpu", "INPUT.FORMAT", "RGB", "INPUT.MIN_SIZE_TEST", 96, "MODEL.MASK_ON", False]
    settings += ["MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0, "DATALOADER.NUM_WORKERS", 0]
    # In an interpreter that knows nothing of this package.
    line = [sys.executable, "-c", STOCK, str(tiny), str(trained / "run"), json.dumps(settings)]
    env = {**os.environ, "PYTHONPATH": ""}
    printed = subprocess.run(line, cwd=tmp_path, env=env, check=True, stdout=subprocess.PIPE, text=True).stdout
    kind, ours, average_precision = json.loads(printed.split("RESULT")[1])
    assert kind == "GeneralizedRCNN" and not ours
    found = json.loads((trained / "run" / "stock" / "coco_instances_results.json").read_text())
    assert len(found) > 20 and found == predictions(trained / "run")
    assert average_precision == json.loads((trained / "run" / "results.json").read_text())["bbox/AP"]


@pytest.mark.slow
def test_evaluate_again(trained, tmp_path, command):
    run, config = trained / "run", ("--config-file", trained / "tiny.yaml", "--eval-only")
    before = predictions(run)
    final = ("MODEL.WEIGHTS", run / "student_final.pth", "OUTPUT_DIR", tmp_path)
    # Averaged over scales and flips too.
    _, printed, _ = command(train_det, *config, *final, "TEST.AUG.ENABLED", True, "TEST.AUG.MIN_SIZES", "(96,)")
    results = json.loads((run / "results.json").read_text())
    assert f"bbox/AP {results['bbox/AP']:.2f}, bbox/AP50 {results['bbox/AP50']:.2f}" in printed
    assert "bbox/AP_TTA" in printed
    # A run's checkpoint holds the student too.
    command(train_det, *config, "MODEL.WEIGHTS", run / f"model_{STEPS:07d}.pth", "OUTPUT_DIR", tmp_path)
    assert predictions(tmp_path) == before
    assert command(train_det, *config, *final, "TEST.EXPECTED_RESULTS", "[[bbox, AP, 101, 0.5]]")[0] == 1
    # Without weights on the command line those of the run folder, not those that the training began with.
    _, printed, _ = command(train_det, *config)
    assert f"{run / 'student_best.pth'}: bbox/AP {results['best_bbox/AP']:.2f}" in printed


@pytest.mark.slow
def test_two_processes_train_stop_and_resume(tiny, tmp_path):
    """On CPUs with gloo; both see the batches of one process, each its half."""
    settings = {"MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0.0, "DISTILL.REVIEWKD.WEIGHT": 1e-3, "TEST.EVAL_PERIOD": 0}
    whole = write(tiny_cfg("rcnn", tmp_path / "whole", **settings), tmp_path / "whole.yaml")
    train(2, "--config-file", whole, "SOLVER.CHECKPOINT_KEEP", 9)
    # As if both had been killed after the fourth step.
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    (tmp_path / "parts" / f"model_{STEPS:07d}.pth").unlink()
    train(2, "--config-file", whole, "OUTPUT_DIR", tmp_path / "parts", "SOLVER.CHECKPOINT_KEEP", 9, "--resume")
    assert_identical(state(tmp_path / "parts"), state(tmp_path / "whole"))
    assert len({record["image_id"] for record in predictions(tmp_path / "whole")}) == 4
    # Of the same images, so not far from one process's, whose proposals are drawn by other numbers.
    run(one := tiny_cfg("rcnn", tmp_path / "one", **settings))
    for a, b in zip(read_metrics(one.OUTPUT_DIR), read_metrics(tmp_path / "whole"), strict=True):
        assert a["loss_reviewkd"] == pytest.approx(b["loss_reviewkd"], rel=0.2)


def test_errors_are_one_line(tiny, tmp_path, monkeypatch, command):
    config = write(tiny_cfg("rcnn", tmp_path / "run"), tmp_path / "tiny.yaml")

    def error(*arguments, file=config):
        code, _, printed = command(train_det, "--config-file", file, *arguments)
        lines = [line for line in printed.splitlines() if line.startswith("error: ")]
        assert code == 2 and len(lines) == 1 and "Traceback" not in printed
        return printed

    assert "no such file" in error(file=tmp_path / "no.yaml")
    assert "did you mean SOLVER.BASE_LR" in error("SOLVER.BASE_LRR", 1)
    assert "MODEL.ROI_HEADS.NUM_CLASSES" in error("MODEL.ROI_HEADS.NUM_CLASSES", 11)
    assert "TEACHER.MODEL.WEIGHTS" in error("TEACHER.MODEL.WEIGHTS", tmp_path / "no.pth")
    assert "MODEL.WEIGHTS" in error("MODEL.WEIGHTS", tmp_path / "no.pth")
    assert "did you mean tiny_train" in error("DATASETS.TRAIN", "('tiny_trian',)")
    assert "has no student_best.pth or student_final.pth" in error("MODEL.DEVICE", "cpu", "--eval-only")
    assert "TEST.AUG.ENABLED" in error(
        "--eval-only", "MODEL.WEIGHTS", tiny / "teacher_retinanet.pth", "TEST.AUG.ENABLED", True,
        file=write(tiny_cfg("retinanet", tmp_path / "r"), tmp_path / "retinanet.yaml"),
    )  # fmt: skip
    assert not (tmp_path / "run" / "config.yaml").exists()
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    message = error("OUTPUT_DIR", tmp_path / "run", "MODEL.DEVICE", "cpu", file="configs/det/dkd_r101_r18.yaml")
    assert "instances_train2017.json" in message and "cocodataset" in message.lower()


def test_own_modules_and_data(tiny, tmp_path, command):
    """IMPORTS is relative to the YAML; a backbone, a method and a data set of one's own."""
    (tmp_path / "mine.py").write_text(
        "from detectron2.modeling import BACKBONE_REGISTRY\n"
        "from detectron2.modeling.backbone.fpn import build_resnet_fpn_backbone\n"
        "from d2distill.common.distillers import DISTILLERS, LogitDistiller\n"
        "@BACKBONE_REGISTRY.register()\n"
        "def build_mine(cfg, input_shape):\n"
        "    return build_resnet_fpn_backbone(cfg, input_shape)\n"
        "@DISTILLERS.register()\n"
        "class Squared(LogitDistiller):\n"
        "    def forward(self, student, teacher, batch):\n"
        "        difference = self.student_logits(student) - self.teacher_logits(teacher)\n"
        "        return difference.square().sum() / max(len(difference), 1)\n"
    )
    cfg = tiny_cfg("rcnn", tmp_path / "run", **{"DISTILL.METHODS": [], "TEST.EVAL_PERIOD": 0, "SOLVER.MAX_ITER": 2})
    content = cfg.dump().replace("IMPORTS: []", "IMPORTS: [mine.py]").replace("METHODS: []", "METHODS: [Squared]")
    (tmp_path / "tiny.yaml").write_text(content)
    opts = ("MODEL.BACKBONE.NAME", "build_mine", "DISTILL.SQUARED.WEIGHT", 0.1)
    try:
        assert command(train_det, "--config-file", tmp_path / "tiny.yaml", *opts)[0] == 0
    finally:
        DISTILLERS._obj_map.pop("Squared", None)
        BACKBONE_REGISTRY._obj_map.pop("build_mine", None)
    assert "loss_squared" in read_metrics(tmp_path / "run")[-1] and set(TINY) == {"train", "val"}

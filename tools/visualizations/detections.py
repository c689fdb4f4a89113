"""What detectors find: ground truth, teacher and students beside each other on the same pictures."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from detectron2.structures import Instances
from matplotlib.figure import Figure

from d2distill.common.config import CfgNode
from d2distill.common.errors import ConfigError, DataError
from d2distill.deployed import load, student_file
from d2distill.detection.config import load_cfg, num_classes
from d2distill.detection.data import load_test_set, register_datasets
from d2distill.detection.deployed import DeployedDetector
from d2distill.detection.teacher import build_teacher
from d2distill.tools.visualizations.boxes import detection_grid, found_boxes, true_boxes
from d2distill.tools.visualizations.runs import run_label, run_settings, unique_labels
from d2distill.tools.visualizations.style import styled

__all__ = ["detections_figure"]


@dataclass(frozen=True)
class _Detector:
    label: str
    classes: Sequence[str]
    detect: Callable[[Any], Instances]  # of a file


@styled
def detections_figure(
    runs: Sequence[str | Path],
    teacher: str | Path | None = None,
    opts: Sequence[str] = (),
    pictures: Sequence[str | Path] = (),
    samples: int = 4,
    threshold: float = 0.3,
    device: str = "cpu",
) -> Figure:
    """A row for each picture: its ground truth, then what the teacher and each student find in it.

    Args:
        runs: run folders of detectors, or ``student_*.pth`` files.
        teacher: a run folder or a file in the place of the teacher that the runs name.
        opts: KEY VALUE pairs that replace settings of the runs, such as ``["TEACHER.MODEL.WEIGHTS", "r101.pth"]``.
        pictures: files, which have no ground truth; none: the first `samples` images of DATASETS.TEST.
        threshold: the lowest score of a box that is drawn.

    Raises:
        DataError: a classifier, or an exported program.
        ConfigError: neither pictures nor a run folder that names test images.
    """
    models = [_load_detector(run, device) for run in runs]
    folders = [student_file(run).parent for run in runs]
    settings = [run_settings(folder) for folder in folders]
    cfgs = [
        load_cfg(str(folder / "config.yaml"), ["MODEL.DEVICE", device, *opts])
        for folder, own in zip(folders, settings, strict=True)
        if own
    ]
    labels = [
        run_label(own, folder) if own else model.description["network"]
        for own, folder, model in zip(settings, folders, models, strict=True)
    ]
    detectors = [
        _detector(label, m) for label, m in zip(unique_labels(labels, [*map(Path, runs)]), models, strict=True)
    ]
    if teacher is not None:
        model = _load_detector(teacher, device)
        folder = student_file(teacher).parent
        name = run_label(run_settings(folder), folder) if run_settings(folder) else model.description["network"]
        detectors.insert(0, _detector(f"teacher {name}", model))
    elif (cfg := next((cfg for cfg in cfgs if cfg.DISTILL.METHODS and cfg.TEACHER.MODEL.WEIGHTS), None)) is not None:
        detectors.insert(0, _teacher(cfg, models[0]))
    files, columns, what = [*map(str, pictures)], {}, "given pictures"
    if not files:
        if not cfgs:
            raise ConfigError("no config.yaml beside the weights names test images: name the run's folder, or pictures")
        register_datasets(cfgs[0])
        what = cfgs[0].DATASETS.TEST[0]
        records = load_test_set(cfgs[0], what)[:samples]
        files, columns = [record["file_name"] for record in records], {"ground truth": true_boxes(what, records)}
    for detector in detectors:
        columns[detector.label] = [found_boxes(detector.detect(file), detector.classes, threshold) for file in files]
    title = f"Detections in {what}, scores of {threshold:.0%} or more"
    return detection_grid(files, columns, title, width=12)


def _load_detector(path: str | Path, device: str) -> DeployedDetector:
    model = load(path, device)
    if model.description["task"] != "detection":
        raise DataError(f"{path} is a classifier: detections is for detectors; see attention and confusion")
    if not isinstance(model, DeployedDetector):
        raise DataError(f"{path} is an exported program: name the run's folder")
    return model


def _detector(label: str, model: DeployedDetector) -> _Detector:
    return _Detector(
        label, _class_names(model.cfg, model.classes), lambda file: model([model.preprocess(file)])[0]["instances"]
    )


def _teacher(cfg: CfgNode, student: DeployedDetector) -> _Detector:
    """The teacher as it taught: on the student's images."""
    teacher = build_teacher(cfg)
    teacher.load_weights()
    return _Detector(
        f"teacher {Path(cfg.TEACHER.CONFIG_FILE).stem}".strip(),
        _class_names(teacher.cfg, student.classes),
        lambda file: teacher.detect([student.preprocess(file)])[0]["instances"],
    )


def _class_names(cfg: CfgNode, names: Sequence[str]) -> list[str]:
    """The names, or numbers where a detector has other classes than these."""
    number = num_classes(cfg)[1]
    return list(names) if len(names) == number else [str(kind) for kind in range(number)]

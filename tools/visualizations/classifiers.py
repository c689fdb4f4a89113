"""The classifiers of runs, their teacher, and the test images that all of them are shown."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from d2distill.classification.config import load_cfg, teacher_nodes
from d2distill.classification.data import ImageDataset, dataset_info
from d2distill.classification.data.augment import CenterFit, eval_transform
from d2distill.classification.data.datasets import ImageSelection, read_image
from d2distill.classification.data.loader import FixedSubset, build_test_loader
from d2distill.classification.data.splits import load_test_set
from d2distill.classification.data.unreadable import UnreadableImages
from d2distill.classification.deployed import DeployedClassifier
from d2distill.classification.inputs import resolve_inputs
from d2distill.classification.networks import Normalize, build_network
from d2distill.common.config import CfgNode
from d2distill.common.errors import ConfigError, DataError, did_you_mean
from d2distill.common.outputs import Outputs
from d2distill.deployed import load, student_file
from d2distill.tools.visualizations.runs import run_label, run_settings, unique_labels

__all__ = ["Classifier", "Lineup", "load_lineup"]


@dataclass(frozen=True)
class Classifier:
    """A trained network as figures see it.

    Attributes:
        network: has ``outputs(images)`` of normalized images (N, 3, S, S), on some device.
        normalize: makes those of images in 0..255.
        fit: brings pictures to S x S pixels.
    """

    label: str
    network: nn.Module
    normalize: nn.Module
    fit: CenterFit

    @torch.inference_mode()
    def outputs(self, images: Tensor) -> Outputs:
        """Of images (N, 3, S, S) in 0..255."""
        return self.network.outputs(self.normalize(images))


@dataclass
class Lineup:
    """Networks to compare, on the same images.

    Attributes:
        students: one for each run.
        teacher: None where no run has one.
        classes: their names, in the order of the logits.
        cfg: of the first run that has a config.yaml; None where none has.
        read_options: of :func:`.read_image`.
    """

    students: list[Classifier]
    teacher: Classifier | None
    classes: list[str]
    cfg: CfgNode | None
    read_options: dict[str, Any] = field(default_factory=dict)

    @property
    def networks(self) -> list[Classifier]:
        """The teacher, if there is one, and the students."""
        return [*filter(None, [self.teacher]), *self.students]

    def need_teacher(self) -> Classifier:
        """The teacher; a ConfigError where there is none."""
        if self.teacher is None:
            raise ConfigError(
                "no teacher: none of the runs names one with weights (MODEL.TEACHER.WEIGHTS); give the teacher's own "
                "run folder as --teacher"
            )
        return self.teacher

    def test_set(self, samples: int = 0, classes: Sequence[str] = ()) -> ImageDataset:
        """The test images of the first run, or so many of them, always the same.

        Args:
            classes: only images of these.

        Raises:
            ConfigError: a class that there is not, or no run folder that names a data set.
            DataError: the test images have other classes than the students, or several each.
        """
        if self.cfg is None:
            raise ConfigError("no config.yaml beside the weights names test images: name the run's folder")
        dataset = load_test_set(self.cfg)
        if dataset.classes != self.classes:
            raise DataError(
                f"the test images have other classes than the student ({', '.join(dataset.classes[:5])} ...): "
                "see DATASETS.ROOT"
            )
        if dataset.info.multi_label:
            raise DataError(f"{dataset.info.name}: images have several classes; this figure is for one class each")
        if unknown := [name for name in classes if name not in dataset.classes]:
            raise ConfigError(f"--classes: no class {unknown[0]}{did_you_mean(unknown[0], dataset.classes)}")
        if classes:
            chosen = [dataset.classes.index(name) for name in classes]
            dataset = ImageSelection(dataset, np.flatnonzero(np.isin(dataset.labels.numpy(), chosen)))
        return FixedSubset(dataset, samples) if 0 < samples < len(dataset) else dataset

    def run(self, network: Classifier, dataset: ImageDataset) -> tuple[Outputs, Tensor]:
        """Logits and pooled vectors of all images, on the CPU, and their classes (N,)."""
        unreadable = UnreadableImages() if self.cfg.DATALOADER.ON_ERROR == "skip" else None
        workers = self.cfg.DATALOADER.NUM_WORKERS
        parts: list[tuple[Tensor | None, ...]] = []
        for batch in build_test_loader(dataset, self.cfg.TEST.IMS_PER_BATCH, network.fit, workers, unreadable):
            outputs = network.outputs(batch["image"])
            parts.append((outputs.logits, outputs.pooled, batch["label"]))
        logits, pooled, labels = (None if c[0] is None else torch.cat(c).cpu() for c in zip(*parts, strict=True))
        return Outputs(logits=logits, pooled=pooled), labels

    def pictures(self, sources: Sequence[str | Path], samples: int) -> list[tuple[str, Image.Image]]:
        """What to call them, and the pictures: files, or the first `samples` test images with their class."""
        if sources:
            return [(Path(source).name, read_image(str(source), **self.read_options)) for source in sources]
        dataset = self.test_set(samples)
        loaded = [dataset.load(index) for index in range(len(dataset))]
        images = [
            Image.fromarray(image.permute(1, 2, 0).numpy()) if isinstance(image, Tensor) else image
            for image, _ in loaded
        ]
        return [(self.classes[label], image) for image, (_, label) in zip(images, loaded, strict=True)]


def fit_picture(network: Classifier, picture: Image.Image) -> Tensor:
    """The picture as the network sees it before normalization: uint8 (3, S, S)."""
    return eval_transform(picture, network.fit)


def load_lineup(
    runs: Sequence[str | Path], teacher: str | Path | None = None, opts: Sequence[str] = (), device: str = "cpu"
) -> Lineup:
    """The students of runs, and the teacher of the first run that has one.

    Args:
        runs: run folders, or ``student_*.pth`` files.
        teacher: a run folder or a file in the place of the teacher that the runs name.
        opts: KEY VALUE pairs that replace settings of the runs, such as ``["DATASETS.ROOT", "/data"]``.

    Raises:
        DataError: a detector, an exported program, or students of different classes.
        CheckpointError: no student, or no weights of the teacher.
    """
    loaded = [_load_classifier(run, device) for run in runs]
    for run, model in zip(runs, loaded, strict=True):
        if model.classes != loaded[0].classes:
            raise DataError(f"{run} and {runs[0]} have different classes: draw them apart")
    folders = [student_file(run).parent for run in runs]
    settings = [run_settings(folder) for folder in folders]
    labels = [
        run_label(own, folder) if own else model.description["network"]
        for own, folder, model in zip(settings, folders, loaded, strict=True)
    ]
    students = [
        _as_classifier(label, m) for label, m in zip(unique_labels(labels, [*map(Path, runs)]), loaded, strict=True)
    ]
    cfgs = [
        resolve_inputs(load_cfg(str(folder / "config.yaml"), ["MODEL.DEVICE", "cpu", *opts]))
        for folder, own in zip(folders, settings, strict=True)
        if own
    ]
    if teacher is not None:
        model = _load_classifier(teacher, device)
        found = _as_classifier(f"teacher {model.description['network']}", model)
    else:
        found = next((_teacher(cfg, len(loaded[0].classes), device) for cfg in cfgs if _names_teacher(cfg)), None)
    return Lineup(students, found, loaded[0].classes, cfgs[0] if cfgs else None, loaded[0].preprocess.read_options)


def _load_classifier(path: str | Path, device: str) -> DeployedClassifier:
    model = load(path, device)
    if model.description["task"] != "classification":
        raise DataError(f"{path} is a detector: this figure is for classifiers; see curves and detections")
    if not isinstance(model, DeployedClassifier):
        raise DataError(f"{path} is an exported program, which shows nothing of its inside: name the run's folder")
    return model


def _as_classifier(label: str, model: DeployedClassifier) -> Classifier:
    prepared = model.preprocess
    device = next(model.network.parameters()).device
    return Classifier(label, model.network, prepared.normalize.to(device), prepared.fit)


def _names_teacher(cfg: CfgNode) -> bool:
    return bool(cfg.DISTILL.METHODS and teacher_nodes(cfg) and teacher_nodes(cfg)[0].WEIGHTS)


def _teacher(cfg: CfgNode, num_classes: int, device: str) -> Classifier:
    node = teacher_nodes(cfg)[0]
    network = build_network(cfg, "MODEL.TEACHER", node, num_classes).eval().to(device)
    normalize = Normalize.of(node, dataset_info(cfg.DATASETS.NAME)).to(device)
    fit = CenterFit(cfg.INPUT.SIZE, cfg.INPUT.RESIZE, cfg.INPUT.INTERPOLATION)
    return Classifier(f"teacher {node.NAME}", network, normalize, fit)

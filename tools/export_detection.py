"""Export of detectors: what is written, on which pictures it is checked, how its outputs are compared."""

import copy
import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from detectron2.utils.analysis import FlopCountAnalysis
from PIL import Image
from torch import Tensor, nn

from d2distill.common.errors import UserError
from d2distill.deployed import load
from d2distill.detection.config import load_cfg, num_classes
from d2distill.detection.data import check_test_sets
from d2distill.detection.evaluation import EvaluationData, evaluate_detector
from d2distill.detection.teacher import build_teacher
from d2distill.exported import save_onnx, save_safetensors, save_ts
from d2distill.tools.measuring import Row, median_ms, state_bytes
from d2distill.tools.predict import find_pictures

#: Boxes (R, 4) of one image, their scores and classes.
Found = tuple[Tensor, Tensor, Tensor]


class Export:
    """A run's student, and the pictures that its files are checked on; as :class:`.export_classification.Export`."""

    formats = {"safetensors": ".safetensors", "torchscript": ".ts", "onnx": ".onnx"}

    def __init__(self, file: Path, opts: list[str], images: str | None, device: torch.device) -> None:
        config = file.parent / "config.yaml"
        # First, for what the run's IMPORTS register.
        self.cfg = load_cfg(str(config), ["MODEL.DEVICE", str(device), *opts]) if config.is_file() else None
        self.device, self.student = device, load(file, str(device))
        self.inputs, self.pictures = self._test_pictures(images)
        # What latency and FLOPs are measured on, and what is traced.
        self.example = self.inputs[0] if self.inputs else self._first_test_image()
        self.found, self.precision = self._run(self.student)
        self.metrics = [name for name in self.precision if name.endswith(("/AP", "/AP50"))] or ["bbox/AP", "bbox/AP50"]
        height, width = self.example["image"].shape[1:]
        self.caption = (
            f"FLOPs and latency: of one image of {width} x {height} (a file takes one at a time). AP: percent, on "
            f"{self.pictures}."
        )
        self.dataset = ", ".join(self.cfg.DATASETS.TEST) if self.cfg else ""
        self.origin = self._origin()

    def _origin(self) -> str:
        if not self.cfg:
            return "of a run whose config.yaml is not known"
        methods, teacher = ", ".join(self.cfg.DISTILL.METHODS), Path(self.cfg.TEACHER.CONFIG_FILE).name
        how = f"by {methods}{teacher and f' from {teacher}'}" if methods else "without a teacher"
        return f"trained on {', '.join(self.cfg.DATASETS.TRAIN)} {how}"

    def _test_pictures(self, images: str | None) -> tuple[list[dict[str, Any]] | None, str]:
        """Inputs to run on, or None for the test images, and what they are."""
        reason = "the run's config.yaml is not beside it"
        try:
            if self.cfg is not None:
                self.data = EvaluationData(self.cfg, check_test_sets(self.cfg))
                return None, f"the test images of {', '.join(self.cfg.DATASETS.TEST)}"
        except (UserError, FileNotFoundError) as error:
            reason = str(error).splitlines()[0]
        if images:
            pictures, what = find_pictures([images]), f"the pictures of {images}"
        else:
            noise = np.random.default_rng(0).integers(256, size=(4, 240, 320, 3), dtype=np.uint8)
            pictures, what = [Image.fromarray(pixels) for pixels in noise], "4 random images"
        inputs = [self.student.preprocess(picture) for picture in pictures]
        return inputs, f"{what}, without AP, as there are no test images ({reason})"

    def _first_test_image(self) -> dict[str, Any]:
        (example,) = next(iter(self.data.loader(self.cfg.DATASETS.TEST[0])))
        return example

    def _run(
        self, detect: Callable[[list[dict[str, Any]]], list[dict[str, Any]]]
    ) -> tuple[list[Found], dict[str, float]]:
        """What is found in each picture, and the average precision where they have annotations."""
        found: list[Found] = []

        def record(inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
            with torch.no_grad():
                results = detect(inputs)
            boxes = [result["instances"].to("cpu") for result in results]
            found.extend((x.pred_boxes.tensor, x.scores, x.pred_classes) for x in boxes)
            return results

        if self.inputs is None:
            cfg = self.cfg.clone()
            # Pycocotools prints, and Detectron2 keeps the predictions in files.
            with TemporaryDirectory() as cfg.OUTPUT_DIR, redirect_stdout(io.StringIO()):
                return found, evaluate_detector(cfg, record, data=self.data)
        for entry in self.inputs:
            record([entry])
        return found, {}

    def write(self, form: str, path: Path) -> None:
        """Write a file of one of :attr:`formats`."""
        if form == "safetensors":
            return save_safetensors(self.student.network, self.student.description, path)
        save = {"torchscript": save_ts, "onnx": save_onnx}[form]
        network = copy.deepcopy(self.student.network).cpu()
        return save(network, self.example["image"].float(), self.student.description, path)

    def check(self, path: Path) -> Row:
        """The row of a file, read again and run on all pictures."""
        opened = load(path, str(self.device))
        found, metrics = self._run(opened)
        difference = _difference(self.found, found)
        return Row(path.name, None, None, path.stat().st_size, self._latency(opened), metrics, difference)

    def student_row(self) -> Row:
        row = self._row("student", self.student.network, self.student)
        row.metrics = self.precision
        return row

    def teacher_rows(self) -> Iterator[Row]:
        """A row for the teacher if its weights are there; if not, that is printed."""
        if not self.cfg or not self.cfg.DISTILL.METHODS:
            return
        try:
            teacher = build_teacher(self.cfg)
            if not teacher.weights:
                raise UserError("TEACHER.MODEL.WEIGHTS is empty")
            teacher.load_weights()
        except (UserError, FileNotFoundError) as error:
            print(f"without the teacher: {error}", flush=True)
            return
        row = self._row("teacher", teacher.network, teacher.detect)
        if num_classes(teacher.cfg)[1] == len(self.student.classes):
            row.metrics = self._run(teacher.detect)[1]
        yield row

    def _row(self, label: str, network: nn.Module, detect: Callable) -> Row:
        flops = (
            FlopCountAnalysis(network, [self.example]).unsupported_ops_warnings(False).uncalled_modules_warnings(False)
        )
        parameters = sum(p.numel() for p in network.parameters())
        return Row(label, parameters, int(flops.total()), state_bytes(network), self._latency(detect))

    def _latency(self, detect: Callable) -> dict[int, float]:
        # Images differ in size, and a file takes one at a time.
        inputs = [self.example]
        with torch.no_grad():
            return {1: median_ms(lambda: detect(inputs), self.device)}


def _difference(own: Sequence[Found], other: Sequence[Found]) -> str:
    """Of detections of the same class: those within a pixel of each other, and how far these are apart at most."""
    total, pixels, scores = 0, [], []
    for (boxes, confidence, classes), (their_boxes, their_confidence, their_classes) in zip(own, other, strict=True):
        total += len(boxes)
        if not len(boxes) or not len(their_boxes):
            continue
        # Equal scores may come in another order.
        apart = (boxes[:, None] - their_boxes).abs().amax(2)
        apart[classes[:, None] != their_classes] = torch.inf
        apart, nearest = apart.min(1)
        close = apart < 1
        pixels += apart[close].tolist()
        scores += (confidence - their_confidence[nearest])[close].abs().tolist()
    number = sum(len(boxes) for boxes, _, _ in other)
    return (
        f"{max(pixels, default=0):.2g} pixels and {max(scores, default=0):.2g} in a score; {len(pixels)} of {total} "
        f"boxes are found again among {number}"
    )

"""Export of classifiers: what is written, on which pictures it is checked, how its outputs are compared."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from d2distill.classification.config import load_cfg, teacher_nodes
from d2distill.classification.data import dataset_info
from d2distill.classification.data.loader import FixedSubset, build_test_loader
from d2distill.classification.data.splits import load_splits, load_test_set
from d2distill.classification.data.unreadable import UnreadableImages
from d2distill.classification.deployed import DeployedClassifier, ExportedClassifier
from d2distill.classification.evaluation import build_evaluator
from d2distill.classification.inputs import resolve_inputs
from d2distill.classification.networks import Normalize, build_network, model_stats, network_info
from d2distill.common.errors import DataError, UserError
from d2distill.deployed import load
from d2distill.exported import quantize_onnx, save_onnx, save_pt2, save_safetensors
from d2distill.tools.measuring import Row, median_ms, state_bytes
from d2distill.tools.predict import find_pictures

#: Images that the ranges of int8 are taken from.
CALIBRATION_IMAGES = 256


class Export:
    """A run's student, and the pictures that its files are checked on.

    Attributes:
        formats: that there are, with the endings of their files.
        student: as loaded.
        pictures: which they are, for the log.
        metrics: names of what evaluators of test images give.
        caption: what the numbers of a row are of.
        dataset: the name of the run's; empty where it is not known.
        origin: how the student was trained, a part of a sentence.
    """

    formats = {"safetensors": ".safetensors", "pt2": ".pt2", "onnx": ".onnx"}
    metrics = ("top1", "top5", "mAP")

    def __init__(self, file: Path, opts: list[str], images: str | None, device: torch.device) -> None:
        self.device = device
        # First, for what the run's IMPORTS register.
        config = file.parent / "config.yaml"
        self.cfg = resolve_inputs(load_cfg(str(config), ["MODEL.DEVICE", "cpu", *opts])) if config.is_file() else None
        self.student = load(file)
        self.size = self.student.preprocess.fit.size
        self.evaluator = None
        self.batches, self.pictures = self._test_pictures(images)
        self.eager = _takes_pixels(self.student).to(device)
        self.logits, self.accuracy = self._run(self.eager)
        self.caption = f"FLOPs: of one image of {self.size} x {self.size}. Accuracy: percent, on {self.pictures}."
        self.dataset = self.cfg.DATASETS.NAME if self.cfg else ""
        self.origin = self._origin()

    def _origin(self) -> str:
        if not self.cfg:
            return "of a run whose config.yaml is not known"
        methods, teachers = ", ".join(self.cfg.DISTILL.METHODS), ", ".join(n.NAME for n in teacher_nodes(self.cfg))
        how = f"by {methods}{teachers and f' from {teachers}'}" if methods else "without a teacher"
        return f"trained on {self.dataset} {how}"

    def _test_pictures(self, images: str | None) -> tuple[Any, str]:
        test_set, reason = None, "the run's config.yaml is not beside it"
        try:
            test_set = load_test_set(self.cfg) if self.cfg else None
        except (UserError, FileNotFoundError) as error:
            reason = str(error).splitlines()[0]
        if test_set is not None:
            if test_set.classes != self.student.classes:
                raise DataError(
                    f"the test images have other classes than the student ({', '.join(test_set.classes[:5])} ...): "
                    "see DATASETS.ROOT"
                )
            self.evaluator = build_evaluator(test_set.info)
            unreadable = UnreadableImages() if self.cfg.DATALOADER.ON_ERROR == "skip" else None
            fit, workers = self.student.preprocess.fit, self.cfg.DATALOADER.NUM_WORKERS
            loader = build_test_loader(test_set, self.cfg.TEST.IMS_PER_BATCH, fit, workers, unreadable)
            return loader, f"{len(test_set)} test images of {test_set.info.name}"
        if images:
            pixels = [self.student.preprocess.pixels(path) for path in find_pictures([images])]
            batches, what = torch.stack(pixels).split(64), f"{len(pixels)} pictures of {images}"
        else:
            generator = torch.Generator().manual_seed(0)
            shape = (32, 3, self.size, self.size)
            batches, what = [torch.randint(256, shape, generator=generator, dtype=torch.uint8)], "32 random images"
        what = f"{what}, without accuracy, as there are no test images ({reason})"
        return [{"image": batch} for batch in batches], what

    @torch.no_grad()
    def _run(self, network: nn.Module) -> tuple[Tensor, dict[str, float]]:
        """Logits of all pictures, on the CPU, and the accuracy where they have labels."""
        logits = []
        if self.evaluator is not None:
            self.evaluator.reset()
        for batch in self.batches:
            logits.append(network(batch["image"].to(self.device).float()).cpu())
            if self.evaluator is not None:
                self.evaluator.process(batch, logits[-1])
        return torch.cat(logits), {} if self.evaluator is None else self.evaluator.evaluate()

    def write(self, form: str, path: Path) -> None:
        """Write a file of one of :attr:`formats`."""
        if form == "safetensors":
            return save_safetensors(self.student.network, self.student.description, path)
        network = copy.deepcopy(_takes_pixels(self.student)).cpu()
        example = torch.zeros(2, 3, self.size, self.size)
        save = {"pt2": save_pt2, "onnx": save_onnx}[form]
        return save(network, example, self.student.description, path)

    def check(self, path: Path) -> Row:
        """The row of a file, read again and run on all pictures."""
        opened = _takes_pixels(load(path, str(self.device))).to(self.device)
        logits, metrics = self._run(opened)
        differing = (logits - self.logits).abs().max().item()
        same = (self._chosen(logits) == self._chosen(self.logits)).all(1).sum().item()
        difference = f"{differing:.2g} in a logit; {same} of {len(logits)} pictures have the same class"
        return Row(path.name, None, None, path.stat().st_size, self._latency(opened), metrics, difference)

    def _chosen(self, logits: Tensor) -> Tensor:
        """The classes of each picture, (N, 1), or (N, C) for those that have several."""
        return logits > 0 if self.student.description.get("multi_label") else logits.argmax(1, keepdim=True)

    def student_row(self) -> Row:
        row = self._row("student", self.student.network, self.eager)
        row.metrics = self.accuracy
        return row

    def teacher_rows(self) -> Iterator[Row]:
        """A row for each teacher whose weights are there; others are named on the console."""
        nodes = teacher_nodes(self.cfg) if self.cfg and self.cfg.DISTILL.METHODS else []
        for node in nodes:
            try:
                if not node.WEIGHTS:
                    raise UserError("MODEL.TEACHER.WEIGHTS is empty")
                network = build_network(self.cfg, "MODEL.TEACHER", node, len(self.student.classes)).eval()
            except UserError as error:
                print(f"without the teacher {node.NAME}: {error}", flush=True)
                continue
            norm = Normalize.of(node, dataset_info(self.cfg.DATASETS.NAME))
            pixels = nn.Sequential(norm, network).to(self.device)
            row = self._row(f"teacher {node.NAME}", network, pixels)
            # A teacher without classes has no accuracy.
            if network_info(network, self.size).num_classes == len(self.student.classes):
                row.metrics = self._run(pixels)[1]
            yield row

    def _row(self, label: str, network: nn.Module, pixels: nn.Module) -> Row:
        stats = model_stats(network, self.size)
        return Row(label, stats["parameters"], stats["flops"], state_bytes(network), self._latency(pixels))

    @torch.no_grad()
    def _latency(self, network: nn.Module) -> dict[int, float]:
        image = next(iter(self.batches))["image"][:1].to(self.device).float()
        batches = {size: image.expand(size, -1, -1, -1).contiguous() for size in (1, 32)}
        return {size: median_ms(lambda batch=batch: network(batch), self.device) for size, batch in batches.items()}

    def quantize(self, path: Path, output: Path) -> str:
        """Write an ONNX file once more with weights and activations of 8 bits; returns what it was calibrated on."""
        try:
            train_set = load_splits(self.cfg)[0] if self.cfg else None
        except (UserError, FileNotFoundError):
            train_set = None
        batches, what = self.batches, self.pictures
        if train_set is not None:
            chosen = FixedSubset(train_set, min(CALIBRATION_IMAGES, len(train_set)))
            batches = build_test_loader(chosen, 32, self.student.preprocess.fit, 0)
            what = f"{len(chosen)} training images"
        quantize_onnx(path, output, (batch["image"] for batch in batches))
        return what


def _takes_pixels(student: DeployedClassifier | ExportedClassifier) -> nn.Module:
    """The student as a network of images in 0..255."""
    if isinstance(student, ExportedClassifier):
        return student
    prepared = student.description["preprocess"]
    return nn.Sequential(Normalize(prepared["mean"], prepared["std"]), student.network).eval()

"""What a student detector needs when it is used: described beside its weights, and built again from there."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.config import get_cfg as detectron2_cfg
from detectron2.data import MetadataCatalog
from detectron2.data.detection_utils import build_augmentation, convert_PIL_to_numpy, read_image
from detectron2.data.transforms import AugInput, AugmentationList
from detectron2.modeling import build_model
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import Boxes, Instances
from PIL import Image
from torch import Tensor, nn

from d2distill.common.config_node import parse_yaml
from d2distill.common.engine.weight_files import compare_states, source_digest
from d2distill.common.errors import CheckpointError, DataError
from d2distill.detection.config import copy_settings
from d2distill.detection.data.loader import check_depth

__all__ = ["DeployedDetector", "ExportedDetector", "describe_student", "load_program", "load_student_file"]

#: What is built in place of this package's detectors where there is no teacher.
_STOCK = {"DistillRCNN": "GeneralizedRCNN", "DistillRetinaNet": "RetinaNet"}


class DeployedDetector(nn.Module):
    """A trained student with what belongs to it. Detectron2's inputs to Detectron2's results.

    Attributes:
        network: Detectron2's own model.
        classes: their names, in the order of the classes in the results.
        preprocess: makes Detectron2's input (``image``, ``height``, ``width``) of a path or a PIL image.
        cfg: a configuration of stock Detectron2, from which the network is built.
        description: all that its file says of it.
    """

    def __init__(self, network: nn.Module, cfg: CfgNode, description: Mapping[str, Any]) -> None:
        super().__init__()
        self.network, self.cfg, self.description = network, cfg, dict(description)
        self.classes = list(description["classes"])
        self.preprocess = Preprocess(cfg)
        self.eval()

    @torch.no_grad()
    def forward(self, batched_inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return self.network(batched_inputs)


class ExportedDetector(nn.Module):
    """A student from a file of ``d2distill-export``, used as a :class:`DeployedDetector`; it is run image by image.

    Attributes:
        classes, preprocess, description: as there.
    """

    def __init__(self, program: Callable[[Tensor], Sequence[Tensor]], description: Mapping[str, Any]) -> None:
        super().__init__()
        self.program, self.description = program, dict(description)
        self.classes = list(description["classes"])
        self.preprocess = Preprocess(_described_cfg(description))

    def forward(self, batched_inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        results = []
        for entry in batched_inputs:
            size = entry["image"].shape[1:]
            boxes, scores, classes = self.program(entry["image"].float())
            found = Instances(tuple(size), pred_boxes=Boxes(boxes), scores=scores, pred_classes=classes)
            height, width = entry.get("height", size[0]), entry.get("width", size[1])
            results.append({"instances": detector_postprocess(found, height, width)})
        return results


class Preprocess:
    """From a path or a PIL image to Detectron2's input, resized as for its evaluation."""

    def __init__(self, cfg: CfgNode) -> None:
        self.format, self.augmentations = cfg.INPUT.FORMAT, AugmentationList(build_augmentation(cfg, is_train=False))

    def __call__(self, image: str | Path | Image.Image) -> dict[str, Any]:
        try:
            if isinstance(image, Image.Image):
                check_depth(image, "given")
                pixels = convert_PIL_to_numpy(image, self.format)
            else:
                with Image.open(image) as opened:
                    check_depth(opened, str(image))
                # Detectron2's own reading, which turns photographs upright as their EXIF entry says.
                pixels = read_image(str(image), self.format)
        except DataError:
            raise
        except Exception as error:  # decoders raise nearly anything
            raise DataError(f"cannot read image {image}: {error}; repair or replace the file") from error
        height, width = pixels.shape[:2]
        resized = AugInput(pixels)
        self.augmentations(resized)
        tensor = torch.as_tensor(np.ascontiguousarray(resized.image.transpose(2, 0, 1)))
        return {"image": tensor, "height": height, "width": width}


def describe_student(cfg: CfgNode) -> dict[str, Any]:
    """The description of a run's student."""
    stock = detectron2_cfg()
    stock = CfgNode({key: stock[key] for key in ("VERSION", "MODEL", "INPUT", "TEST")})
    copy_settings(stock, cfg)
    stock.MODEL.META_ARCHITECTURE = _STOCK.get(cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.META_ARCHITECTURE)
    # They belong to the machine, and to the training.
    stock.MODEL.WEIGHTS, stock.MODEL.DEVICE = "", "cpu"
    weights = {"MODEL.WEIGHTS": cfg.MODEL.WEIGHTS}
    if cfg.DISTILL.METHODS:
        weights["TEACHER.MODEL.WEIGHTS"] = cfg.TEACHER.MODEL.WEIGHTS
    data = {name: _data_digest(name) for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST)}
    return {
        "task": "detection",
        "network": f"{stock.MODEL.META_ARCHITECTURE} {stock.MODEL.BACKBONE.NAME}",
        "classes": list(MetadataCatalog.get(cfg.DATASETS.TRAIN[0]).get("thing_classes", [])),
        "preprocess": {
            "format": cfg.INPUT.FORMAT,
            "min_size": cfg.INPUT.MIN_SIZE_TEST,
            "max_size": cfg.INPUT.MAX_SIZE_TEST,
            "mean": list(cfg.MODEL.PIXEL_MEAN),
            "std": list(cfg.MODEL.PIXEL_STD),
        },
        "imports": [Path(name).name for name in cfg.IMPORTS],
        "config": stock.dump(),
        "made_from": {**{key: source_digest(source) for key, source in weights.items() if source}, **data},
    }


def _data_digest(name: str) -> dict[str, str]:
    json_file = MetadataCatalog.get(name).get("json_file")
    return source_digest(json_file) if json_file else {"source": name}


def load_student_file(file: str, weights: Mapping[str, Tensor], description: Mapping[str, Any]) -> DeployedDetector:
    """The student of a file with such weights and such a description, on the CPU.

    Raises:
        CheckpointError: they do not belong together, or the network is of a user's own code that is not imported.
    """
    try:
        cfg = _described_cfg(description)
        with torch.random.fork_rng(devices=[]):
            network = build_model(cfg)
        student = DeployedDetector(network, cfg, description)
    except Exception as error:  # a description may say anything
        # It may name code, but none is imported because a file says so.
        own = description.get("imports")
        hint = f": import {', '.join(map(str, own))} first" if isinstance(own, list) and own else ""
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{file}: the network that it describes cannot be built ({reason}){hint}") from error
    own_state = network.state_dict()
    if any(differing := compare_states(own_state, weights)):
        raise CheckpointError(f"{file}: the weights are not of the network that it describes: {differing}")
    with torch.no_grad():
        # By name and in place: load_state_dict resets frozen batch norms that a plain dict does not mention.
        for name in own_state.keys() & weights.keys():
            own_state[name].copy_(weights[name])
    return student


def load_program(program: Callable[[Tensor], Sequence[Tensor]], description: Mapping[str, Any]) -> ExportedDetector:
    """The student of an exported file."""
    return ExportedDetector(program, description).eval()


def _described_cfg(description: Mapping[str, Any]) -> CfgNode:
    cfg = detectron2_cfg()
    cfg.merge_from_other_cfg(CfgNode(parse_yaml(description["config"])))
    return cfg

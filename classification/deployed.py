"""What a student needs when it is used: described beside its weights, and built again from there."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from PIL import Image
from torch import Tensor, nn

from d2distill.classification.config import get_cfg, teacher_nodes
from d2distill.classification.data import ImageDataset, dataset_info
from d2distill.classification.data.augment import CenterFit, eval_transform
from d2distill.classification.data.datasets import read_image, to_rgb
from d2distill.classification.data.splits import read_options
from d2distill.classification.modeling import build_distiller
from d2distill.classification.networks import Normalize
from d2distill.common.config import CfgNode, chosen_methods
from d2distill.common.config_node import parse_yaml
from d2distill.common.distillers import Distiller
from d2distill.common.engine.weight_files import compare_states, source_digest
from d2distill.common.errors import CheckpointError

__all__ = [
    "DeployedClassifier", "ExportedClassifier", "describe_student", "load_program", "load_student_file",
    "shipped_methods",
]  # fmt: skip

#: A data set of this package for each family of models, in place of one that may not be known where a student is used.
_STOCK = {"cifar": "cifar100", "tiny_imagenet": "tiny_imagenet", "imagenet": "folder"}


class DeployedClassifier(nn.Module):
    """A trained student with what belongs to it. Normalized images (N, 3, S, S) to logits (N, C).

    Attributes:
        network: the student itself.
        classes: their names, in the order of the logits.
        preprocess: makes a normalized float tensor (3, S, S) of a path or a PIL image.
        description: all that its file says of it.
    """

    def __init__(self, network: nn.Module, description: Mapping[str, Any]) -> None:
        super().__init__()
        self.network, self.description = network, dict(description)
        self.classes = list(description["classes"])
        self.preprocess = Preprocess(**description["preprocess"])
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)


class ExportedClassifier(nn.Module):
    """A student from a file of ``d2distill-export`` that normalizes by itself. Images (N, 3, S, S) to logits (N, C).

    Attributes:
        classes, description: as :class:`DeployedClassifier`'s.
        preprocess: makes a uint8 tensor (3, S, S) of a path or a PIL image.
    """

    def __init__(self, program: Callable[[Tensor], Sequence[Tensor]], description: Mapping[str, Any]) -> None:
        super().__init__()
        self.program, self.description = program, dict(description)
        self.classes = list(description["classes"])
        self.preprocess = Preprocess(**description["preprocess"]).pixels

    def forward(self, images: Tensor) -> Tensor:
        return self.program(images.float())[0]


class Preprocess:
    """From a path or a PIL image to what a network takes, as in the student's own evaluation.

    Args:
        mean, std: of each channel, in 0..255.
        size, resize, interpolation: as :class:`.CenterFit`.
        channels: their order; always RGB.
        read_options: of :func:`.read_image`.
    """

    def __init__(
        self,
        mean: list[float],
        std: list[float],
        size: int,
        resize: int,
        interpolation: str,
        channels: str = "RGB",
        **read_options: Any,
    ) -> None:
        self.fit, self.normalize = CenterFit(size, resize, interpolation), Normalize(mean, std)
        self.read_options = read_options

    def __call__(self, image: str | Path | Image.Image) -> Tensor:
        """A normalized float tensor (3, size, size); a DataError for a file that cannot be read."""
        return self.normalize(self.pixels(image))

    def pixels(self, image: str | Path | Image.Image) -> Tensor:
        """The same before normalization: uint8 (3, size, size)."""
        read = to_rgb if isinstance(image, Image.Image) else read_image
        return eval_transform(read(image, **self.read_options), self.fit)


def shipped_methods(cfg: CfgNode) -> list[str]:
    """The methods whose student is deployed with something of theirs."""
    return [name for name, kind in chosen_methods(cfg).items() if kind.deployed is not Distiller.deployed]


def describe_student(cfg: CfgNode, train_set: ImageDataset, test_set: ImageDataset) -> dict[str, Any]:
    """The description of a run's student, of a configuration in which no input setting is open."""
    student, shipped = cfg.MODEL.STUDENT, shipped_methods(cfg)
    family = dataset_info(cfg.DATASETS.NAME).model_family
    # No more than what builds the network: paths and data of the training are of no use elsewhere.
    config = {
        "MODEL": {"NUM_CLASSES": cfg.MODEL.NUM_CLASSES, "STUDENT": {"NAME": student.NAME}},
        "DATASETS": {"NAME": _STOCK.get(family, "folder")},
        "INPUT": {"SIZE": cfg.INPUT.SIZE},
    }
    if shipped:
        config["MODEL"]["TEACHER"] = {"NAME": cfg.MODEL.TEACHER.NAME}
        config["DISTILL"] = {"METHODS": shipped} | {n.upper(): dict(cfg.DISTILL[n.upper()]) for n in shipped}
    weights = {"MODEL.STUDENT.WEIGHTS": student.WEIGHTS}
    weights |= {f"MODEL.TEACHER.WEIGHTS {i}": node.WEIGHTS for i, node in enumerate(teacher_nodes(cfg))}
    data: dict[str, Any] = {"source": cfg.DATASETS.NAME}
    splits = {"training images": train_set, "test images": test_set}
    data |= {name: {"number": len(split), "sha256": split.fingerprint()} for name, split in splits.items()}
    return {
        "task": "classification",
        "network": " + ".join([student.NAME, *shipped]),
        "classes": train_set.classes,
        "multi_label": train_set.info.multi_label,
        "preprocess": {
            "mean": list(student.PIXEL_MEAN),
            "std": list(student.PIXEL_STD),
            "size": cfg.INPUT.SIZE,
            "resize": cfg.INPUT.RESIZE,
            "interpolation": cfg.INPUT.INTERPOLATION,
            "channels": "RGB",
            **read_options(cfg),
        },
        "imports": [Path(name).name for name in cfg.IMPORTS],
        "config": yaml.safe_dump(config, sort_keys=False),
        "made_from": {**{key: source_digest(source) for key, source in weights.items() if source}, "DATASETS": data},
    }


def load_student_file(file: str, weights: Mapping[str, Tensor], description: Mapping[str, Any]) -> DeployedClassifier:
    """The student of a file with such weights and such a description, on the CPU.

    Raises:
        CheckpointError: they do not belong together, or the network is of a user's own code that is not imported.
    """
    try:
        cfg = get_cfg()
        cfg.merge_from_other_cfg(parse_yaml(description["config"]))
        cfg.merge_from_list(["MODEL.DEVICE", "cpu"])
        with torch.random.fork_rng(devices=[]):
            network = build_distiller(cfg).deployed_student()
        student = DeployedClassifier(network, description)
    except (KeyError, TypeError, ValueError, AttributeError, yaml.YAMLError) as error:
        # A file may name code, but none is imported because a file says so.
        own = f": import {', '.join(description['imports'])} first" if description.get("imports") else ""
        raise CheckpointError(f"{file}: the network that it describes cannot be built ({error}){own}") from error
    if any(differing := compare_states(network.state_dict(), weights)):
        raise CheckpointError(f"{file}: the weights are not of the network that it describes: {differing}")
    network.load_state_dict(weights, strict=False)
    return student


def load_program(program: Callable[[Tensor], Sequence[Tensor]], description: Mapping[str, Any]) -> ExportedClassifier:
    """The student of an exported file."""
    return ExportedClassifier(program, description).eval()

"""Statistics, size, interpolation and crop belong to the network."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.models import ResNet50_Weights

from d2distill.classification.config import get_cfg, validate
from d2distill.classification.data import build_dataset
from d2distill.classification.data.augment import CenterFit, eval_transform
from d2distill.classification.inputs import resolve_inputs
from d2distill.classification.modeling import build_distiller
from d2distill.common.errors import ConfigError


def resolved(name, data="folder", *opts):
    cfg = get_cfg()
    cfg.merge_from_list(["DATASETS.NAME", data, "MODEL.STUDENT.NAME", name, "MODEL.DEVICE", "cpu", *opts])
    validate(cfg)
    return resolve_inputs(cfg)


@pytest.mark.parametrize(
    ("name", "mean", "size", "resize", "interpolation"),
    [
        ("timm:vit_tiny_patch16_224.augreg_in21k_ft_in1k", 127.5, 224, 248, "bicubic"),  # crop_pct 0.9
        ("timm:vit_small_patch14_dinov2.lvd142m", 0.485 * 255, 518, 518, "bicubic"),
        ("torchvision:resnet50", 0.485 * 255, 224, 232, "bilinear"),
        ("torchvision:inception_v3", 127.5, 299, 342, "bilinear"),
        ("ResNet18", 0.485 * 255, 224, 256, "bilinear"),
    ],
)
def test_what_a_library_published(name, mean, size, resize, interpolation):
    cfg = resolved(name)
    assert cfg.MODEL.STUDENT.PIXEL_MEAN[0] == pytest.approx(mean)
    assert (cfg.INPUT.SIZE, cfg.INPUT.RESIZE, cfg.INPUT.INTERPOLATION) == (size, resize, interpolation)
    assert resolve_inputs(cfg) == cfg


def test_the_weights_say_it_before_the_name():
    """IMAGENET1K_V1 and _V2 of one network were tested with other crops."""
    weights = [f"torchvision:{weights}" for weights in (ResNet50_Weights.IMAGENET1K_V1, ResNet50_Weights.IMAGENET1K_V2)]
    sizes = [resolved("torchvision:resnet50", "folder", "MODEL.STUDENT.WEIGHTS", w).INPUT.RESIZE for w in weights]
    assert sizes == [256, 232]


def test_a_setting_goes_before_all(caplog):
    cfg = resolved(
        "timm:vit_tiny_patch16_224", "folder", "MODEL.STUDENT.PIXEL_MEAN", [1, 2, 3], "INPUT.SIZE", 96,
        "INPUT.RESIZE", 100, "INPUT.INTERPOLATION", "bilinear",
    )  # fmt: skip
    assert cfg.MODEL.STUDENT.PIXEL_MEAN == [1, 2, 3] and cfg.MODEL.STUDENT.PIXEL_STD == [127.5] * 3
    assert (cfg.INPUT.SIZE, cfg.INPUT.RESIZE, cfg.INPUT.INTERPOLATION) == (96, 100, "bilinear")
    # The crop scales with another size.
    assert resolved("timm:vit_tiny_patch16_224", "folder", "INPUT.SIZE", 112).INPUT.RESIZE == 124


def test_images_of_one_size_keep_it():
    cfg = resolved("timm:resnet18", "digits")
    assert cfg.INPUT.SIZE == 32 and cfg.MODEL.STUDENT.PIXEL_MEAN[0] == pytest.approx(0.485 * 255)


def test_a_teacher_of_a_library_sees_its_own_statistics(caplog):
    caplog.set_level("INFO")
    cfg = resolved("resnet8", "digits", "MODEL.TEACHER.NAME", "timm:vit_tiny_patch16_224", "DISTILL.METHODS", ["KD"])
    assert "MODEL.TEACHER.PIXEL_MEAN is [127.5, 127.5, 127.5], after timm:vit_tiny_patch16_224" in caplog.text
    model = build_distiller(cfg)
    image = torch.full((1, 3, 32, 32), 255, dtype=torch.uint8)
    assert torch.equal(model.teacher_norms[0](image), torch.ones(1, 3, 32, 32))
    digits = build_dataset("digits", split="val").info
    assert model.student_norm.mean.flatten().tolist() == pytest.approx(list(digits.pixel_mean))


def test_test_images_are_resized_as_asked():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8))
    wide = image.resize((48, 32), Image.BICUBIC).crop((12, 4, 36, 28))
    assert np.array_equal(eval_transform(image, CenterFit(24, 32, "bicubic")).permute(1, 2, 0), np.asarray(wide))
    assert torch.equal(eval_transform(image, CenterFit(28)), eval_transform(image, 28))


def test_a_deviation_of_the_other_scale_is_refused():
    with pytest.raises(ConfigError, match=r"PIXEL_STD \[0.229, 0.224, 0.225\] is of images in 0..1"):
        resolved("resnet8", "digits", "MODEL.STUDENT.PIXEL_STD", [0.229, 0.224, 0.225])

import pytest

from detection.config import get_cfg
from detection.data.digits_coco import prepare


@pytest.fixture(scope="session")
def digits_coco(tmp_path_factory):
    """Folder of data sets that has digits_coco; DETECTRON2_DATASETS names it to the end of the session."""
    root = tmp_path_factory.mktemp("datasets")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DETECTRON2_DATASETS", str(root))
        prepare("digits_coco")
        yield root


@pytest.fixture
def digits_cfg(digits_coco):
    """Detection settings on digits_coco, with small images and no workers."""
    cfg = get_cfg()
    cfg.DATASETS.TRAIN = ("digits_coco_train",)
    cfg.DATASETS.TEST = ("digits_coco_val",)
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 10
    cfg.INPUT.MIN_SIZE_TRAIN = (96, 112, 128)
    cfg.INPUT.MIN_SIZE_TEST = 128
    cfg.SOLVER.IMS_PER_BATCH = 4
    cfg.DATALOADER.NUM_WORKERS = 0
    return cfg

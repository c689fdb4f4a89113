import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog

from d2distill.detection.config import get_cfg
from d2distill.detection.data.digits_coco import SETS, ensure_generated
from tests.detection.tiny_training import make_tiny


@pytest.fixture(scope="session")
def datasets_root(tmp_path_factory):
    """Folder of data sets that DETECTRON2_DATASETS names to the end of the session."""
    root = tmp_path_factory.mktemp("datasets")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DETECTRON2_DATASETS", str(root))
        with pytest.MonkeyPatch.context() as small:
            # Before any test can ask for all of it.
            small.setitem(SETS, "digits_coco", {"train": 60, "val": 40})
            ensure_generated("digits_coco")
        yield root


@pytest.fixture(scope="session")
def digits_coco(datasets_root):
    """That folder, with the first images of digits_coco in it."""
    return datasets_root


@pytest.fixture(scope="session")
def tiny(datasets_root):
    """That folder, with what tests.detection.tiny_training trains on."""
    make_tiny(datasets_root)
    return datasets_root


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


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A folder of data sets; what is registered during the test is forgotten after it."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    before = set(DatasetCatalog)
    yield tmp_path
    for name in set(DatasetCatalog) - before:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)

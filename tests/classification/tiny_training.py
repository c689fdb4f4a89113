"""Small runs of the classification trainer for the tests, and what must be equal between two of them."""

from d2distill.classification.config import get_cfg, validate
from d2distill.classification.trainer import build_trainer, load_datasets, train
from d2distill.common.config import CfgNode
from tests.interruptions import disturb, read_state

# 3 steps an epoch (16 + 16 + 8 samples), 3 epochs.
STEPS, EPOCH = 9, 3


def small_cfg(folder, workers=0, **settings) -> CfgNode:
    """A run with a teacher on 40 digits: 9 steps, a checkpoint each epoch and after step 5.

    With `workers` they load the images, otherwise all are kept in one tensor.
    """
    cfg = get_cfg()
    opts = {
        "OUTPUT_DIR": str(folder),
        "SEED": 3,
        "LOG_PERIOD": 2,
        "MODEL.DEVICE": "cpu",
        "MODEL.STUDENT.NAME": "resnet8",
        "MODEL.TEACHER.NAME": "wrn_16_1",
        "DISTILL.METHODS": ["KD", "DKD"],
        "DISTILL.DKD.WARMUP": 2,
        "DATASETS.NAME": "digits",
        "DATASETS.TRAIN_SIZE": 40,
        "INPUT.SIZE": 16,
        "SOLVER.EPOCHS": 3,
        "SOLVER.IMS_PER_BATCH": 16,
        "SOLVER.STEPS": [2],
        "SOLVER.CHECKPOINT_STEPS": 5,
        "REPORT.ENABLED": False,
        "DATALOADER.NUM_WORKERS": workers,
        "DATALOADER.RESIDENT_GB": 0.0 if workers else 2.0,
        **{key.replace("__", "."): value for key, value in settings.items()},
    }
    cfg.merge_from_list([item for pair in opts.items() for item in pair])
    validate(cfg)
    return cfg


def run(cfg: CfgNode, resume: bool = False) -> dict[str, float]:
    return train(cfg, resume)


def state(folder) -> tuple[dict, dict, list]:
    """The final student, the last checkpoint without times, and the log without times."""
    return read_state(folder, STEPS)


def run_disturbed(cfg: CfgNode, moment: str, step: int) -> None:
    """A run that :func:`tests.interruptions.disturb` ends."""
    trainer = build_trainer(cfg, *load_datasets(cfg))
    disturb(trainer, moment, step)
    trainer.run()

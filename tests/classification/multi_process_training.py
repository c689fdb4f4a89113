"""Trainings for the tests of many processes: the cases run one after another, each in FOLDER/CASE."""

import os
import signal
from pathlib import Path

import torch
from detectron2.engine import HookBase
from detectron2.utils import comm

from d2distill.classification.data.loader import FixedSubset, build_test_loader
from d2distill.classification.trainer import build_trainer, load_datasets
from d2distill.common.engine.run_folder import start_logs
from d2distill.common.engine.seeding import seed_step
from d2distill.common.errors import DataError
from tests.classification.tiny_training import small_cfg
from tests.interruptions import disturb, fail_in_evaluation, terminate_in_evaluation

# An epoch of 41 samples ends with a batch that 2 processes get 5 and 4 of, one of 33 with a single sample.
SYNCED = {"MODEL.SYNC_BN": True, "SOLVER.BASE_LR": 0.002, "SOLVER.EPOCHS": 2, "LOG_PERIOD": 1, "DISTILL.DKD.WARMUP": 0}
BALANCED = {"SOLVER.CLASS_WEIGHTS": "balanced", "DATALOADER.SAMPLER": "balanced"}
CASES = {
    "plain": {**SYNCED, "DISTILL.METHODS": [], "DATASETS.TRAIN_SIZE": 33},
    "nine": {**SYNCED, "DISTILL.METHODS": ["KD", "DKD", "AT"], "DATASETS.TRAIN_SIZE": 41},
    "one": {**SYNCED, **BALANCED, "DISTILL.METHODS": ["KD", "DKD", "AT"], "DATASETS.TRAIN_SIZE": 33},
    "dot": {**SYNCED, "SOLVER.OPTIMIZER": "DOT", "DATASETS.TRAIN_SIZE": 33},
    # Of 2 samples in 3 processes: a third that is there twice would show.
    "two": {**SYNCED, "SOLVER.IMS_PER_BATCH": 12, "DATASETS.TRAIN_SIZE": 26},
    # Methods with weights and memories of their own; batch norms of each process.
    "connectors": {"SOLVER.OPTIMIZER": "DOT", "DISTILL.METHODS": ["FitNet"], "DATASETS.TRAIN_SIZE": 33},
    "banks": {"DISTILL.METHODS": ["CRD"], "DISTILL.CRD.K": 64, "DATASETS.TRAIN_SIZE": 33},
    "unbroken": {},
    "stopped": {},
    "stopped in evaluation": {},
    "broken evaluation": {},
    "parent stopped": {},
    "rank 0 killed": {},
    "rank 1 killed": {},
}
#: By rank when it is killed: in the middle of a checkpoint, and of an epoch.
KILLS = {0: ("while saving", 6), 1: ("before saving", 5)}


class StopHook(HookBase):
    """SIGTERM from the last process to the process `pid` in `step`."""

    def __init__(self, pid: int, step: int) -> None:
        self.pid, self.step = pid, step

    def before_step(self) -> None:
        if self.trainer.iter + 1 == self.step and comm.get_rank() == comm.get_world_size() - 1:
            os.kill(self.pid, signal.SIGTERM)


def train_case(folder: Path, name: str) -> None:
    """Train a case and leave ``rank<r>.pth`` beside its run folder's files."""
    settings = {"LOG_PERIOD": 4, "SOLVER.CHECKPOINT_STEPS": 0, **CASES[name]}
    cfg = small_cfg(folder / name, **settings)
    train_set, test_set = load_datasets(cfg)
    if CASES[name]:
        test_set = FixedSubset(test_set, 99)
    start_logs(cfg.OUTPUT_DIR)
    # Sums over processes round otherwise, and rounding grows from step to step: in double precision it stays small.
    exact = cfg.MODEL.SYNC_BN
    torch.set_default_dtype(torch.float64 if exact else torch.float32)
    trainer = build_trainer(cfg, train_set, test_set)
    model = trainer.task.model
    for norm in (model.student_norm, *model.teacher_norms) if exact else ():
        norm.register_forward_hook(lambda module, inputs, images: images.double())
    facts = {"initial": {key: value.clone() for key, value in model.state_dict().items()}}
    facts["teacher"] = {} if model.teacher is None else model.teacher.state_dict()
    facts["accuracy"] = trainer.evaluate()
    loader = build_test_loader(test_set, 99, 32, 0)
    facts["tested"] = torch.cat([batch["index"] for batch in loader])
    if name == "stopped":
        # In the middle of an epoch, and between two log lines.
        trainer.register_hooks([StopHook(os.getpid(), 5)])
    if name == "stopped in evaluation" and comm.get_rank():
        terminate_in_evaluation(trainer, 6)
    if name == "broken evaluation" and comm.get_rank():
        fail_in_evaluation(trainer, 6, DataError("cannot read image 7.jpg"))
    if name == f"rank {comm.get_rank()} killed":
        disturb(trainer, *KILLS[comm.get_rank()])
    if name == "parent stopped":
        # Not in the first step, which the other process may not have reached: it would end unprepared.
        trainer.register_hooks([StopHook(os.getppid(), 2)])
    trainer.run()
    facts["final"] = model.state_dict()
    seed_step(cfg.SEED, 1)
    facts["drawn"] = torch.rand(4)
    torch.save(facts, folder / name / f"rank{comm.get_rank()}.pth")


def main(folder: str, names: list[str]) -> None:
    for name in names:
        (Path(folder) / name).mkdir(parents=True, exist_ok=True)
        train_case(Path(folder), name)
        comm.synchronize()

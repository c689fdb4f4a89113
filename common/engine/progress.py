"""The progress line of a training on a terminal."""

import logging
import sys
from contextlib import ExitStack

from detectron2.engine import HookBase
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from d2distill.common.engine.writers import STEP_LINES


class ProgressLine(HookBase):
    """tqdm's line on stderr, in the place of the lines with losses, which then are in log.txt alone.

    It has the epoch, the time left, images per second, and the losses of the last log line. Other log lines are
    printed above it. It is the last hook: what it shows was put by those before it.
    """

    def __init__(self, epoch_length: int = 0) -> None:
        self._epoch_length, self._stack = epoch_length, ExitStack()

    def before_train(self) -> None:
        for name in ("detectron2", "fvcore"):
            for handler in logging.getLogger(name).handlers:
                stream = getattr(handler, "stream", None)
                if stream in (sys.stdout, sys.stderr) and stream.isatty():  # not where it is sent into a file
                    handler.addFilter(_no_step_line)
                    self._stack.callback(handler.removeFilter, _no_step_line)
        self._stack.enter_context(logging_redirect_tqdm([logging.getLogger(n) for n in ("detectron2", "fvcore")]))
        # Inside of it, so that the bar is closed before the lines of the end are printed.
        self._bar = self._stack.enter_context(
            tqdm(
                initial=self.trainer.start_iter,
                total=self.trainer.max_iter,
                file=sys.stderr,
                unit="step",
                dynamic_ncols=True,
            )
        )

    def after_step(self) -> None:
        done, scalars = self.trainer.iter + 1, self.trainer.storage.latest()
        if self._epoch_length:
            epochs = -(-self.trainer.max_iter // self._epoch_length)
            self._bar.set_description(f"epoch {-(-done // self._epoch_length)}/{epochs}", refresh=False)
        shown = {n: f"{value:.4g}" for n, (value, _) in scalars.items() if "loss" in n and "test_loss" not in n}
        if "images_per_second" in scalars:
            shown = {"images/s": f"{scalars['images_per_second'][0]:.0f}", **shown}
        self._bar.set_postfix(shown, refresh=False)
        self._bar.update(done - self._bar.n)

    def after_train(self) -> None:
        self._stack.close()


def _no_step_line(record: logging.LogRecord) -> bool:
    return record.name != STEP_LINES

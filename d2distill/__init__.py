"""Knowledge distillation for image classifiers and Detectron2 detectors.

from d2distill.common.distillers import kd_loss, dkd_loss          # loss functions: need torch and fvcore only
from d2distill.classification.models import build_model
from d2distill.detection.config import add_distill_config          # needs Detectron2

student = d2distill.load("output/my_run")                           # .classes, .preprocess
"""

from importlib import import_module
from pathlib import Path

__version__ = "0.3.0"

# In a checkout the subpackages stand beside this folder, as Detectron2's projects do; an installation has them in it.
_checkout = Path(__file__).resolve().parent.parent
if not Path(__file__).with_name("common").exists() and (_checkout / "common" / "distillers").is_dir():
    __path__.append(str(_checkout))


def __getattr__(name: str):
    # Subpackages are imported when they are used: torch takes seconds, and the losses do not need Detectron2.
    if name in ("common", "classification", "detection", "commands", "deployed"):
        return import_module(f"{__name__}.{name}")
    if name == "load":
        return import_module(f"{__name__}.deployed").load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""Knowledge distillation for image classifiers and Detectron2 detectors."""

from pathlib import Path

__version__ = "0.3.0"

# In a checkout the subpackages stand beside this folder, as Detectron2's projects do; an installation has them in it.
_checkout = Path(__file__).resolve().parent.parent
if not Path(__file__).with_name("common").exists() and (_checkout / "common" / "distillers").is_dir():
    __path__.append(str(_checkout))

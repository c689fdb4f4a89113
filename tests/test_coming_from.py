"""docs/coming_from.md: what it says of this library is there."""

import re
from pathlib import Path

from d2distill.classification.config import get_cfg
from d2distill.common.engine.settings import flat_settings
from d2distill.detection.config import get_cfg as get_det_cfg

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "docs" / "coming_from.md").read_text()


def test_our_settings_commands_and_configurations_exist():
    cfg = {**flat_settings(get_det_cfg()), **flat_settings(get_cfg())}
    nodes = {key.rpartition(".")[0] for key in cfg}
    ours = [line.split(" | ", 1)[1] for line in TEXT.splitlines() if re.match(r"\| [`a-z].* \| ", line)]
    ours += re.findall(r"^d2distill-.*$", TEXT, re.MULTILINE)
    first = "MODEL|DISTILL|SOLVER|DATASETS|DATALOADER|INPUT|TEST|TEACHER"
    found = re.findall(rf"\b(?:{first})(?:\.[A-Z0-9_]+)+", "\n".join(ours))
    assert len(found) > 60 and not [key for key in found if key not in cfg and key not in nodes]
    scripts = re.findall(r'"(d2distill-[\w-]+) =', (ROOT / "setup.py").read_text())
    assert set(re.findall(r"`?(d2distill-[a-z-]+)", TEXT)) <= set(scripts)
    for name in re.findall(r"\b((?:cls|det)/[\w]+\.yaml)", TEXT):
        assert (ROOT / "configs" / name).is_file(), name

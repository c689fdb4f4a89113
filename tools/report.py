#!/usr/bin/env python3
"""Write report.html of a run that has ended: results, curves, classes, settings and cost on one page.

python tools/report.py output/digits_vgg8_r8_dkd --baseline output/digits_r8

A training writes it at its end (REPORT.ENABLED); this writes it anew, e.g. beside a baseline that ended later.
"""

from pathlib import Path

from d2distill.common.engine.cli import CommandParser, run_cli
from d2distill.common.errors import ConfigError, require_detectron2


def main() -> None:
    run_cli(_report)


def _report() -> None:
    parser = CommandParser(description="Write report.html of a run that has ended into its folder.")
    parser.add_argument("run", help="a run folder (OUTPUT_DIR)")
    parser.add_argument("--baseline", default="", metavar="RUN", help="a run without a teacher to compare with")
    args = parser.parse_args()
    for folder in filter(None, (args.run, args.baseline)):
        if not Path(folder, "results.json").is_file():
            raise ConfigError(f"{folder} has no results.json: name the folder of a run that has ended")
    require_detectron2()
    from importlib import import_module

    import yaml

    from d2distill.common.engine.report import write_report
    from d2distill.common.engine.settings import flat_settings

    settings = yaml.safe_load(Path(args.run, "config.yaml").read_text())
    task = "detection" if "META_ARCHITECTURE" in settings["MODEL"] else "classification"
    defaults = flat_settings(import_module(f"d2distill.{task}.config").get_cfg())
    baseline = args.baseline or settings.get("REPORT", {}).get("BASELINE", "")
    print(write_report(args.run, defaults, baseline))


if __name__ == "__main__":
    main()

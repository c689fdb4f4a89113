#!/usr/bin/env python3
"""Open every image of a data set before a training does, and say what is there and what is wrong.

python tools/check_data.py --folder PATH/TO/IMAGES              # train/<class>/, val/<class>/, or <class>/
python tools/check_data.py --config-file FILE [KEY VALUE ...]   # the data set of a configuration

The exit code is 1 if an image cannot be read.
"""

import os
from statistics import median

from d2distill.common.engine.cli import CommandParser, run_cli
from d2distill.common.errors import ConfigError, require_detectron2
from d2distill.common.text import printable
from d2distill.configs import find_config


def main() -> None:
    """``d2distill-check-data``."""
    run_cli(_main)


def _main() -> None:
    parser = CommandParser(description=__doc__)
    parser.add_argument("--config-file", default="", metavar="FILE", help="a YAML file, or one of d2distill's configs")
    parser.add_argument("--folder", default="", help="images in ROOT/{train,val}/<class>/ or in ROOT/<class>/")
    workers = len(os.sched_getaffinity(0))
    parser.add_argument("--num-workers", type=int, default=workers, help="processes (default: one per core)")
    parser.add_settings()
    args = parser.parse_args()
    if bool(args.config_file) == bool(args.folder):
        raise ConfigError("name either --config-file or --folder")
    require_detectron2()
    from d2distill.classification.config import load_cfg

    # A student is not needed here, but a configuration without one is refused.
    settings = ["MODEL.STUDENT.NAME", "resnet8", "DATASETS.NAME", "folder", "DATASETS.ROOT", args.folder]
    cfg = load_cfg(find_config(args.config_file), [*(settings if args.folder else []), *args.opts])
    from d2distill.classification.data import build_dataset
    from d2distill.classification.data.check import check_files
    from d2distill.classification.data.describe import describe_dataset
    from d2distill.classification.data.splits import load_splits, read_options

    data = cfg.DATASETS
    undivided = not any(os.path.isdir(os.path.join(data.ROOT, name)) for name in ("train", "val"))
    if data.NAME == "folder" and undivided and not data.VAL_FRACTION:
        splits = {"training": build_dataset(data.NAME, data.ROOT, "train")}
    else:
        splits = dict(zip(("training", "test"), load_splits(cfg), strict=True))
    print(*map(printable, describe_dataset(splits)), sep="\n")
    paths = [[dataset.path(index) for index in range(len(dataset))] for dataset in splits.values()]
    if None in paths[0]:
        print(f"{cfg.DATASETS.NAME} keeps its images together, in files that have been read")
        return
    found = check_files(paths, read_options(cfg), args.num_workers)
    for name, values in zip(("width", "height"), zip(*found.sizes, strict=True), strict=False):
        print(f"{name}: {min(values)} to {max(values)} pixels, median {median(values):g}")
    print(f"modes: {', '.join(f'{mode} {count}' for mode, count in found.modes.most_common())}")
    if found.turned:
        use = "turns them" if cfg.INPUT.EXIF_ORIENTATION else "leaves them as they are stored"
        print(f"{found.turned} have an EXIF orientation; INPUT.EXIF_ORIENTATION {cfg.INPUT.EXIF_ORIENTATION} {use}")
    print(f"{len(found.duplicates)} test images are also training images")
    for first, second in found.duplicates:
        print(printable(f"  {second} = {first}"))
    print(f"{len(found.errors)} images cannot be read")
    for error in found.errors:
        print(printable(f"  {error}"))
    if found.errors:
        raise SystemExit(1)


if __name__ == "__main__":
    main()

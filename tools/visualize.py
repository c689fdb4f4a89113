#!/usr/bin/env python3
"""Draw figures of runs.

python tools/visualize.py curves output/r8_seed0 output/r8_seed1 output/r8_dkd
python tools/visualize.py tsne output/r8_seed0 output/r8_dkd
python tools/visualize.py correlation output/r8_seed0 output/r8_dkd DATASETS.ROOT /data
python tools/visualize.py attention output/r8_dkd --images photos/*.jpg
python tools/visualize.py detections output/r50_dkd --threshold 0.5

curves       test metric, losses and learning rate; runs that differ in SEED alone are one line with a band
tsne         features before the classifier, the same test images for teacher and students
correlation  difference of the teacher's and the students' correlations of the classes' logits
confusion    which class is taken for which
attention    where teacher and students look on pictures
detections   ground truth, teacher and students on pictures

RUN is a run folder, or a student_*.pth of it. Its config.yaml names the teacher and the test images; KEY VALUE says
where they are now. Writes OUTPUT/KIND.png and OUTPUT/KIND.svg.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from d2distill.common.engine.cli import CommandParser, run_cli
from d2distill.common.errors import ConfigError, require_detectron2

#: The options of each kind, by the names of its function's arguments.
_OPTIONS = {
    "curves": (),
    "tsne": ("samples", "classes", "seed"),
    "correlation": ("samples", "of_means"),
    "confusion": (),
    "attention": ("pictures", "samples", "stage"),
    "detections": ("pictures", "samples", "threshold"),
}
_FLAGS = {"of_means": "--mean-logits", "pictures": "--images"}


def main() -> None:
    """``d2distill-visualize``."""
    run_cli(_main)


def _main() -> None:
    parser = CommandParser(description=__doc__)
    parser.add_argument("kind", metavar="KIND", choices=list(_OPTIONS), help=", ".join(_OPTIONS))
    parser.add_argument(
        "runs", metavar="RUN", nargs="+", help="run folders or student_*.pth files, then KEY VALUE pairs"
    )
    parser.add_argument("--teacher", metavar="RUN", help="in the place of the teacher that the runs name")
    parser.add_argument("--output", default="visualizations", metavar="DIR", help="(default: %(default)s)")
    parser.add_argument(
        "--format", nargs="+", default=["png", "svg"], choices=("png", "svg", "pdf"), help="(default: png svg)"
    )
    parser.add_argument("--device", default="auto", help="cpu, cuda or auto, the GPU if there is one")
    parser.add_argument(
        "--samples", type=int, metavar="N", help="test images (default: tsne 1000, pictures 4, else all)"
    )
    parser.add_argument("--images", dest="pictures", nargs="+", metavar="FILE", help="pictures in their place")
    parser.add_argument("--classes", nargs="+", metavar="NAME", help="tsne: of these classes only")
    parser.add_argument("--seed", type=int, help="tsne: of the embedding (default: 0)")
    of_means = "correlation: of each class's mean logits, as MDistiller's notebook"
    parser.add_argument("--mean-logits", dest="of_means", action="store_true", default=None, help=of_means)
    parser.add_argument("--stage", type=int, help="attention: which feature map (default: -1, the deepest)")
    parser.add_argument("--threshold", type=float, help="detections: lowest score of a box (default: 0.3)")
    # Flags may follow the runs and settings.
    parser.intermixed = True
    args = parser.parse_args()
    runs, opts = _split(args.runs)
    options = {
        name: value for name in dict.fromkeys(sum(_OPTIONS.values(), ())) if (value := getattr(args, name)) is not None
    }
    for name in options.keys() - set(_OPTIONS[args.kind]):
        raise ConfigError(f"{_FLAGS.get(name, f'--{name}')} is not for {args.kind}")
    if options.get("samples", 1) < 1:
        raise ConfigError(f"--samples {args.samples}: at least 1")
    require_detectron2()
    from d2distill.common.config import CfgNode, resolve_device
    from d2distill.tools import visualizations

    if args.kind == "curves":
        if opts or args.teacher:
            raise ConfigError(f"{opts[0] if opts else '--teacher'} is not for curves: they are of what the runs logged")
    else:
        device = resolve_device(CfgNode({"MODEL": {"DEVICE": args.device}}))
        options |= {"teacher": args.teacher, "opts": opts, "device": str(device)}
    figure = getattr(visualizations, f"{args.kind}_figure")(runs, **options)
    for file in visualizations.save_figure(figure, Path(args.output, args.kind), args.format):
        print(file)


def _split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Run folders, and the KEY VALUE pairs after them."""
    is_key = (re.fullmatch(r"[A-Z][A-Z0-9_]*(\.\w+)+", a) and not Path(a).exists() for a in arguments)
    first = next((number for number, found in enumerate(is_key) if found), len(arguments))
    runs, opts = [*arguments[:first]], [*arguments[first:]]
    if not runs:
        raise ConfigError(f"no run folder before {opts[0]}")
    if len(opts) % 2:
        raise ConfigError(f"{opts[-1]}: settings come in pairs, KEY VALUE")
    return runs, opts


if __name__ == "__main__":
    main()

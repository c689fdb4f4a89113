#!/usr/bin/env python3
"""Fill the files of MODEL.TEACHER.CACHE before the trainings that use them, or beside them.

python tools/cache_teacher.py --config-file FILE MODEL.TEACHER.CACHE DIR [KEY VALUE ...]

FILE and settings are those of the training: they say the teacher, the images and what the methods need. Every image is
computed in all variants of its augmentation, or with INPUT.REPLAY_EPOCHS K in those of K epochs. What is there already
is left out, so that the command can be stopped and given again, and can run beside trainings. The size of the files is
printed first; they take room as they are filled.
"""

from d2distill.common.engine.cli import CommandParser, run_cli
from d2distill.common.errors import ConfigError, require_detectron2
from d2distill.configs import find_config


def main() -> None:
    """``d2distill-cache-teacher``."""
    run_cli(_main)


def _main() -> None:
    parser = CommandParser(description=__doc__)
    parser.add_argument("--config-file", default="", metavar="FILE", help="a YAML file, or one of d2distill's configs")
    parser.add_settings()
    args = parser.parse_args()
    require_detectron2()
    from tqdm import tqdm

    from d2distill.classification.config import load_cfg
    from d2distill.classification.inputs import resolve_inputs
    from d2distill.classification.modeling import build_distiller
    from d2distill.classification.speed import prepare_networks
    from d2distill.classification.teacher_cache import cache_teachers, cached_sources, fill_cache
    from d2distill.classification.trainer import load_datasets
    from d2distill.common.config import import_extensions
    from d2distill.common.engine.run_folder import start_logs

    cfg = load_cfg(find_config(args.config_file), args.opts)
    if not cfg.MODEL.TEACHER.CACHE:
        raise ConfigError("MODEL.TEACHER.CACHE is empty: name the folder that the files are to be in")
    import_extensions(cfg.IMPORTS)
    start_logs(None)
    train_set, _ = load_datasets(cfg)
    cfg = resolve_inputs(cfg)
    if cfg.SOLVER.CLASS_WEIGHTS == "balanced":  # of the student's loss
        cfg.SOLVER.CLASS_WEIGHTS = []
    labels = None if train_set.info.multi_label else train_set.labels
    model = build_distiller(cfg, num_samples=len(train_set), labels=labels)
    steps = cfg.SOLVER.EPOCHS * -(-len(train_set) // cfg.SOLVER.IMS_PER_BATCH)
    cache_teachers(cfg, model, train_set, steps)
    prepare_networks(model, cfg, steps)
    sources = cached_sources(model.teacher_source)
    if not sources:
        raise ConfigError("DISTILL.METHODS, MODEL.TEACHER.NAME: there is nothing to keep")
    rows = max(source.samples for source in sources) * sources[0].memory.variants
    with tqdm(total=rows, unit="image", dynamic_ncols=True) as bar:
        fill_cache(cfg, model, train_set, bar.update)


if __name__ == "__main__":
    main()

"""The trainers' command lines: the same flags and the same behavior for both tasks."""

from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from typing import Any
from urllib.parse import urlsplit

from d2distill.common.engine.cli import CommandParser, user_errors
from d2distill.common.errors import CheckpointError, ConfigError, require_detectron2
from d2distill.configs import find_config

_EXAMPLES = """
  %(prog)s --config-file {example}
  %(prog)s --config-file FILE --resume                     # continue the run in OUTPUT_DIR
  %(prog)s --config-file FILE --eval-only                  # evaluate the best student of OUTPUT_DIR
  %(prog)s --config-file FILE --eval-only {key} CHECKPOINT
  %(prog)s --config-file FILE SOLVER.BASE_LR 0.01          # any setting, as KEY VALUE
  torchrun --nproc-per-node 8 PATH/TO/%(prog)s --config-file FILE

User errors print one line and exit with code 2. Under torchrun the rank that has the error prints it; torchrun then
adds a report of its own and exits with 1. A run that is stopped by SIGTERM saves, and exits with 143.
"""


def train_cls() -> None:
    """``d2distill-train-cls`` and ``tools/train_cls.py``."""
    _main("classification", "classifier", "MODEL.STUDENT.WEIGHTS", "cls/cifar100_r32x4_r8x4_dkd.yaml")


def train_det() -> None:
    """``d2distill-train-det`` and ``detection/train_net.py``."""
    _main("detection", "detector", "MODEL.WEIGHTS", "det/dkd_r101_r18.yaml --num-gpus 8")


def _main(task: str, network: str, weights_key: str, example: str) -> None:
    with user_errors():
        args = _parser(network, weights_key, example).parse_args()
        _check_machines(args)
        require_detectron2()
        config = import_module(f"d2distill.{task}.config")
        settings = find_config(args.config_file), (["MODEL.DEVICE", "cpu"] if args.num_gpus == 0 else []) + args.opts
        config.check_keys(*settings)  # before the seconds that the imports below take
        from d2distill.common.engine.launch import join_job, launch, processes_to_start

        with join_job():
            trainer, cfg = import_module(f"d2distill.{task}.trainer"), config.load_cfg(*settings)
            main, arguments = trainer.train, (cfg, args.resume)
            if args.eval_only:
                from d2distill.deployed import student_file

                # Of a run its own student, whatever weights its training began with.
                weights = dict(zip(args.opts[::2], args.opts[1::2], strict=True)).get(weights_key)
                try:
                    weights = weights or str(student_file(cfg.OUTPUT_DIR))
                except CheckpointError as error:
                    raise CheckpointError(f"--eval-only without {weights_key}: OUTPUT_DIR {error}") from error
                cfg.merge_from_list([weights_key, weights])
                main, arguments = _evaluate, (trainer.evaluate, cfg, weights)
            if processes := processes_to_start(args.num_gpus, args.num_machines):
                launch(main, arguments, processes, args.num_machines, args.machine_rank, args.dist_url)
            else:
                main(*arguments)


def _parser(network: str, weights_key: str, example: str) -> CommandParser:
    parser = CommandParser(
        description=f"Train a {network}, alone or with a teacher.",
        epilog="examples:" + _EXAMPLES.format(example=example, key=weights_key),
    )
    parser.add_argument("--config-file", default="", metavar="FILE", help="a YAML file, or one of d2distill's configs")
    parser.add_argument("--resume", action="store_true", help="continue from the latest checkpoint of OUTPUT_DIR")
    parser.add_argument("--eval-only", action="store_true", help=f"evaluate {weights_key}, or OUTPUT_DIR's student")
    parser.add_argument("--num-gpus", type=int, default=1, metavar="N", help="per machine; 0: the CPU (default: 1)")
    parser.add_argument("--num-machines", type=int, default=1, metavar="N", help="of --num-gpus each (default: 1)")
    parser.add_argument("--machine-rank", type=int, default=0, metavar="I", help="of this machine (default: 0)")
    parser.add_argument("--dist-url", default="auto", metavar="URL", help="tcp://HOST:PORT of machine 0, if several")
    parser.add_settings()
    return parser


def _check_machines(args: Any) -> None:
    if args.num_gpus < 0 or args.num_machines < 1:
        raise ConfigError(
            f"--num-gpus {args.num_gpus} --num-machines {args.num_machines}: there is at least one machine; of GPUs 0 "
            "is the CPU"
        )
    if not 0 <= args.machine_rank < args.num_machines:
        raise ConfigError(
            f"--machine-rank {args.machine_rank}: machines are counted from 0 to --num-machines {args.num_machines} - 1"
        )
    with suppress(ValueError):  # of a port that is no number
        url = urlsplit(args.dist_url)
        if (url.scheme == "tcp" and url.hostname and url.port) or url.scheme in ("file", "env"):
            return
    if args.dist_url != "auto" or args.num_machines > 1:
        raise ConfigError(
            f"--dist-url {args.dist_url}: must be tcp://HOST:PORT of machine 0; with one machine auto does as well"
        )


def _evaluate(evaluate: Callable[[Any], dict[str, float]], cfg: Any, weights: str) -> None:
    results = evaluate(cfg)
    if results:  # empty on other ranks
        print(f"{weights}: {', '.join(f'{name} {value:.2f}' for name, value in results.items())}")

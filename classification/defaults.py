"""Settings of the classification trainer: all of them, with their defaults."""

from d2distill.common.config import CfgNode, add_distill_defaults

__all__ = ["get_cfg", "own_cfg"]


class _CfgNode(CfgNode):
    #: Keys that take one value, or a list of one per teacher, or per class.
    LISTABLE = ("MODEL.TEACHER.NAME", "MODEL.TEACHER.WEIGHTS", "DATASETS.CLASSES", "SOLVER.CLASS_WEIGHTS")


def get_cfg() -> CfgNode:
    """All settings with their defaults, DISTILL included."""
    cfg = own_cfg()
    add_distill_defaults(cfg)
    return cfg


def own_cfg() -> CfgNode:
    """All settings but DISTILL."""
    cfg = _CfgNode()
    # The run folder: config, logs, checkpoints. Empty: output/<name of the config file>.
    cfg.OUTPUT_DIR = ""
    # Everything random in a run is a function of it: weights, order, augmentation, dropout.
    cfg.SEED = 0
    # Modules, or files beside the YAML that names them, to import first: own methods, models, data sets.
    cfg.IMPORTS = []
    # Let cuDNN try its algorithms; faster, but two runs may then differ in the last bits.
    cfg.CUDNN_BENCHMARK = False
    # Log every so many steps, and at each epoch's end.
    cfg.LOG_PERIOD = 20
    # Logs beside log.txt and metrics.json: tensorboard, csv (metrics.csv), wandb, mlflow. The last two are set up by
    # their environment variables (WANDB_PROJECT, MLFLOW_TRACKING_URI); a failure of theirs does not end the run.
    cfg.LOGGERS = ["tensorboard"]

    cfg.MODEL = _CfgNode()
    # 0: what the data set says.
    cfg.MODEL.NUM_CLASSES = 0
    # auto: the GPU if there is one.
    cfg.MODEL.DEVICE = "auto"
    for side in ("STUDENT", "TEACHER"):
        node = cfg.MODEL[side] = _CfgNode()
        # A model of this package, timm:NAME or torchvision:NAME. The teacher's may be a list: several teachers.
        node.NAME = ""
        # Path, URL, torchvision:WEIGHTS_ENUM or timm:NAME. Empty: random weights. Weights may be of other classes than
        # the data's: the student's classifier then stays fresh; such a teacher has features for methods, but no logits.
        node.WEIGHTS = ""
        # Of a file that has weights and their average over the training (EMA): take the average.
        node.USE_EMA = True
        # RGB, in 0..255. Empty: those of the weights (a library's, or a student's of ours), else the data set's.
        node.PIXEL_MEAN = []
        node.PIXEL_STD = []
    # Of several teachers: how much each counts. Empty: all the same. PIXEL_MEAN and _STD then are for all, or a list.
    cfg.MODEL.TEACHER.SHARES = []
    # A folder in which the teacher's outputs are kept, for each image and augmentation, and looked up the next time, by
    # all runs with this teacher on these images. Empty: none. INPUT.REPLAY_EPOCHS says when there is nothing to keep.
    cfg.MODEL.TEACHER.CACHE = ""
    # How many GB a teacher's outputs may take there: with more, the first so many images are kept.
    cfg.MODEL.TEACHER.CACHE_GB = 8.0
    # Of the logits there: fp32, as the teacher gives them; fp16, rounded by at most 1 / 2048 of their value, also for
    # the student.
    cfg.MODEL.TEACHER.CACHE_DTYPE = "fp32"
    # Keep so many of an image's logits, and spread the rest of its softmax (at temperature 1) evenly over the other
    # classes, also for the student; for data with 1000 classes and more. 0: all.
    cfg.MODEL.TEACHER.CACHE_TOP_K = 0
    # Batch norms of the student take their statistics over all processes.
    cfg.MODEL.SYNC_BN = False

    cfg.DATASETS = _CfgNode()
    cfg.DATASETS.NAME = "cifar100"
    # Empty: the environment variable DETECTRON2_DATASETS, else ./datasets.
    cfg.DATASETS.ROOT = ""
    # Train on the first so many samples of a fixed shuffle. 0: all.
    cfg.DATASETS.TRAIN_SIZE = 0
    # Class names in the order of the labels: a list, or a file with a name a line, or JSON. Empty: sorted, or the data
    # set's own order.
    cfg.DATASETS.CLASSES = []
    # Evaluate on this share of each class's training images, and train on the rest. 0: on the data set's test images.
    cfg.DATASETS.VAL_FRACTION = 0.0
    # Of that draw. Not SEED: with another split the student is tested on images that its teacher was trained on.
    cfg.DATASETS.SPLIT_SEED = 0

    cfg.INPUT = _CfgNode()
    # Side of the square images the networks see. 0: the data set's; where its images are of any size, that of a student
    # that a library published.
    cfg.INPUT.SIZE = 0
    # Short side of test images in pixels before the center crop. 0: as the student was published, else SIZE / 0.875.
    cfg.INPUT.RESIZE = 0
    # Of that: bilinear or bicubic. Empty: as the student was published, else bilinear.
    cfg.INPUT.INTERPOLATION = ""
    # Turn images as their EXIF data says. torchvision's ImageFolder, and so most published results, do not.
    cfg.INPUT.EXIF_ORIENTATION = False
    # Which values of gray images of more than 8 bits become 0 and 255. Another range than that of 16 bits is for images
    # of 32 bits as well, which else are refused.
    cfg.INPUT.RANGE_16BIT = [0, 65535]
    # A recipe of classification/data/augment.py. Empty: the data set's.
    cfg.INPUT.AUGMENTATION = ""
    # Mixup (ICLR 2018) and cutmix (ICCV 2019): alpha of the Beta distribution; 0: off. Both: one of them in each step.
    cfg.INPUT.MIXUP = 0.0
    cfg.INPUT.CUTMIX = 0.0
    # Draw augmentations anew in the first so many epochs only, and repeat those in the later ones, so that as many
    # epochs of a teacher's outputs (MODEL.TEACHER.CACHE) serve the whole run: with recipes that never make an image
    # twice. It is another training, with less varied images. 0: off.
    cfg.INPUT.REPLAY_EPOCHS = 0

    cfg.SOLVER = _CfgNode()
    cfg.SOLVER.EPOCHS = 240
    # Of all processes together.
    cfg.SOLVER.IMS_PER_BATCH = 64
    # SGD, AdamW, or DOT, which gives the task's and the distillation's gradient a momentum each: 0.9 -+ DELTA.
    cfg.SOLVER.OPTIMIZER = "SGD"
    cfg.SOLVER.DELTA = 0.075
    cfg.SOLVER.BASE_LR = 0.05
    cfg.SOLVER.MOMENTUM = 0.9
    # SGD's alone.
    cfg.SOLVER.NESTEROV = False
    cfg.SOLVER.WEIGHT_DECAY = 5e-4
    # step: times GAMMA after each of STEPS (in epochs, or all below 1: shares of EPOCHS). cosine: to 0 at the end.
    cfg.SOLVER.LR_SCHEDULE = "step"
    cfg.SOLVER.STEPS = [150, 180, 210]
    cfg.SOLVER.GAMMA = 0.1
    # Linear, from a thousandth of BASE_LR, in epochs.
    cfg.SOLVER.WARMUP_EPOCHS = 0
    # Share of the target's probability that goes to all classes alike.
    cfg.SOLVER.LABEL_SMOOTHING = 0.0
    # Weight of each class in the cross-entropy, a list in their order, or balanced: samples / (classes * samples of the
    # class). The sum over a batch is divided by its size. Multi-label: of a class's positives; balanced: negatives /
    # positives. Empty: 1.
    cfg.SOLVER.CLASS_WEIGHTS = []
    # Run each batch in so many parts, to save memory: batch size, schedule and data order stay as they are.
    cfg.SOLVER.ACCUMULATE = 1
    # Decay of an exponential moving average of the student, evaluated and saved beside the live one. 0: none.
    cfg.SOLVER.EMA_DECAY = 0.0
    # Largest norm of the gradient. 0: no clipping.
    cfg.SOLVER.CLIP_GRAD_NORM = 0.0
    # Automatic mixed precision: "", "bf16" or "fp16" (with loss scaling). Losses are computed in fp32 all the same.
    cfg.SOLVER.AMP = ""
    # Which networks torch.compile compiles, in a minute or more: "" none, teacher, all (the student as well). auto: the
    # teacher in runs that are long enough for it to pay off. Where it fails, a network runs eagerly; the log says so.
    cfg.SOLVER.COMPILE = "auto"
    # Replay each step, from the images to the gradients, as a CUDA graph: small networks do not wait for their kernels
    # to be launched. A method of your own must not keep anything in Python from step to step.
    cfg.SOLVER.CUDA_GRAPH = False
    # contiguous or channels_last. auto: the latter on a GPU under AMP. (Without AMP a GPU computes fp32
    # convolutions in TF32, and matrix products in fp32: torch's default.)
    cfg.SOLVER.MEMORY_FORMAT = "auto"
    # Save every so many epochs, and, if not 0, every so many steps as well. The newest KEEP files stay.
    cfg.SOLVER.CHECKPOINT_PERIOD = 1
    cfg.SOLVER.CHECKPOINT_STEPS = 0
    cfg.SOLVER.CHECKPOINT_KEEP = 2

    cfg.DATALOADER = _CfgNode()
    # Per process. The result does not depend on it.
    cfg.DATALOADER.NUM_WORKERS = 4
    # A set whose images, as the networks are given them, take up to so many GB (1e9 bytes, in each process) is kept in
    # one tensor on the device, and augmented there a batch at a time; files are read once, in the first epoch. 0: all
    # images are loaded by workers. The result does not depend on it.
    cfg.DATALOADER.RESIDENT_GB = 2.0
    # shuffle: every image once an epoch. balanced: as many, with replacement, all classes alike.
    cfg.DATALOADER.SAMPLER = "shuffle"
    # An image that cannot be read. raise: ends the run. skip: is reported, and left out; in training the next one that
    # can be read takes its place.
    cfg.DATALOADER.ON_ERROR = "raise"

    cfg.TEST = _CfgNode()
    # Measure the teacher on the test images before the training.
    cfg.TEST.TEACHER = True
    # In epochs.
    cfg.TEST.EVAL_PERIOD = 1
    cfg.TEST.IMS_PER_BATCH = 256

    cfg.REPORT = _CfgNode()
    # Write report.html at the end of the run.
    cfg.REPORT.ENABLED = True
    # The run folder of a plain baseline, which the report compares with. Empty: none.
    cfg.REPORT.BASELINE = ""
    return cfg

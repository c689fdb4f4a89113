import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"$', (ROOT / "d2distill" / "__init__.py").read_text(), re.MULTILINE)[1]
# Folders at the top of the repository that are packages of d2distill, as Detectron2's setup.py maps its projects.
FOLDERS = ("common", "classification", "detection", "tools", "configs")

DOCS = ["mkdocs>=1.6,<2", "mkdocs-material>=9.6", "mkdocstrings[python]>=0.29"]

setup(
    name="d2distill",
    version=VERSION,
    description="Knowledge distillation for image classifiers and Detectron2 detectors",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    license_files=["LICENSE"],
    packages=["d2distill", *(f"d2distill.{name}" for name in find_packages(include=[f"{f}*" for f in FOLDERS]))],
    package_dir={f"d2distill.{folder}": folder for folder in FOLDERS},
    package_data={
        "d2distill.configs": ["*/*.yaml"],
        "d2distill.tools": ["*.yaml"],
        "d2distill.tools.visualizations": ["*.ipynb"],
    },
    entry_points={
        "console_scripts": [
            "d2distill-train-cls = d2distill.commands:train_cls",
            "d2distill-train-det = d2distill.commands:train_det",
            "d2distill-eval = d2distill.tools.eval_cls:main",
            "d2distill-predict = d2distill.tools.predict:main",
            "d2distill-export = d2distill.tools.export:main",
            "d2distill-cache-teacher = d2distill.tools.cache_teacher:main",
            "d2distill-check-data = d2distill.tools.check_data:main",
            "d2distill-report = d2distill.tools.report:main",
            "d2distill-sweep = d2distill.tools.sweep:main",
            "d2distill-list = d2distill.tools.list:main",
            "d2distill-benchmark = d2distill.tools.benchmark:main",
            "d2distill-convert-config = d2distill.tools.convert_config:main",
            "d2distill-visualize = d2distill.tools.visualize:main",
        ]
    },
    python_requires=">=3.10",
    install_requires=[
        "torch>=2.10",  # older ones have a known vulnerability in torch.load(weights_only=True)
        "torchvision>=0.25",
        "numpy>=1.26",
        "pillow>=10",
        "fvcore>=0.1.5.post20221221",
        "iopath>=0.1.9,<0.2",
        "yacs>=0.1.8",
        "pycocotools>=2.0.7",
        "tensorboard>=2.15",
        # Detectron2 itself has no release on the index: tools/setup_env.py installs it. It imports these.
        "setuptools<81",  # pkg_resources
        "omegaconf>=2.1,<2.4",
        "hydra-core>=1.1",
        "cloudpickle",
        "matplotlib>=3.7",
        "packaging",
        "safetensors>=0.4",
        "tabulate",
        "termcolor>=1.1",
        "tqdm>4.29",
    ],
    extras_require={
        "digits": ["scikit-learn>=1.3"],
        "timm": ["timm>=1.0.15"],
        "export": ["onnx>=1.19", "onnxruntime>=1.23", "onnxscript>=0.5.6", "huggingface_hub>=0.34"],
        "wandb": ["wandb>=0.17"],
        "mlflow": ["mlflow-skinny>=2.10"],
        "slurm": ["submitit>=1.5"],  # for d2distill-sweep --slurm
        "vis": ["opencv-python-headless"],  # for Detectron2's VIS_PERIOD
        "coco": ["faster-coco-eval>=1.8"],  # detection's AP, sooner
        "docs": DOCS,
        "dev": [
            *DOCS,
            "scikit-learn>=1.3",
            "timm>=1.0.15",
            "onnx>=1.19",
            "onnxruntime>=1.23",
            "onnxscript>=0.5.6",
            "huggingface_hub>=0.34",
            "submitit>=1.5",
            "faster-coco-eval>=1.8",
            "pytest>=8",
            "pytest-xdist>=3.5",
            "hypothesis>=6.100",
            "ruff>=0.9",
            "wheel>=0.43",
            "import-linter>=2.5",
            "nbclient>=0.10",
            "ipykernel>=6.29",
        ],
    },
)

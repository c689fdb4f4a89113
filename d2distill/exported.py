"""Files of students that are shipped: safetensors, torch.export, TorchScript and ONNX; written and opened.

All but the first are programs, which need no code of the network. A classifier's takes RGB images as floats in 0..255,
(N, 3, S, S) with any N; the normalization is inside. A detector's takes one resized image (3, H, W) in 0..255, in the
description's order of channels, with any H and W.

In every file is what :func:`d2distill.load` needs: the description of a student's file, as JSON under "d2distill", in
which "input" and "output" say what a program takes and gives. ``.pt2`` and ``.ts`` files are run when they are opened:
open those whose origin you trust.
"""

import json
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from d2distill.common.engine.tensor_files import DIGEST, append_digest, has_digest, write_safetensors
from d2distill.common.errors import CheckpointError, MissingDependencyError

__all__ = [
    "SUFFIXES", "Program", "open_program", "quantize_onnx", "require", "save_onnx", "save_pt2", "save_safetensors",
    "save_ts",
]  # fmt: skip

#: Takes images, or one, and returns the outputs of its task.
Program = Callable[[Tensor], Sequence[Tensor]]
#: Names of a program's input and outputs by task, with what is dynamic.
_INPUT = {"classification": {"images": {0: "batch"}}, "detection": {"image": {1: "height", 2: "width"}}}
_OUTPUT = {
    "classification": {"logits": {0: "batch"}},
    "detection": {name: {0: "detections"} for name in ("boxes", "scores", "classes")},
}
_SENTENCES = {
    "classification": {
        "input": "images: RGB, float32 in 0..255, (N, 3, {size}, {size}), resized and cropped; normalized inside",
        "output": "logits: (N, {classes})",
    },
    "detection": {
        "input": "image: {format}, float32 in 0..255, (3, H, W), resized; normalized inside",
        "output": "boxes: (R, 4), x0 y0 x1 y1 in pixels of the resized image; scores: (R,); classes: (R,)",
    },
}


def save_pt2(network: nn.Module, images: Tensor, description: Mapping[str, Any], path: Path) -> None:
    """Write a classifier with torch.export. `images` are two or more, as an :class:`.ExportedClassifier` takes them."""
    with _quiet(), torch.no_grad():
        program = torch.export.export(network, (images,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
        torch.export.save(program, path, extra_files={"d2distill": _described(description)})
    _append_digest(path)


def save_ts(detector: nn.Module, image: Tensor, description: Mapping[str, Any], path: Path) -> None:
    """Write Detectron2's detector as TorchScript, by a trace with an image as :class:`.ExportedDetector` takes it."""
    with _quiet():
        traced = torch.jit.trace(_traceable(detector, image), (image,), check_trace=False)
    torch.jit.save(traced, str(path), _extra_files={"d2distill": _described(description)})
    _append_digest(path)


def save_onnx(network: nn.Module, example: Tensor, description: Mapping[str, Any], path: Path) -> None:
    """Write a classifier (by torch.export) or a detector (by a trace) as ONNX; `example` as of the other two."""
    onnx = require("onnx", "onnxscript")[0]
    inputs, outputs = _INPUT[description["task"]], _OUTPUT[description["task"]]
    options = {"input_names": list(inputs), "output_names": list(outputs), "verbose": False}
    with _quiet(), torch.no_grad():
        if description["task"] == "classification":
            program = torch.onnx.export(network, (example,), dynamic_shapes=tuple(inputs.values()), **options)
            program.model.metadata_props["d2distill"] = _described(description)
            program.save(path)
            return _append_digest(path)
        # The exporter on torch.export stops at Detectron2's data-dependent control flow.
        traceable = _traceable(network, example)
        axes = {**inputs, **outputs}
        torch.onnx.export(traceable, (example,), path, dynamo=False, opset_version=17, dynamic_axes=axes, **options)
    model = onnx.load(path)
    model.metadata_props.add(key="d2distill", value=_described(description))
    onnx.save(model, path)
    _append_digest(path)


def save_safetensors(network: nn.Module, description: Mapping[str, Any], path: Path) -> None:
    """Write the weights of a student. What it takes is what the student takes: normalized images, or Detectron2's."""
    with open(path, "wb") as file:
        write_safetensors(network.state_dict(), {"d2distill": json.dumps(description)}, file)


def quantize_onnx(path: Path, output: Path, images: Iterable[Tensor]) -> None:
    """Write a classifier's ONNX file with weights and activations of 8 bits (static quantization, QDQ, per channel).

    Args:
        images: batches as the classifier takes them, from which the activations' ranges are taken.
    """
    onnx = require("onnx", "onnxruntime")[0]
    from onnxruntime.quantization import CalibrationDataReader, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    batches = iter(images)

    class Reader(CalibrationDataReader):
        def get_next(self) -> dict[str, Any] | None:
            batch = next(batches, None)
            return None if batch is None else {"images": batch.float().numpy()}

    with TemporaryDirectory() as folder, _quiet():
        prepared = Path(folder, "prepared.onnx")
        model = onnx.load(path)
        # It is the other file's.
        kept = [entry for entry in model.metadata_props if entry.key != DIGEST]
        del model.metadata_props[:]
        model.metadata_props.extend(kept)
        quant_pre_process(model, str(prepared))
        quantize_static(prepared, output, Reader(), per_channel=True)
    _append_digest(output)


def open_program(path: Path, device: str | torch.device) -> tuple[Program, dict[str, Any]]:
    """What a file with one of :data:`SUFFIXES` computes, on a device, and its description.

    Raises:
        CheckpointError: missing, damaged, or not of these functions.
    """
    if not path.is_file():
        raise CheckpointError(f"there is no file {path.absolute()}")
    try:
        with open(path, "rb") as file:
            has_digest(file)
        program, text = _OPEN[path.suffix](path, torch.device(device))
        description = json.loads(text or "{}")
    except MissingDependencyError:
        raise
    except Exception as error:  # a damaged file raises nearly anything
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise CheckpointError(f"{path} cannot be opened: {lines[0]}") from error
    if not isinstance(description, dict) or description.get("task") not in list(_INPUT):
        raise CheckpointError(f"{path} says nothing of its classes: only files of d2distill-export can be opened")
    return program, description


def require(*names: str) -> list[Any]:
    """Import modules of the extra `export`; a MissingDependencyError says how to install them."""
    try:
        return [import_module(name) for name in names]
    except ImportError as error:
        raise MissingDependencyError(
            f"{error}: pip install onnx onnxruntime onnxscript huggingface_hub (the extra d2distill[export])"
        ) from error


def _append_digest(path: Path) -> None:
    with open(path, "r+b") as file:
        append_digest(file)


def _described(description: Mapping[str, Any]) -> str:
    facts = {**description["preprocess"], "classes": len(description["classes"])}
    sentences = {key: text.format_map(facts) for key, text in _SENTENCES[description["task"]].items()}
    return json.dumps({**description, **sentences})


def _traceable(detector: nn.Module, image: Tensor) -> nn.Module:
    """Detectron2's detector as a function from one image to boxes, scores and classes in the image's own pixels."""
    from detectron2.export import TracingAdapter
    from detectron2.modeling import GeneralizedRCNN

    def detect(model: nn.Module, inputs: list[dict[str, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
        # To resize boxes to the stored image is left to the caller, who alone knows its size. RetinaNet does it, but
        # without a size to the image's own.
        rcnn = isinstance(model, GeneralizedRCNN)
        found = model.inference(inputs, do_postprocess=False)[0] if rcnn else model(inputs)[0]["instances"]
        return found.pred_boxes.tensor, found.scores, found.pred_classes

    return TracingAdapter(detector, [{"image": image}], detect).eval()


def _open_pt2(path: Path, device: torch.device) -> tuple[Program, str]:
    import torchvision  # noqa: F401  its operators may be in the file
    from torch.export.passes import move_to_device_pass

    extra = {"d2distill": ""}
    with _quiet():
        module = move_to_device_pass(torch.export.load(path, extra_files=extra), device).module()
    return _on_device(lambda images: (module(images),), device), extra["d2distill"]


def _open_ts(path: Path, device: torch.device) -> tuple[Program, str]:
    import torchvision  # noqa: F401

    extra = {"d2distill": ""}
    with _quiet():
        module = torch.jit.load(str(path), map_location=device, _extra_files=extra)
    text = extra["d2distill"]
    return _on_device(module, device), text.decode() if isinstance(text, bytes) else text


def _open_onnx(path: Path, device: torch.device) -> tuple[Program, str]:
    (onnxruntime,) = require("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    providers = ["CPUExecutionProvider"]
    if device.type == "cuda" and "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        providers.insert(0, "CUDAExecutionProvider")
    session = onnxruntime.InferenceSession(str(path), options, providers=providers)
    name = session.get_inputs()[0].name

    def run(images: Tensor) -> list[Tensor]:
        return [torch.from_numpy(output) for output in session.run(None, {name: images.cpu().numpy()})]

    return run, session.get_modelmeta().custom_metadata_map.get("d2distill", "")


def _on_device(program: Program, device: torch.device) -> Program:
    def run(images: Tensor) -> Sequence[Tensor]:
        # TorchScript would optimize again after a call or two, for every size of image.
        with torch.no_grad(), torch.jit.optimized_execution(False):
            return program(images.to(device))

    return run


_OPEN = {".pt2": _open_pt2, ".ts": _open_ts, ".onnx": _open_onnx}
#: Endings of the files that :func:`open_program` opens.
SUFFIXES = tuple(_OPEN)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporters tell of themselves: deprecations, and of tracing what the check then looks at."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.fx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)

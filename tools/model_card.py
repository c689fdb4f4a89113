"""A model card in the form of the Hugging Face Hub, filled from a run."""

import json
from collections.abc import Mapping
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

__all__ = ["model_card"]

_TAGS = {"classification": "image-classification", "detection": "object-detection"}
_TEXT = """\
# {name}

{network}, {origin}. Made with d2distill {version}.

The license is the owner's to state: add `license:` to the header of this file before it is published.

## Use

```python
import d2distill  # pip install d2distill[export]

model = d2distill.load("{file}")
{example}
```

or `d2distill-predict {file} photo.jpg`. Class names and preprocessing are in every file, as JSON under `d2distill`
(metadata of ONNX and safetensors, extra files of torch.export and TorchScript).

## Numbers

{table}

## Classes

{classes}

## Preprocessing

{preprocess}

## Made from

{made_from}
"""
_EXAMPLE = {
    "classification": """\
logits = model(model.preprocess("photo.jpg")[None])
print(model.classes[logits.argmax()])""",
    "detection": """\
found = model([model.preprocess("photo.jpg")])[0]["instances"]
print([model.classes[i] for i in found.pred_classes], found.pred_boxes, found.scores)""",
}


def model_card(
    name: str,
    description: Mapping[str, Any],
    origin: str,
    dataset: str,
    metrics: Mapping[str, float],
    file: str,
    table: str,
) -> ModelCard:
    """The card of a student.

    Args:
        name: of the model.
        description: of the student's file.
        origin: how it was trained, a part of a sentence.
        dataset, metrics: what it was evaluated on, and the result in percent; empty where it is not known.
        file: that was exported, for the example.
        table: Markdown.
    """
    task = description["task"]
    measured = [
        EvalResult(_TAGS[task], dataset, dataset, metric, round(value, 2), metric_name=f"{metric} (%)")
        for metric, value in metrics.items()
    ]
    header = ModelCardData(
        model_name=name,
        library_name="d2distill",
        pipeline_tag=_TAGS[task],
        tags=["knowledge-distillation", task],
        datasets=[dataset] if dataset else None,
        metrics=list(metrics) or None,
        eval_results=measured or None,
    )
    facts = {
        "name": name,
        "network": description["network"],
        "origin": origin,
        "version": description["d2distill"],
        "file": file,
        "example": _EXAMPLE[task],
        "table": table.strip(),
        "classes": ", ".join(f"{number} {label}" for number, label in enumerate(description["classes"])),
        "preprocess": _lines(description["preprocess"]),
        "made_from": _lines(description["made_from"]),
    }
    return ModelCard(f"---\n{header.to_yaml()}\n---\n\n{_TEXT.format_map(facts)}")


def _lines(entries: Mapping[str, Any]) -> str:
    return "\n".join(f"- {key}: `{json.dumps(value, ensure_ascii=False)}`" for key, value in entries.items())

"""The test images that a classifier gets most wrong, for the run's report."""

import base64
import io
from typing import Any

from torchvision.transforms.v2.functional import to_pil_image

from d2distill.classification.data import ImageDataset
from d2distill.classification.data.augment import AugmentedDataset, CenterFit
from d2distill.classification.evaluation import AccuracyEvaluator, Evaluator

__all__ = ["draw_worst", "worst_images"]

#: Pixels of a picture's side in the report, at most; JPEG above.
_SIDE = 128


def worst_images(evaluator: Evaluator, number: int = 14) -> dict[str, list]:
    """``index, loss, true, predicted`` of the images of the highest loss, after an evaluation on the main process.

    Empty on other ranks, and where images have several classes.
    """
    if not isinstance(evaluator, AccuracyEvaluator) or not hasattr(evaluator, "losses"):
        return {}
    loss, order = evaluator.losses.topk(min(number, len(evaluator.losses)))
    true, predicted = evaluator.pairs[:, order].tolist()
    return {"index": evaluator.index[order].tolist(), "loss": loss.tolist(), "true": true, "predicted": predicted}


def draw_worst(worst: dict[str, list], dataset: ImageDataset, fit: CenterFit) -> list[dict[str, Any]]:
    """The same with class names, a row for each image, and its ``picture`` as the student sees it, as a data URL."""
    samples, rows = AugmentedDataset(dataset, fit), []
    for index, loss, true, predicted in zip(*(worst[k] for k in ("index", "loss", "true", "predicted")), strict=True):
        image, file = to_pil_image(samples[index]["image"]), io.BytesIO()
        large = max(image.size) > _SIDE
        if large:
            image.thumbnail((_SIDE, _SIDE))
        image.save(file, "JPEG" if large else "PNG")
        data = base64.b64encode(file.getvalue()).decode()
        picture = f"data:image/{'jpeg' if large else 'png'};base64,{data}"
        names = {"true": dataset.classes[true], "predicted": dataset.classes[predicted]}
        rows.append({"index": index, "loss": loss, **names, "picture": picture})
    return rows

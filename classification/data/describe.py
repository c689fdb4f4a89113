"""What a data set holds, in sentences for the log."""

from collections.abc import Mapping

import numpy as np

from d2distill.classification.data.datasets import ImageDataset, shortened

__all__ = ["describe_dataset"]


def describe_dataset(splits: Mapping[str, ImageDataset], limit: int = 20) -> list[str]:
    """The classes in their order, the images of each in every split, and the files that were passed over.

    Args:
        splits: data sets of the same classes by name.
        limit: with more classes names and counts are shortened.
    """
    first = next(iter(splits.values()))
    lines = [
        f"Data set {first.info.name}, {first.num_classes} classes in this order: {shortened(first.classes, limit)}"
    ]
    for name, dataset in splits.items():
        counts = dataset.samples_per_class()
        each = ", ".join(f"{label} {count}" for label, count in zip(dataset.classes, counts, strict=True))
        if len(counts) > limit:
            low, high = int(np.argmin(counts)), int(np.argmax(counts))
            each = f"{counts[low]} ({dataset.classes[low]}) to {counts[high]} ({dataset.classes[high]}) per class"
        lines.append(f"{len(dataset)} {name} images: {each}")
    # Parts of one folder have passed over the same files.
    for files in {id(dataset.passed_over): dataset.passed_over for dataset in splits.values()}.values():
        kinds = [f"{count} {kind} (e.g. {example})" for kind, (count, example) in sorted(files.items())]
        lines += [f"Files that are passed over, by ending: {', '.join(kinds)}"] * bool(kinds)
    return lines

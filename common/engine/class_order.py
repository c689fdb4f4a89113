"""The classes that a file of weights was trained on, held against those of the data: no tensor knows their order."""

import logging
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any

from d2distill.common.errors import CheckpointError

__all__ = ["check_class_order", "classes_in"]

logger = logging.getLogger("detectron2.d2distill")


def classes_in(description: Mapping[str, Any]) -> list[str]:
    """The names of a description's ``classes``, in the order of the logits; empty where it names none."""
    found = description.get("classes")
    return found if isinstance(found, list) and all(isinstance(name, str) for name in found) else []


def check_class_order(
    where: str, trained: Sequence[str], data: str, classes: Sequence[str], way_out: str, may_differ: bool = False
) -> None:
    """Compare the classes that weights were `trained` on with those of the data; nothing is known where one is empty.

    Another number of classes, or a name that both have in another place, makes every metric and every comparison of
    logits wrong. Where names differ and none has moved they may have been renamed: the log warns.

    Args:
        where: the setting and the file, for the error and the log.
        data: what the data are called there.
        way_out: what makes the two agree, for the error.
        may_differ: the weights are those that a training begins with: other numbers are fine, and another order is
            only warned of.

    Raises:
        CheckpointError: the classes are others, or in another order.
    """
    trained, classes = list(trained), list(classes)
    if not trained or not classes or trained == classes or (may_differ and len(trained) != len(classes)):
        return
    number, pair = next((n, pair) for n, pair in enumerate(zip_longest(trained, classes)) if pair[0] != pair[1])
    there, here = (repr(name) if name is not None else "none" for name in pair)
    differ = (
        f"{where} was trained on {len(trained)} classes, {data} has {len(classes)}: number {number} is {there} there "
        f"and {here} here"
    )
    places = {name: place for place, name in enumerate(trained)}
    moved = any(places.get(name, place) != place for place, name in enumerate(classes))
    if (moved or len(trained) != len(classes)) and not may_differ:
        raise CheckpointError(f"{differ}. {way_out}")
    logger.warning(f"{differ}; right only if " + ("the order may be another" if moved else "they were renamed"))

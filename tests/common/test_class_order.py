"""Classes of weights and of data: what is refused, what is warned of, and what a file says of its own."""

import json

import pytest

from d2distill.common.engine.class_order import check_class_order, classes_in
from d2distill.common.engine.settings import config_diff
from d2distill.common.engine.weight_files import description_in
from d2distill.common.errors import CheckpointError


def check(trained, classes, **more):
    check_class_order("WEIGHTS: f.pth", trained, "the data set pets", classes, "Sort them", **more)


@pytest.mark.parametrize(
    ("trained", "classes", "first"),
    [
        ("abc", "acb", "3 classes, the data set pets has 3: number 1 is 'b' there and 'c' here"),
        (
            "abc",
            "xab",
            "3 classes, the data set pets has 3: number 0 is 'a' there and 'x' here",
        ),  # one is new, two move
        ("abc", "ab", "3 classes, the data set pets has 2: number 2 is 'c' there and none here"),
        ("ab", "abc", "2 classes, the data set pets has 3: number 2 is none there and 'c' here"),
    ],
)
def test_other_classes_are_refused(trained, classes, first):
    with pytest.raises(CheckpointError, match=rf"^WEIGHTS: f\.pth was trained on {first}\. Sort them$"):
        check(trained, classes)


def test_what_may_be_right_is_warned_of(log):
    for trained, classes in (("abc", "abc"), ("", "abc"), ("abc", "")):
        check(trained, classes)
    check("abc", "ab", may_differ=True)  # a classifier that begins anew
    assert not log.records
    check("abc", "xbc")
    check("abc", "bac", may_differ=True)
    renamed, moved = (record.getMessage() for record in log.records)
    assert renamed.endswith("number 0 is 'a' there and 'x' here; right only if they were renamed")
    assert moved.endswith("number 0 is 'a' there and 'b' here; right only if the order may be another")


def test_what_a_file_says():
    student = {"model": {}, "d2distill": json.dumps({"classes": ["a", "b"], "task": "detection"})}
    checkpoint = {"model": {}, "run_identity": {"classes": ["a", "b"]}, "settings": {}}
    assert all(classes_in(description_in(content)) == ["a", "b"] for content in (student, checkpoint))
    older = {"model": {}, "run_identity": {"training images": 3}}
    odd = [{"d2distill": json.dumps({"classes": found})} for found in (None, "ab", [1, 2], {"a": 0})]
    assert not any(classes_in(description_in(content)) for content in (older, *odd, {}, None, {"run_identity": 3}))


def test_the_first_of_many_classes_that_differs():
    before, now = (
        {"classes": [str(number) for number in order]} for order in (range(1000), [0, 2, 1, *range(3, 1000)])
    )
    assert config_diff(before, now) == ["classes[1] was '1', now '2'"]
    assert config_diff({"classes": ["a", "b"]}, {"classes": ["b", "a"]}) == ["classes was ['a', 'b'], now ['b', 'a']"]
    assert config_diff({}, now) == []  # of a checkpoint of an older version

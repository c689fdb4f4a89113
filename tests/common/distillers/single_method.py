"""One method on its own, from its defaults."""

from d2distill.common.config import CfgNode, add_distill_defaults
from d2distill.common.distillers import DISTILLERS


def settings(name, **changed):
    cfg = CfgNode()
    add_distill_defaults(cfg)
    node = cfg.DISTILL[name.upper()]
    node.merge_from_list([part for pair in changed.items() for part in pair])
    return node


def build(name, student, teacher, num_samples=None, **changed):
    """The method `name` for outputs like these (`Outputs`; teacher None), with some settings changed."""
    specs = [None if outputs is None else outputs.spec() for outputs in (student, teacher)]
    return DISTILLERS.get(name)(settings(name, **changed), *specs, num_samples)

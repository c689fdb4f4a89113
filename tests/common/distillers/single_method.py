"""One method on its own, built from its defaults for networks with given outputs."""

from d2distill.common.config import CfgNode, add_distill_defaults
from d2distill.common.distillers import DISTILLERS
from d2distill.common.outputs import Outputs


def settings(name, **changed):
    cfg = CfgNode()
    add_distill_defaults(cfg)
    node = cfg.DISTILL[name.upper()]
    node.merge_from_list([part for pair in changed.items() for part in pair])
    return node


def build(name, student, teacher=None, data=None, **changed):
    """The method `name` for two networks, given by `Outputs` or `NetworkInfo`, with some settings changed."""
    infos = [network.info() if isinstance(network, Outputs) else network for network in (student, teacher)]
    return DISTILLERS.get(name)(settings(name, **changed), *infos, data)

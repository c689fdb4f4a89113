"""Deterministic inputs and weights, the same for the reference and for the project."""

import zlib

import numpy as np
import torch


def array(seed, *shape, scale=1.0):
    return torch.from_numpy((np.random.default_rng(seed).standard_normal(shape) * scale).astype("float32"))


def fill_by_name(module):
    """Give every floating tensor of the state dict values that depend on its name alone."""
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if not tensor.is_floating_point():
                continue
            rng = np.random.default_rng(zlib.crc32(name.encode()))
            tensor.copy_(_values(rng, tuple(tensor.shape), name))
    return module


def fill_by_shape(parameters_and_buffers):
    """Give every floating tensor values that depend on its shape alone (names may differ)."""
    with torch.no_grad():
        for name, tensor in parameters_and_buffers:
            if not tensor.is_floating_point():
                continue
            key = "x".join(map(str, tensor.shape)) + ("v" if name.endswith("running_var") else "")
            rng = np.random.default_rng(zlib.crc32(key.encode()))
            tensor.copy_(_values(rng, tuple(tensor.shape), "running_var" if key.endswith("v") else "w"))


def _values(rng, shape, name):
    if name.endswith("running_var"):
        return torch.from_numpy((0.5 + rng.random(shape)).astype("float32"))
    if len(shape) <= 1:
        base = 1.0 if name.endswith("weight") else 0.0
        return torch.from_numpy((base + 0.1 * rng.standard_normal(shape)).astype("float32"))
    fan_in = int(np.prod(shape[1:]))
    return torch.from_numpy((rng.standard_normal(shape) / np.sqrt(fan_in)).astype("float32"))

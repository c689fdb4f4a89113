"""Drawing samples of other classes, and comparing embeddings with a memory of them."""

import torch
from torch import Tensor

__all__: list[str] = []


def sample_negatives(
    label: Tensor, order: Tensor, sorted_labels: Tensor, num_negatives: int, index: Tensor | None = None
) -> Tensor:
    """One positive and K negatives per sample, drawn with replacement, uniformly over all samples of other classes.

    Without a loop, a rejection or a wait for the device. A remainder of 63 random bits is uniform to 1e-12.

    Args:
        label: (N,) class of each sample.
        order, sorted_labels: (num_samples,) each, all samples sorted by class, and their classes; each sample's class
            is among them, and is not the only one.
        num_negatives: K.
        index: (N,) positives; None draws them uniformly from the sample's class.

    Returns:
        (N, 1 + K) positions in the data set, the positive first.
    """
    start, end = (torch.searchsorted(sorted_labels, label, right=right)[:, None] for right in (False, True))
    bits = torch.randint(2**63 - 1, (len(label), 1 + num_negatives), device=label.device)
    # A class is a block of the sorted table: positions behind its start are moved past its end.
    place = bits[:, 1:] % (len(order) - (end - start)).clamp(min=1)
    negative = order[(place + (place >= start) * (end - start)).clamp(max=len(order) - 1)]
    positive = order[start + bits[:, :1] % (end - start)] if index is None else index[:, None]
    return torch.cat([positive, negative], dim=1)


def contrast_logits(embedding: Tensor, bank: Tensor, contrast: Tensor) -> Tensor:
    """Inner products (N, 1 + K) of embeddings (N, D) with the rows `contrast` (N, 1 + K) of a bank (num_samples, D).

    The bank may change before the backward pass.
    """
    (n, d), num_samples = embedding.shape, len(bank)
    if num_samples * (n + d) <= contrast.numel() * d:
        # All products and a copy of the bank are smaller than the rows drawn from it.
        return (embedding @ bank.clone().T).gather(1, contrast)
    return torch.bmm(bank[contrast], embedding[:, :, None])[:, :, 0]


def last_of_each(index: Tensor) -> Tensor:
    """For each entry the last position at which its value occurs: equal entries are then written with equal rows."""
    values, positions = index.sort(stable=True)
    return positions[torch.searchsorted(values, index, right=True) - 1]

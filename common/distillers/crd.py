"""Contrastive representation distillation."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from d2distill.common.distillers._contrast import contrast_logits, last_of_each, sample_negatives
from d2distill.common.distillers._distributed import all_gather_rows, all_reduce_sum
from d2distill.common.distillers._numerics import no_autocast, safe_mean, upcast
from d2distill.common.distillers.base import DISTILLERS, Distiller
from d2distill.common.outputs import Batch, NetworkInfo, Outputs, TrainingData

__all__ = ["CRD", "crd_loss"]


def crd_loss(log_scores: Tensor, num_samples: int, eps: float = 1e-7) -> Tensor:
    """Noise-contrastive estimation of one side's scores, against uniform noise.

    Tian, Krishnan, Isola: Contrastive Representation Distillation, ICLR 2020, arXiv:1910.10699, equation 18.

        - mean over samples of ( log(P+ / (P+ + c + eps)) + sum over negatives of log(c / (P- + c + eps)) )

    with c = K / num_samples.

    Args:
        log_scores: (N, 1 + K) log P = dot / T - log Z of the positive and of K > 0 negatives.
        num_samples: size of the training set.
    """
    log_scores = upcast(log_scores)
    num_negatives = log_scores.shape[1] - 1
    noise = num_negatives / num_samples
    gap = log_scores - math.log(noise + eps)
    negatives = F.logsigmoid(-gap[:, 1:]).sum(1) - num_negatives * math.log1p(eps / noise)
    return -safe_mean(F.logsigmoid(gap[:, 0]) + negatives)


@DISTILLERS.register()
class CRD(Distiller):
    """`crd_loss` of each network's embedding against a memory bank of the other's, both sides added.

    An embedding is a learned linear map of `pooled` to FEAT_DIM numbers, divided by its L2 norm. A bank row is the
    normalized mean, with momentum, of a sample's embeddings; where a batch holds a sample twice, the last one counts.
    Z is the mean score of the first batch times the number of samples, per side. MODE "exact" takes the sample itself
    as the positive, "relax" any sample of its class. Negatives are samples of other classes; where the classes of the
    training set are not known, all other samples.

    With several processes banks and Z are those of the whole batch, and the same in each of them. They must be built
    from the same seed, as the trainer does.

    Raises:
        ValueError: the number of training samples is unknown or below 2, all are of one class, K below 1 or without
            sense, an unknown MODE, "relax" without known classes; in a step no index.
    """

    needs = ("pooled",)
    # A mixed image is no sample of the training set.
    takes_soft_target = False

    def build(self, student: NetworkInfo, teacher: NetworkInfo, data: TrainingData) -> None:
        cfg, num_samples = self.cfg, data.num_samples
        if num_samples is None or num_samples < 2:
            raise ValueError(f"{self.name} remembers training samples, but their number is {num_samples}; 2 or more")
        # Each step draws a table of K numbers per sample.
        if not 1 <= cfg.K <= 10**7 or cfg.MODE not in ("exact", "relax"):
            raise ValueError(
                f'{self.name} takes K from 1 to 10,000,000 and MODE "exact" or "relax", not {cfg.K} and {cfg.MODE!r}'
            )
        if data.labels is None and cfg.MODE == "relax":
            raise ValueError(f'{self.name}: MODE "relax" needs the classes of the training samples; take "exact"')
        # Without classes each sample is one of its own.
        labels = torch.arange(num_samples) if data.labels is None else torch.as_tensor(data.labels).long().cpu()
        if len(labels) != num_samples or labels.min() == labels.max():
            raise ValueError(
                f"{self.name} contrasts classes: it needs those of all {num_samples} samples, and more than one, but "
                f"has {len(labels)} labels of {len(labels.unique())} classes"
            )
        self.num_samples = num_samples
        self.embed_student = nn.Linear(student.pooled, cfg.FEAT_DIM)
        self.embed_teacher = nn.Linear(teacher.pooled, cfg.FEAT_DIM)
        # A generator of its own: the methods that follow begin alike with any number of samples. Not the seed itself,
        # whose numbers the networks and the embeddings were drawn from.
        generator = torch.Generator().manual_seed(torch.initial_seed() ^ 1)
        bound = math.sqrt(3 / cfg.FEAT_DIM)
        for side in ("student", "teacher"):
            bank = torch.empty(num_samples, cfg.FEAT_DIM).uniform_(-bound, bound, generator=generator)
            self.register_buffer(f"bank_{side}", bank)
        self.register_buffer("z", torch.full((2,), -1.0))
        self.register_buffer("labels", labels, persistent=False)
        self.register_buffer("order", labels.argsort(stable=True), persistent=False)

    @classmethod
    def defaults(cls) -> dict[str, object]:
        return {
            "WEIGHT": 0.8,
            # Negatives per sample. More than there are samples of other classes means repeats.
            "K": 16384,
            # Temperature tau of the scores.
            "T": 0.07,
            # Of the memory banks: the share that stays of a sample's entry.
            "MOMENTUM": 0.5,
            # Numbers per embedding.
            "FEAT_DIM": 128,
            # Positive of a sample: itself ("exact"), or any sample of its class ("relax").
            "MODE": "exact",
        }

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        if batch.index is None:
            raise ValueError(f"{self.name} needs the position of each sample in the training set (Batch.index)")
        index = batch.index.long().to(self.z.device, non_blocking=True)
        with no_autocast(self.z):
            of_student = F.normalize(self.embed_student(student.pooled.to(self.z.dtype)))
            of_teacher = F.normalize(self.embed_teacher(teacher.pooled.detach().to(self.z.dtype)))
            contrast = self._contrast(index, batch.extras.get("contrast_index"))
            products = [
                contrast_logits(of_student, self.bank_teacher, contrast) / self.cfg.T,
                contrast_logits(of_teacher, self.bank_student, contrast) / self.cfg.T,
            ]
            self._fix_z(products)
            loss = sum(crd_loss(p - z.log(), self.num_samples) for p, z in zip(products, self.z, strict=True))
            everywhere, *embeddings = all_gather_rows(index, of_student, of_teacher)
            last = last_of_each(everywhere)
            for bank, embedding in zip((self.bank_student, self.bank_teacher), embeddings, strict=True):
                mean = self.cfg.MOMENTUM * bank[everywhere] + (1 - self.cfg.MOMENTUM) * embedding[last]
                bank[everywhere] = F.normalize(mean)
        return loss

    def _contrast(self, index: Tensor, given: Tensor | None) -> Tensor:
        if given is not None:  # drawn by the loader: the positive, then the negatives
            return given.long().to(index.device, non_blocking=True)
        positives = index if self.cfg.MODE == "exact" else None
        return sample_negatives(self.labels[index], self.order, self.labels[self.order], self.cfg.K, positives)

    @torch.no_grad()
    def _fix_z(self, products: list[Tensor]) -> None:
        """Set Z where it is unset; done in every step, since asking whether it is would wait for the device."""
        count = products[0].new_full((1,), products[0].numel())
        *sums, count = all_reduce_sum(torch.cat([*(p.exp().sum()[None] for p in products), count]))
        fresh = self.num_samples * torch.stack(sums) / count.clamp(min=1)
        self.z.copy_(torch.where((self.z < 0) & (count > 0), fresh, self.z))

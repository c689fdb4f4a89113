"""Loss functions as they are usually written, for ``d2distill-benchmark`` to compare with.

Each has the name of a method in lower case and is compared with that method's loss function, on the same tensors
(arguments without a default) and settings (those with one, in the same order). They are close to the published code
(https://github.com/megvii-research/mdistiller, and each method's own repository), shortened. Not for training: some are
not finite for large logits, and none takes an empty batch.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def kd(logits_student: Tensor, logits_teacher: Tensor, temperature: float = 4.0) -> Tensor:
    log_student = F.log_softmax(logits_student / temperature, dim=1)
    teacher = F.softmax(logits_teacher / temperature, dim=1)
    return F.kl_div(log_student, teacher, reduction="none").sum(1).mean() * temperature**2


def dkd(
    logits_student: Tensor,
    logits_teacher: Tensor,
    target: Tensor,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float = 4.0,
) -> Tensor:
    gt_mask = torch.zeros_like(logits_student).scatter_(1, target.unsqueeze(1), 1).bool()
    other_mask = torch.ones_like(logits_student).scatter_(1, target.unsqueeze(1), 0).bool()

    def cat_mask(probabilities: Tensor) -> Tensor:
        target_part = (probabilities * gt_mask).sum(dim=1, keepdim=True)
        return torch.cat([target_part, (probabilities * other_mask).sum(1, keepdim=True)], dim=1)

    pred_student = cat_mask(F.softmax(logits_student / temperature, dim=1))
    pred_teacher = cat_mask(F.softmax(logits_teacher / temperature, dim=1))
    tckd = F.kl_div(torch.log(pred_student), pred_teacher, reduction="sum") * temperature**2 / target.shape[0]
    pred_teacher = F.softmax(logits_teacher / temperature - 1000.0 * gt_mask, dim=1)
    log_student = F.log_softmax(logits_student / temperature - 1000.0 * gt_mask, dim=1)
    nckd = F.kl_div(log_student, pred_teacher, reduction="sum") * temperature**2 / target.shape[0]
    return alpha * tckd + beta * nckd


def nkd(
    logits_student: Tensor, logits_teacher: Tensor, target: Tensor, gamma: float = 1.5, temperature: float = 1.0
) -> Tensor:
    n, c = logits_student.shape
    label = target.view(n, 1)
    log_s, p_t = F.log_softmax(logits_student, dim=1), F.softmax(logits_teacher, dim=1)
    target_part = -(p_t.gather(1, label) * log_s.gather(1, label)).mean()
    mask = torch.ones_like(logits_student).scatter_(1, label, 0).bool()
    others_student, others_teacher = logits_student[mask].reshape(n, c - 1), logits_teacher[mask].reshape(n, c - 1)
    others = F.softmax(others_teacher / temperature, dim=1) * F.log_softmax(others_student / temperature, dim=1)
    return target_part - gamma * temperature**2 * others.sum(1).mean()


def dist(
    logits_student: Tensor, logits_teacher: Tensor, beta: float = 1.0, gamma: float = 1.0, temperature: float = 4.0
) -> Tensor:
    def pearson(a: Tensor, b: Tensor) -> Tensor:
        return F.cosine_similarity(a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True), dim=1, eps=1e-8)

    y_s, y_t = ((logits / temperature).softmax(dim=1) for logits in (logits_student, logits_teacher))
    inter, intra = 1 - pearson(y_s, y_t).mean(), 1 - pearson(y_s.T, y_t.T).mean()
    return temperature**2 * (beta * inter + gamma * intra)


def rld(
    logits_student: Tensor,
    logits_teacher: Tensor,
    target: Tensor,
    alpha: float = 1.0,
    beta: float = 8.0,
    alpha_temperature: float = 1.0,
    temperature: float = 4.0,
) -> Tensor:
    def pair(logits: Tensor, at: Tensor) -> Tensor:
        mask = torch.zeros_like(logits).scatter_(1, at.unsqueeze(1), 1).bool()
        p = F.softmax(logits / alpha_temperature, dim=1)
        return torch.cat([(p * mask).sum(1, keepdim=True), (p * ~mask).sum(1, keepdim=True)], dim=1)

    student, teacher = pair(logits_student, target), pair(logits_teacher, logits_teacher.argmax(1))
    confidence = F.kl_div(student.log(), teacher, reduction="batchmean") * alpha_temperature**2
    masked = logits_teacher >= logits_teacher.gather(1, target.unsqueeze(1))
    soft_teacher = F.softmax(logits_teacher / temperature - 1000.0 * masked, dim=1)
    log_student = F.log_softmax(logits_student / temperature - 1000.0 * masked, dim=1)
    correlation = F.kl_div(log_student, soft_teacher, reduction="batchmean") * temperature**2
    return alpha * confidence + beta * correlation


def rkd(
    embedding_student: Tensor,
    embedding_teacher: Tensor,
    distance_weight: float = 25.0,
    angle_weight: float = 50.0,
    squared: bool = False,
    eps: float = 1e-12,
) -> Tensor:
    def pdist(e: Tensor) -> Tensor:
        squares, products = e.pow(2).sum(dim=1), e @ e.t()
        result = (squares.unsqueeze(1) + squares.unsqueeze(0) - 2 * products).clamp(min=eps)
        result = (result if squared else result.sqrt()).clone()
        result[range(len(e)), range(len(e))] = 0
        return result / result[result > 0].mean()

    def angles(e: Tensor) -> Tensor:
        direction = F.normalize(e.unsqueeze(0) - e.unsqueeze(1), p=2, dim=2)
        return torch.bmm(direction, direction.transpose(1, 2)).view(-1)

    with torch.no_grad():
        d_teacher, a_teacher = pdist(embedding_teacher), angles(embedding_teacher)
    distance = F.smooth_l1_loss(pdist(embedding_student), d_teacher)
    return distance_weight * distance + angle_weight * F.smooth_l1_loss(angles(embedding_student), a_teacher)


def pkt(embedding_student: Tensor, embedding_teacher: Tensor, eps: float = 1e-7) -> Tensor:
    def probabilities(e: Tensor) -> Tensor:
        e = e / (e.pow(2).sum(dim=1, keepdim=True).sqrt() + eps)
        similarity = (e @ e.transpose(0, 1) + 1.0) / 2.0
        return similarity / similarity.sum(dim=1, keepdim=True)

    p, q = probabilities(embedding_student), probabilities(embedding_teacher)
    return (q * torch.log((q + eps) / (p + eps))).mean()


def crd(embedding: Tensor, bank: Tensor, contrast: Tensor, temperature: float = 0.07, eps: float = 1e-7) -> Tensor:
    """One side's: embeddings (N, D) against the rows `contrast` (N, 1 + K) of a bank (num_samples, D); Z as of the
    first batch."""
    n, samples = contrast.shape
    weight = torch.index_select(bank, 0, contrast.view(-1)).view(n, samples, -1)
    scores = torch.exp(torch.bmm(weight, embedding.view(n, -1, 1)) / temperature)
    scores = scores / (scores.mean() * len(bank)).detach()
    noise = (samples - 1) / len(bank)
    positive = scores.select(1, 0)
    log_positive = torch.log(positive / (positive + noise + eps))
    negative = scores.narrow(1, 1, samples - 1)
    log_negative = torch.log(torch.full_like(negative, noise) / (negative + noise + eps))
    return -(log_positive.sum(0) + log_negative.view(-1, 1).sum(0))[0] / n

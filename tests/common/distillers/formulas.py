"""The papers' formulas on float64, entry by entry: slow, plain, and independent of the code under test."""

import math

import numpy as np
import torch
from torch.nn import functional as F


def pooled(x, height, width):
    """Adaptive average pooling: cell i covers rows floor(i * H / h) to ceil((i + 1) * H / h)."""
    n, c, h, w = x.shape
    out = torch.zeros(n, c, height, width, dtype=x.dtype)
    for i in range(height):
        for j in range(width):
            rows = slice(i * h // height, -(-(i + 1) * h // height))
            columns = slice(j * w // width, -(-(j + 1) * w // width))
            out[:, :, i, j] = x[:, :, rows, columns].mean((2, 3))
    return out


def resize_pairs_to_teacher(s, t):
    height, width = (min(a, b) for a, b in zip(s.shape[2:], t.shape[2:], strict=True))
    return pooled(s.double(), height, width), pooled(t.double(), height, width)


def at(feats_student, feats_teacher, p=2):
    total = 0.0
    for s, t in zip(feats_student, feats_teacher, strict=True):
        s, t = resize_pairs_to_teacher(s, t)
        errors = []
        for n in range(len(s)):
            attention = []
            for x in (s[n], t[n]):
                a = [sum(abs(v) ** p for v in position.tolist()) for position in x.flatten(1).T]
                norm = math.sqrt(sum(v * v for v in a))
                attention.append([v / norm for v in a])
            errors += [(a - b) ** 2 for a, b in zip(*attention, strict=True)]
        total += sum(errors) / len(errors)
    return total


def nst(feats_student, feats_teacher):
    def kernel_mean(a, b):
        values = []
        for n in range(len(a)):
            for x in a[n]:
                for y in b[n]:
                    values.append((((x / x.norm()) * (y / y.norm())).sum() ** 2).item())
        return sum(values) / len(values)

    total = 0.0
    for s, t in zip(feats_student, feats_teacher, strict=True):
        s, t = resize_pairs_to_teacher(s, t)
        total += kernel_mean(t, t) + kernel_mean(s, s) - 2 * kernel_mean(s, t)
    return total


def sp(feats_student, feats_teacher):
    total = 0.0
    for s, t in zip(feats_student, feats_teacher, strict=True):
        n, grams = len(s), []
        for x in (s.double(), t.double()):
            gram = [[(x[i] * x[j]).sum().item() for j in range(n)] for i in range(n)]
            grams.append([[v / math.sqrt(sum(u * u for u in row)) for v in row] for row in gram])
        total += sum((grams[0][i][j] - grams[1][i][j]) ** 2 for i in range(n) for j in range(n)) / n**2
    return total


def kdsvd(feats_student, feats_teacher, k=1):
    total, before = 0.0, None
    for s, t in zip(feats_student, feats_teacher, strict=True):
        s, t = resize_pairs_to_teacher(s, t)
        now = []
        for n in range(len(s)):
            _, values, vh = np.linalg.svd(t[n].reshape(-1, t.shape[3]).numpy(), full_matrices=False)
            student_vh = np.linalg.svd(s[n].reshape(-1, s.shape[3]).numpy(), full_matrices=False)[2][: k + 3]
            values, aligned = values[:k] / np.linalg.norm(values[:k]), []
            for v in vh[:k]:
                best = max(student_vh, key=lambda u: abs(u @ v))
                aligned.append(best * np.sign(best @ v))
            now.append([(values[c] * aligned[c], values[c] * vh[c]) for c in range(len(values))])
        if before is not None:
            for n in range(len(s)):
                for (v_s, v_t), (u_s, u_t) in zip(now[n], before[n], strict=False):
                    for i in range(len(v_s)):
                        for j in range(len(u_s)):
                            r_s = math.exp(-((v_s[i] - u_s[j]) ** 2) / 8)
                            r_t = math.exp(-((v_t[i] - u_t[j]) ** 2) / 8)
                            total += (r_s - r_t) ** 2 / len(s)
        before = now
    return total


def hcl(feats_student, feats_teacher):
    total = 0.0
    for s, t in zip(feats_student, feats_teacher, strict=True):
        s, t = resize_pairs_to_teacher(s, t)
        terms = [((s - t) ** 2).mean().item()]
        for level in (4, 2, 1):
            if level < min(s.shape[2:]):
                terms.append(((pooled(s, level, level) - pooled(t, level, level)) ** 2).mean().item())
        weights = [1, 1 / 2, 1 / 4, 1 / 8][: len(terms)]
        total += sum(w * v for w, v in zip(weights, terms, strict=True)) / sum(weights)
    return total


def pkt(embedding_student, embedding_teacher, eps=1e-7):
    n, probabilities = len(embedding_student), []
    for x in (embedding_student.double(), embedding_teacher.double()):
        unit = [row / (row.norm() + eps) for row in x]
        similarity = [[((a @ b).item() + 1) / 2 for b in unit] for a in unit]
        probabilities.append([[v / sum(row) for v in row] for row in similarity])
    p, q = probabilities
    return sum(q[i][j] * math.log((q[i][j] + eps) / (p[i][j] + eps)) for i in range(n) for j in range(n)) / n**2


def smooth_l1(a, b):
    return abs(a - b) - 0.5 if abs(a - b) > 1 else 0.5 * (a - b) ** 2


def rkd(embedding_student, embedding_teacher, distance_weight=25, angle_weight=50, squared=False):
    n, distances, angles = len(embedding_student), [], []
    for x in (embedding_student.double(), embedding_teacher.double()):
        d = {(i, j): (x[i] - x[j]).norm().item() ** (2 if squared else 1) for i in range(n) for j in range(n)}
        positive = [v for v in d.values() if v > 0]
        distances.append({pair: v / (sum(positive) / len(positive)) for pair, v in d.items()})
        a = {}
        for i in range(n):
            for j in range(n):
                for k in range(n):
                    left, right = x[j] - x[i], x[k] - x[i]
                    a[i, j, k] = 0.0 if i in (j, k) else (left @ right / left.norm() / right.norm()).item()
        angles.append(a)
    means = [
        sum(smooth_l1(student[key], teacher[key]) for key in student) / len(student)
        for student, teacher in (distances, angles)
    ]
    return distance_weight * means[0] + angle_weight * means[1]


def ofd(feats_student, feats_teacher, margins):
    total, count = 0.0, len(feats_student)
    for i, (s, t) in enumerate(zip(feats_student, feats_teacher, strict=True)):
        t = F.adaptive_avg_pool2d(t, s.shape[2:])
        stage = 0.0
        for position in np.ndindex(*s.shape):
            source, target, margin = s[position].item(), t[position].item(), margins[i][position[1]].item()
            # The paper's three cases: positive, between margin and 0, below the margin.
            if target > 0:
                stage += (source - target) ** 2
            elif target > margin:
                stage += max(source - target, 0.0) ** 2
            else:
                stage += max(source - margin, 0.0) ** 2
        total += stage / len(s) / 2 ** (count - 1 - i)
    return total


def vid(mean, feat_teacher, variance):
    terms = [
        0.5 * ((mean[p] - feat_teacher[p]).item() ** 2 / variance[p[1]].item() + math.log(variance[p[1]].item()))
        for p in np.ndindex(*mean.shape)
    ]
    return sum(terms) / len(terms)


def softmax(row, temperature=1.0):
    powers = [math.exp(v / temperature) for v in row]
    return [p / sum(powers) for p in powers]


def kl(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def pearson(x, y, eps=1e-8):
    x, y = ([v - sum(values) / len(values) for v in values] for values in (x, y))
    norms = math.sqrt(sum(v * v for v in x)) * math.sqrt(sum(v * v for v in y))
    return sum(a * b for a, b in zip(x, y, strict=True)) / (norms + eps)


def kd(student, teacher, target, T):
    divergences = [kl(softmax(t, T), softmax(s, T)) for s, t in zip(student, teacher, strict=True)]
    return T**2 * sum(divergences) / len(divergences)


def dkd(student, teacher, target, T, alpha=1.0, beta=8.0):
    total = 0.0
    for s, t, y in zip(student, teacher, target, strict=True):
        p, q = softmax(t, T), softmax(s, T)
        others = [c for c in range(len(p)) if c != y]
        rest_p, rest_q = sum(p[c] for c in others), sum(q[c] for c in others)
        nckd = kl([p[c] / rest_p for c in others], [q[c] / rest_q for c in others])
        total += alpha * kl([p[y], rest_p], [q[y], rest_q]) + beta * nckd
    return T**2 * total / len(student)


def dist(student, teacher, target, T):
    s, t = [softmax(row, T) for row in student], [softmax(row, T) for row in teacher]
    rows = [pearson(a, b) for a, b in zip(s, t, strict=True)]
    columns = [pearson([r[c] for r in s], [r[c] for r in t]) for c in range(len(s[0]))]
    return T**2 * (1.5 * (1 - sum(rows) / len(rows)) + 0.5 * (1 - sum(columns) / len(columns)))


def nkd(student, teacher, target, T):
    total = 0.0
    for s, t, y in zip(student, teacher, target, strict=True):
        total -= softmax(t)[y] * math.log(softmax(s)[y])
        others = [c for c in range(len(s)) if c != y]
        q_s, q_t = softmax([s[c] for c in others], T), softmax([t[c] for c in others], T)
        total -= 3.5 * T**2 * sum(a * math.log(b) for a, b in zip(q_t, q_s, strict=True))
    return total / len(student)


def rld(student, teacher, target, T):
    total = 0.0
    for s, t, y in zip(student, teacher, target, strict=True):
        p_s, p_t = softmax(s, 2.0)[y], max(softmax(t, 2.0))
        total += 1.5 * 2.0**2 * kl([p_t, 1 - p_t], [p_s, 1 - p_s])
        below = [c for c in range(len(t)) if t[c] < t[y]]
        total += 8.0 * T**2 * kl(softmax([t[c] for c in below], T), softmax([s[c] for c in below], T)) if below else 0
    return total / len(student)


def wttm(student, teacher, target, T):
    total = 0.0
    for s, t in zip(student, teacher, strict=True):
        powers = [p ** (1 / T) for p in softmax(t)]
        total += sum(powers) * kl([p / sum(powers) for p in powers], softmax(s))
    return total / len(student)


def bckd(student, teacher, target, T=None):
    total = 0.0
    for s, t, y in zip(student, teacher, target, strict=True):
        for a, b in zip(s, t, strict=True):
            p, q = 1 / (1 + math.exp(-b)), 1 / (1 + math.exp(-a))
            total -= (y >= 0) * abs(p - q) * (p * math.log(q) + (1 - p) * math.log(1 - q))
    return total / max(sum(0 <= y < len(student[0]) for y in target), 1)

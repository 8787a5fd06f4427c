"""Algorithm 1 of the paper as one plain function, in float64: no function of the package but the network itself.

Plain torch, for its autograd; the optimiser, the moving averages and the fit of Eq. 6 are written out. Line numbers
are those of Algorithm 1.
"""

import copy
from types import SimpleNamespace

import numpy as np
import torch
from scipy.optimize import brentq
from scipy.special import expit
from torch.nn.functional import interpolate, one_hot


def resize(maps, size):
    return interpolate(maps, size=tuple(size), mode="bilinear", align_corners=False)


def solve_equation_6(counts):
    """EM for two Gaussians on counts in 512 bins over (0.05, 1]; then where both are equally likely."""
    width = 0.95 / 512
    x, p = 0.05 + (np.arange(512) + 0.5) * width, counts / counts.sum()
    foreground = (x > (p * x).sum()).astype(float)
    means = np.full(2, np.inf)
    for _ in range(100_000):
        share = np.stack([p * (1 - foreground), p * foreground])
        pi, before = share.sum(axis=1), means
        means = share @ x / pi
        variances = np.maximum((share * (x - means[:, None]) ** 2).sum(axis=1) / pi, width**2 / 12)
        if np.abs(means - before).max() < 1e-14:
            break
        foreground = expit(log_ratio(x, pi, means, variances))
    return brentq(log_ratio, means[0], means[1], args=(pi, means, variances), xtol=1e-14)


def log_ratio(x, pi, means, variances):
    """log(pi_fg N_fg(x)) - log(pi_bg N_bg(x))"""
    log = [np.log(pi[k]) - np.log(variances[k]) / 2 - (x - means[k]) ** 2 / variances[k] / 2 for k in (0, 1)]
    return log[1] - log[0]


def perplexity(nu, xi, alpha=0.8):
    distance = torch.where(nu >= xi, (nu - xi) / (1 - xi), (xi - nu) / xi)
    return -torch.log(alpha * distance.clamp(1e-4, 1))


def algorithm_1(online, batches, steps, warmup, lr, lr_warmup, momentum, scales, decay, queue):
    """Trains `online` in place; returns the assignment network and what each step saw: its losses and both xi."""
    assignment = copy.deepcopy(online).eval()
    heads = {id(p) for part in (online.classifier, online.aux_classifier, online.decoder) for p in part.parameters()}
    learned = [p for p in online.parameters() if p.requires_grad]
    moments = [(torch.zeros_like(p), torch.zeros_like(p), []) for p in learned]
    xi, seen, history = [0.5, 0.5], ([], []), []
    for step, (weak, strong, labels, valid) in enumerate(batches):  # 5-6
        size, grid = valid.shape[-2:], [side // 16 for side in valid.shape[-2:]]
        out = online(strong)  # 11
        losses = {}
        for name, z in (("cls", out.cls_logits), ("aux_cls", out.aux_cls_logits)):  # 12
            losses[name] = -(labels * torch.sigmoid(z).log() + (1 - labels) * torch.sigmoid(-z).log()).mean()
        total = losses["cls"] + losses["aux_cls"]

        if step >= warmup:
            tokens = torch.nn.functional.avg_pool2d(valid[:, None].double(), 16)[:, 0] >= 0.5
            with torch.no_grad():
                views = [resize(weak, [16 * round(side * scale) for side in grid]) for scale in scales]  # 7
                passes = [(assignment(view), assignment(view.flip(-1))) for view in views]  # 8

                def ensemble(name, passes=passes, grid=grid):
                    pairs = [(getattr(plain, name), getattr(mirror, name).flip(-1)) for plain, mirror in passes]
                    return torch.stack([resize(maps, grid) for pair in pairs for maps in pair])

                cams = []
                for name in ("cam_logits", "aux_cam_logits"):  # 9-10
                    maps = ensemble(name).max(dim=0).values.clamp(min=0)
                    for b, c in np.ndindex(labels.shape):
                        inside = maps[b, c][tokens[b]]
                        stretched = (maps[b, c] - inside.min()) / (inside.max() - inside.min())
                        maps[b, c] = stretched * tokens[b] * labels[b, c]
                    cams.append(maps)
                for k in (0, 1):  # 13
                    nu = cams[k].max(dim=1).values[tokens].numpy()
                    seen[k].append(np.histogram(nu[nu > 0.05], bins=512, range=(0.05, 1))[0])
                    xi[k] = decay * xi[k] + (1 - decay) * solve_equation_6(np.sum(seen[k][-queue:], axis=0))
                present = torch.cat([torch.ones_like(labels[:, :1]), labels], dim=1)[:, :, None, None]
                sharp = ensemble("logits").mean(dim=0) / 0.01
                spl = torch.where(present > 0, sharp, -torch.inf).softmax(dim=1)  # 18

            log_s = resize(out.logits, size).log_softmax(dim=1)
            for name, k in (("c2s", 0), ("aux_c2s", 1)):  # 14-17
                share = resize(tokens[:, None].double(), size)  # of a pixel's tokens that are valid
                known = valid & (share[:, 0] > 0)
                nu, winner = (resize(cams[k], size) / share.clamp(min=1e-300)).max(dim=1)
                cpl = torch.where(nu >= xi[k], winner + 1, 0)
                reliability = 1 / perplexity(nu, xi[k])[known]
                ce = -(one_hot(cpl, log_s.shape[1]).permute(0, 3, 1, 2) * log_s).sum(dim=1)[known]
                losses[name] = (reliability / reliability.mean() * ce).mean()
                total = total + 0.1 * losses[name]

            probability = out.cam_logits.sigmoid()  # 19
            bce = -(spl[:, 1:] * probability.log() + (1 - spl[:, 1:]) * (1 - probability).log())
            losses["s2c"] = bce.mean(dim=1)[tokens].mean()
            total = total + 0.05 * losses["s2c"]

            nu, winner = cams[1].max(dim=1)
            omega = (perplexity(nu, xi[1]) <= 1) & tokens
            cpl, anchors = torch.where(nu >= xi[1], winner + 1, 0), []
            for b in range(len(labels)):  # 20-21
                m, ids = out.cam_logits[b][:, omega[b]], cpl[b][omega[b]]
                m = m / m.norm(dim=0)
                for i in range(len(ids)):
                    s = m[:, i] @ m / 0.5
                    same = ids == ids[i]
                    positive, negative = same.clone(), ~same
                    positive[i] = False
                    if positive.any() and negative.any():
                        of_pairs, against = s[positive].exp(), s[negative].exp().sum()
                        anchors.append(-(of_pairs / (of_pairs + against)).log().mean())
            losses["csc"] = torch.stack(anchors).mean()
            total = total + 0.1 * losses["csc"]  # 22

        rate = lr * (step / lr_warmup if step < lr_warmup else (1 - (step - lr_warmup) / (steps - lr_warmup)) ** 0.9)
        gradients = torch.autograd.grad(total, learned, allow_unused=True)  # 23
        with torch.no_grad():
            for p, g, (m1, m2, rates) in zip(learned, gradients, moments, strict=True):  # 24: AdamW
                if g is None:  # the decoder, during warm-up
                    continue
                rates.append(rate * (10 if id(p) in heads else 1))
                m1.mul_(0.9).add_(0.1 * g)
                m2.mul_(0.999).add_(0.001 * g * g)
                p.sub_(rates[-1] * 0.01 * p)
                t = len(rates)
                p.sub_(rates[-1] * m1 / (1 - 0.9**t) / ((m2 / (1 - 0.999**t)).sqrt() + 1e-8))
            for theta, p in zip(assignment.parameters(), online.parameters(), strict=True):  # 25
                theta.copy_(momentum * theta + (1 - momentum) * p)
        values = {name: value.item() for name, value in losses.items()} | {"loss": total.item()}
        history.append(SimpleNamespace(losses=values, thresholds=tuple(xi)))
    return assignment, history

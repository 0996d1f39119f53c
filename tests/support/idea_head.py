"""A model as IDEA-Research's repositories have it, from the decoder's results to the boxes, and forks of it."""

import itertools

import torch
from torch import nn

from tests.support.models import perturb_

D, L, B, Q = 32, 3, 2, 5


def inverse_sigmoid(x, eps=1e-3):
    x = x.clamp(min=0, max=1)
    return torch.log(x.clamp(min=eps) / (1 - x).clamp(min=eps))


class MLP(nn.Module):
    def __init__(self, *widths):
        super().__init__()
        self.num_layers = len(widths) - 1
        self.layers = nn.ModuleList(nn.Linear(*pair) for pair in itertools.pairwise(widths))

    def forward(self, x):
        for i, layer in enumerate(self.layers):
            x = torch.relu(layer(x)) if i < self.num_layers - 1 else layer(x)
        return x


class Transformer(nn.Module):
    """Any hidden states and reference points that can be differentiated."""

    def __init__(self, query_dim, refined):
        super().__init__()
        self.hidden = nn.Parameter(torch.zeros(L, B, Q, D))
        self.reference = nn.Parameter(torch.zeros(L if refined else 1, B, Q, query_dim))

    def forward(self, x):
        return self.hidden * x, self.reference.sigmoid()


class Shared(nn.Module):
    def __init__(self, query_dim=4, each=False, refined=True):
        super().__init__()
        self.query_dim = query_dim
        self.transformer = Transformer(query_dim, refined)
        self.class_embed = nn.Linear(D, 6)
        self.bbox_embed = nn.ModuleList(MLP(D, D, D, 4) for _ in range(L)) if each else MLP(D, D, D, 4)
        perturb_(self)
        with torch.no_grad():
            self.transformer.reference[:, :, 0] = -9.0  # where the eps of the inverse sigmoid shows

    def forward(self, x):
        hs, reference = self.transformer(x)
        unsigmoided = inverse_sigmoid(reference)
        tmp = self.bbox_embed(hs)
        tmp[..., : self.query_dim] += unsigmoided
        boxes = tmp.sigmoid()
        return {"pred_logits": self.class_embed(hs)[-1], "pred_boxes": boxes[-1], "boxes": boxes}


class PerLayer(Shared):
    def __init__(self, **kwargs):
        super().__init__(each=True, **kwargs)

    def forward(self, x):
        hs, reference = self.transformer(x)
        unsigmoided = inverse_sigmoid(reference)
        boxes = []
        for layer in range(hs.shape[0]):
            tmp = self.bbox_embed[layer](hs[layer])
            tmp[..., : self.query_dim] += unsigmoided[layer]
            boxes.append(tmp.sigmoid())
        return {"pred_boxes": boxes[-1], "boxes": torch.stack(boxes)}


class Iterated(Shared):
    """Over the box MLPs themselves, and with Deformable DETR's question for the width."""

    def __init__(self, **kwargs):
        super().__init__(each=True, **kwargs)

    def forward(self, x):
        hs, reference = self.transformer(x)
        boxes = []
        for mlp, hidden, points in zip(self.bbox_embed, hs, reference, strict=True):
            unsigmoided = inverse_sigmoid(points)
            tmp = mlp(hidden)
            if unsigmoided.shape[-1] == 4:
                tmp += unsigmoided
            else:
                tmp[..., :2] += unsigmoided
            boxes.append(torch.sigmoid(tmp))
        return {"boxes": torch.stack(boxes)}


class OutOfPlace(Shared):
    def forward(self, x):
        hs, reference = self.transformer(x)
        return {"boxes": (inverse_sigmoid(reference) + self.bbox_embed(hs)).sigmoid()}


# From here on forwards that do something else with what is noted, so that it must be computed.


class Logged(Shared):
    """Also gives the deltas and the unsigmoided points, before and after their sum."""

    def forward(self, x):
        hs, reference = self.transformer(x)
        unsigmoided = inverse_sigmoid(reference)
        tmp = self.bbox_embed(hs)
        before = tmp.mean()
        tmp[..., : self.query_dim] += unsigmoided
        return {"boxes": tmp.sigmoid(), "before": before, "deltas": tmp, "points": [unsigmoided]}


class Scaled(Shared):
    def forward(self, x):
        hs, reference = self.transformer(x)
        tmp = self.bbox_embed(hs) * 0.5
        tmp[..., : self.query_dim] += inverse_sigmoid(reference)
        return {"boxes": tmp.sigmoid()}


class Twice(Shared):
    def forward(self, x):
        hs, reference = self.transformer(x)
        tmp = self.bbox_embed(hs)
        tmp += inverse_sigmoid(reference)
        tmp[..., : self.query_dim] += inverse_sigmoid(reference)
        return {"boxes": torch.nn.functional.sigmoid(tmp)}


class ThroughAView(Shared):
    """The addition in place reaches the deltas through a name of its own."""

    def forward(self, x):
        hs, reference = self.transformer(x)
        tmp = self.bbox_embed(hs)
        corner = tmp[..., : self.query_dim]
        corner += inverse_sigmoid(reference)
        return {"boxes": tmp.sigmoid(), "corner": corner}


class WithoutGradient(Shared):
    """Deltas of which nothing learns."""

    def forward(self, x):
        hs, reference = self.transformer(x)
        with torch.no_grad():
            tmp = self.bbox_embed(hs)
        return {"boxes": (tmp + inverse_sigmoid(reference)).sigmoid()}


class InFullPrecision(Shared):
    """Whatever autocast says."""

    def forward(self, x):
        hs, reference = self.transformer(x)
        with torch.autocast("cpu", enabled=False):
            tmp = self.bbox_embed(hs.float())
        unsigmoided = inverse_sigmoid(reference)
        return {"boxes": (tmp + unsigmoided).sigmoid(), "deltas": tmp}


class OtherEps(Shared):
    def forward(self, x):
        hs, reference = self.transformer(x)
        return {"boxes": (self.bbox_embed(hs) + inverse_sigmoid(reference, eps=1e-2)).sigmoid()}


class Changing(Shared):
    """What it cannot be served with, and cannot be computed any more."""

    def forward(self, x):
        hs, reference = self.transformer(x)
        tmp = self.bbox_embed(hs)
        tmp[..., : self.query_dim] += inverse_sigmoid(reference)
        hs.zero_()
        return {"boxes": tmp.sigmoid()}


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad


class ThroughAFunction(Shared):
    """Of which PyTorch does not tell."""

    def forward(self, x):
        hs, reference = self.transformer(x)
        return {"boxes": (Double.apply(self.bbox_embed(hs)) + inverse_sigmoid(reference)).sigmoid()}


NOTED = (Shared, PerLayer, Iterated, OutOfPlace, ThroughAView)
COMPUTED = (Logged, Scaled, Twice, WithoutGradient, InFullPrecision, OtherEps)

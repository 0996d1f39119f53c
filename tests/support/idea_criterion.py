"""The criterion and matcher of IDEA-Research's repositories, written again from what they compute.

Every layer on its own, with a one-hot target and full matrices of pairs, as theirs.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

GIOU_EPS = 1e-6


def corners(boxes: Tensor) -> Tensor:
    cx, cy, w, h = boxes.unbind(-1)
    return torch.stack((cx - 0.5 * w, cy - 0.5 * h, cx + 0.5 * w, cy + 0.5 * h), -1)


def area(boxes: Tensor) -> Tensor:
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


def generalized_box_iou(a: Tensor, b: Tensor) -> Tensor:
    assert (a[:, 2:] >= a[:, :2]).all()
    assert (b[:, 2:] >= b[:, :2]).all()
    sides = (torch.min(a[:, None, 2:], b[:, 2:]) - torch.max(a[:, None, :2], b[:, :2])).clamp(min=0)
    inner = sides[..., 0] * sides[..., 1]
    union = area(a)[:, None] + area(b) - inner
    sides = (torch.max(a[:, None, 2:], b[:, 2:]) - torch.min(a[:, None, :2], b[:, :2])).clamp(min=0)
    hull = sides[..., 0] * sides[..., 1]
    return inner / (union + GIOU_EPS) - (hull - union) / (hull + GIOU_EPS)


def sigmoid_focal_loss(logits: Tensor, targets: Tensor, num_boxes: float, alpha: float) -> Tensor:
    p = logits.sigmoid()
    entropy = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    of_target = p * targets + (1 - p) * (1 - targets)
    loss = entropy * (1 - of_target) ** 2
    if alpha >= 0:
        loss = (alpha * targets + (1 - alpha) * (1 - targets)) * loss
    return loss.mean(1).sum() / num_boxes


class HungarianMatcher(nn.Module):
    def __init__(self, cost_class=2.0, cost_bbox=5.0, cost_giou=2.0, focal_alpha=0.25):
        super().__init__()
        self.cost_class, self.cost_bbox, self.cost_giou = cost_class, cost_bbox, cost_giou
        self.focal_alpha = focal_alpha

    @torch.no_grad()
    def forward(self, outputs, targets):
        batch, queries = outputs["pred_logits"].shape[:2]
        p = outputs["pred_logits"].flatten(0, 1).sigmoid()
        boxes = outputs["pred_boxes"].flatten(0, 1)
        labels = torch.cat([target["labels"] for target in targets])
        given = torch.cat([target["boxes"] for target in targets])
        negative = (1 - self.focal_alpha) * p**2 * -(1 - p + 1e-8).log()
        positive = self.focal_alpha * (1 - p) ** 2 * -(p + 1e-8).log()
        cost = self.cost_bbox * torch.cdist(boxes, given, p=1)
        cost = cost + self.cost_class * (positive[:, labels] - negative[:, labels])
        cost = cost - self.cost_giou * generalized_box_iou(corners(boxes), corners(given))
        blocks = cost.view(batch, queries, -1).cpu().split([len(target["boxes"]) for target in targets], -1)
        found = [linear_sum_assignment(block[i]) for i, block in enumerate(blocks)]
        return [(torch.as_tensor(i), torch.as_tensor(j)) for i, j in found]


class SetCriterion(nn.Module):
    def __init__(self, num_classes=5, matcher=None, weight_dict=None, focal_alpha=0.25, losses=None):
        super().__init__()
        self.num_classes = num_classes
        self.matcher = matcher or HungarianMatcher()
        self.weight_dict = weight_dict or {"loss_ce": 1, "loss_bbox": 5, "loss_giou": 2}
        self.losses = losses or ["labels", "boxes", "cardinality"]
        self.focal_alpha = focal_alpha

    def chosen(self, indices):
        images = torch.cat([torch.full_like(queries, i) for i, (queries, _) in enumerate(indices)])
        return images, torch.cat([queries for queries, _ in indices])

    def loss_labels(self, outputs, targets, indices, num_boxes, log=True):
        logits = outputs["pred_logits"]
        chosen = self.chosen(indices)
        labels = torch.cat([target["labels"][j] for target, (_, j) in zip(targets, indices, strict=True)])
        classes = torch.full(logits.shape[:2], self.num_classes, device=logits.device)
        classes[chosen] = labels
        onehot = logits.new_zeros(*logits.shape[:2], logits.shape[2] + 1)
        onehot = onehot.scatter_(2, classes[..., None], 1)[..., :-1]
        loss = sigmoid_focal_loss(logits, onehot, num_boxes, self.focal_alpha) * logits.shape[1]
        losses = {"loss_ce": loss}
        if log:
            right = torch.zeros([]) if not len(labels) else (logits[chosen].topk(1)[1][:, 0] == labels).float().mean()
            losses["class_error"] = 100 - 100 * right
        return losses

    @torch.no_grad()
    def loss_cardinality(self, outputs, targets, indices, num_boxes):
        logits = outputs["pred_logits"]
        sizes = torch.as_tensor([len(target["labels"]) for target in targets], device=logits.device)
        predicted = (logits.argmax(-1) != logits.shape[-1] - 1).sum(1)
        return {"cardinality_error": F.l1_loss(predicted.float(), sizes.float())}

    def loss_boxes(self, outputs, targets, indices, num_boxes):
        boxes = outputs["pred_boxes"][self.chosen(indices)]
        given = torch.cat([target["boxes"][j] for target, (_, j) in zip(targets, indices, strict=True)])
        distance = F.l1_loss(boxes, given, reduction="none")
        overlap = 1 - generalized_box_iou(corners(boxes), corners(given)).diag()
        losses = {"loss_bbox": distance.sum() / num_boxes, "loss_giou": overlap.sum() / num_boxes}
        with torch.no_grad():
            losses["loss_xy"] = distance[:, :2].sum() / num_boxes
            losses["loss_hw"] = distance[:, 2:].sum() / num_boxes
        return losses

    def loss_masks(self, outputs, targets, indices, num_boxes):
        return {"loss_mask": outputs["pred_masks"][self.chosen(indices)].square().sum() / num_boxes}

    def get_loss(self, loss, outputs, targets, indices, num_boxes, **kwargs):
        losses = {
            "labels": self.loss_labels,
            "cardinality": self.loss_cardinality,
            "boxes": self.loss_boxes,
            "masks": self.loss_masks,
        }
        return losses[loss](outputs, targets, indices, num_boxes, **kwargs)

    def forward(self, outputs, targets, return_indices=False):
        indices = self.matcher({k: x for k, x in outputs.items() if k != "aux_outputs"}, targets)
        all_indices = [indices]
        count = torch.as_tensor([sum(len(target["labels"]) for target in targets)], dtype=torch.float)
        world = 1
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(count)
            world = dist.get_world_size()
        num_boxes = torch.clamp(count / world, min=1).item()
        losses: dict[str, Any] = {}
        for loss in self.losses:
            losses.update(self.get_loss(loss, outputs, targets, indices, num_boxes))
        for i, layer in enumerate(outputs.get("aux_outputs", ())):
            indices = self.matcher(layer, targets)
            all_indices.insert(-1, indices)
            for loss in self.losses:
                if loss != "masks":
                    kwargs = {"log": False} if loss == "labels" else {}
                    found = self.get_loss(loss, layer, targets, indices, num_boxes, **kwargs)
                    losses.update({f"{name}_{i}": x for name, x in found.items()})
        return (losses, all_indices) if return_indices else losses


class DenoisingCriterion(SetCriterion):
    """As DN-DETR's, which adds losses of its own from a third argument."""

    def forward(self, outputs, targets, mask_dict=None, return_indices=False):
        losses = super().forward(outputs, targets)
        logits, labels = mask_dict["known"]
        return losses | {"tgt_loss_ce": F.cross_entropy(logits, labels)}

"""The IDEA-Research conventions written a second time, as their authors would read them: one module per part,
query-first, one projection per layer and input, queries and keys concatenated, a full score matrix, -inf for hidden.

It shares nothing with dab_fast but the parameter names, and is the oracle of what Hugging Face does not have.
"""

import copy
import itertools
import math

import torch
from torch import nn


def logit_1e3(p):
    p = p.clamp(0.0, 1.0)
    return torch.log(torch.maximum(p, torch.tensor(1e-3, dtype=p.dtype))) - torch.log(
        torch.maximum(1 - p, torch.tensor(1e-3, dtype=p.dtype))
    )


def point_features(points, width):
    """`width` sines and cosines, in pairs, of each of y, x (, w, h)."""
    blocks = []
    for c in (1, 0, 2, 3)[: points.shape[-1]]:
        block = torch.zeros(*points.shape[:-1], width, dtype=points.dtype)
        for pair in range(width // 2):
            angle = points[..., c] * 2 * math.pi / 10000 ** (2 * pair / width)
            block[..., 2 * pair] = torch.sin(angle)
            block[..., 2 * pair + 1] = torch.cos(angle)
        blocks.append(block)
    return torch.cat(blocks, -1)


class ReluMLP(nn.Module):
    def __init__(self, *widths):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(a, b) for a, b in itertools.pairwise(widths)])

    def forward(self, x):
        *inner, last = self.layers
        for layer in inner:
            x = torch.clamp(layer(x), min=0)
        return last(x)


class Attention(nn.Module):
    """Takes projected q, k [N, B, E] and v [N, B, D]; owns only the output projection."""

    def __init__(self, embed_dim, value_dim, num_heads, dropout):
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        self.out_proj = nn.Linear(value_dim, value_dim)

    def forward(self, q, k, v, attn_mask=None, key_padding_mask=None):
        (nq, batch, _), nk = q.shape, k.shape[0]
        head_outputs = []
        for b in range(batch):
            for h in range(self.num_heads):
                qh, kh, vh = (t[:, b].chunk(self.num_heads, -1)[h] for t in (q, k, v))
                scores = qh @ kh.T / math.sqrt(qh.shape[-1])
                hidden = torch.zeros(nq, nk, dtype=torch.bool)
                if attn_mask is not None:
                    mask = attn_mask if attn_mask.dim() == 2 else attn_mask[b * self.num_heads + h]
                    if mask.dtype == torch.bool:
                        hidden = hidden | mask
                    else:
                        scores = scores + mask
                if key_padding_mask is not None:
                    hidden = hidden | key_padding_mask[b][None, :]
                weights = torch.softmax(scores.masked_fill(hidden, -math.inf), -1)
                head_outputs.append(nn.functional.dropout(weights, self.dropout, self.training) @ vh)
        merged = torch.stack(head_outputs).unflatten(0, (batch, self.num_heads))  # [B, H, Q, d]
        return self.out_proj(merged.permute(2, 0, 1, 3).flatten(2))


class TransformerDecoderLayer(nn.Module):
    def __init__(self, d_model, nhead, dim_feedforward, dropout, activation, keep_query_pos=False):
        super().__init__()
        self.nhead, self.keep_query_pos = nhead, keep_query_pos
        for name in ("qcontent", "qpos", "kcontent", "kpos", "v"):
            setattr(self, f"sa_{name}_proj", nn.Linear(d_model, d_model))
        for name in ("qcontent", "qpos", "kcontent", "kpos", "v", "qpos_sine"):
            setattr(self, f"ca_{name}_proj", nn.Linear(d_model, d_model))
        self.self_attn = Attention(d_model, d_model, nhead, dropout)
        self.cross_attn = Attention(2 * d_model, d_model, nhead, dropout)
        self.linear1, self.linear2 = nn.Linear(d_model, dim_feedforward), nn.Linear(dim_feedforward, d_model)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(d_model) for _ in range(3))
        self.dropout, self.dropout1, self.dropout2, self.dropout3 = (nn.Dropout(dropout) for _ in range(4))
        self.activation = nn.PReLU() if activation == "prelu" else getattr(nn.functional, activation)

    def forward(self, x, memory, pos, query_pos, query_sine, first, tgt_mask, memory_mask, tgt_padding, memory_padding):
        attended = self.self_attn(
            self.sa_qcontent_proj(x) + self.sa_qpos_proj(query_pos),
            self.sa_kcontent_proj(x) + self.sa_kpos_proj(query_pos),
            self.sa_v_proj(x),
            tgt_mask,
            tgt_padding,
        )
        x = self.norm1(x + self.dropout1(attended))

        q, k, k_pos = self.ca_qcontent_proj(x), self.ca_kcontent_proj(memory), self.ca_kpos_proj(pos)
        if first or self.keep_query_pos:
            q = q + self.ca_qpos_proj(query_pos)
            k = k + k_pos
        attended = self.cross_attn(
            self.side_by_side(q, self.ca_qpos_sine_proj(query_sine)),
            self.side_by_side(k, k_pos),
            self.ca_v_proj(memory),
            memory_mask,
            memory_padding,
        )
        x = self.norm2(x + self.dropout2(attended))
        return self.norm3(x + self.dropout3(self.linear2(self.dropout(self.activation(self.linear1(x))))))

    def side_by_side(self, content, position):
        """Head by head: the content's features, then the position's."""
        pairs = zip(content.chunk(self.nhead, -1), position.chunk(self.nhead, -1), strict=True)
        return torch.cat([half for pair in pairs for half in pair], -1)


class TransformerDecoder(nn.Module):
    def __init__(
        self,
        layer,
        num_layers,
        d_model,
        query_dim,
        keep_query_pos=False,
        query_scale_type="cond_elewise",
        modulate_hw_attn=True,
        bbox_embed_diff_each_layer=False,
    ):
        super().__init__()
        self.layers = nn.ModuleList([copy.deepcopy(layer) for _ in range(num_layers)])
        self.norm = nn.LayerNorm(d_model)
        self.d_model, self.query_dim, self.num_layers = d_model, query_dim, num_layers
        self.query_scale_type, self.modulate_hw_attn = query_scale_type, modulate_hw_attn
        self.bbox_embed_diff_each_layer = bbox_embed_diff_each_layer
        if query_scale_type == "fix_elewise":
            self.query_scale = nn.Embedding(num_layers, d_model)
        else:
            self.query_scale = ReluMLP(d_model, d_model, {"cond_elewise": d_model, "cond_scalar": 1}[query_scale_type])
        self.ref_point_head = ReluMLP(query_dim * d_model // 2, d_model, d_model)
        if modulate_hw_attn:
            self.ref_anchor_head = ReluMLP(d_model, d_model, 2)
        self.bbox_embed = None
        if not keep_query_pos:
            for layer in list(self.layers)[1:]:
                layer.ca_qpos_proj = None

    def forward(
        self,
        tgt,
        memory,
        tgt_mask=None,
        memory_mask=None,
        tgt_key_padding_mask=None,
        memory_key_padding_mask=None,
        pos=None,
        refpoints_unsigmoid=None,
    ):
        x, half = tgt, self.d_model // 2
        boxes = torch.sigmoid(refpoints_unsigmoid)
        all_boxes, all_states = [boxes], []
        for number, layer in enumerate(self.layers):
            features = point_features(boxes, half)
            query_pos = self.ref_point_head(features)
            y_part, x_part = features[..., :half], features[..., half : 2 * half]
            if self.query_scale_type == "fix_elewise":
                scale = self.query_scale.weight[number]
            elif number > 0:
                scale = self.query_scale(x)
            else:
                scale = torch.ones(1)
            if self.modulate_hw_attn:
                width, height = torch.sigmoid(self.ref_anchor_head(x)).unbind(-1)
                x_part = x_part * (width / boxes[..., 2])[..., None]
                y_part = y_part * (height / boxes[..., 3])[..., None]
            sine = torch.cat([y_part, x_part], -1) * scale
            x = layer(
                x,
                memory,
                pos,
                query_pos,
                sine,
                number == 0,
                tgt_mask,
                memory_mask,
                tgt_key_padding_mask,
                memory_key_padding_mask,
            )
            all_states.append(self.norm(x))
            if self.bbox_embed is not None:
                mlp = self.bbox_embed[number] if self.bbox_embed_diff_each_layer else self.bbox_embed
                boxes = torch.sigmoid(mlp(x)[..., : self.query_dim] + logit_1e3(boxes))
                all_boxes.append(boxes)
                boxes = boxes.detach()
        if self.bbox_embed is not None:
            all_boxes.pop()
        return [torch.stack(all_states).transpose(1, 2), torch.stack(all_boxes).transpose(1, 2)]

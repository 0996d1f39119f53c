"""The rest of an IDEA-Research model, written a second time around the decoder: the oracle of checkpoint conversion."""

import torch
from torch import nn

from tests.support import idea_second_writing as second
from tests.support.idea_encoder import TransformerEncoder, TransformerEncoderLayer


class Bottleneck(nn.Module):
    def __init__(self, given, wide, stride):
        super().__init__()
        narrow = wide // 4
        self.conv1 = nn.Conv2d(given, narrow, 1, bias=False)
        self.conv2 = nn.Conv2d(narrow, narrow, 3, stride, 1, bias=False)
        self.conv3 = nn.Conv2d(narrow, wide, 1, bias=False)
        self.bn1, self.bn2, self.bn3 = nn.BatchNorm2d(narrow), nn.BatchNorm2d(narrow), nn.BatchNorm2d(wide)
        if stride != 1 or given != wide:
            self.downsample = nn.Sequential(nn.Conv2d(given, wide, 1, stride, bias=False), nn.BatchNorm2d(wide))

    def forward(self, x):
        short = self.downsample(x) if hasattr(self, "downsample") else x
        x = torch.relu(self.bn1(self.conv1(x)))
        x = torch.relu(self.bn2(self.conv2(x)))
        return torch.relu(self.bn3(self.conv3(x)) + short)


class ResNet(nn.Module):
    def __init__(self, stem=8, widths=(8, 8, 16, 16)):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, stem, 7, 2, 3, bias=False), nn.BatchNorm2d(stem)
        for stage, (given, wide) in enumerate(zip((stem, *widths), widths, strict=False)):
            self.add_module(f"layer{stage + 1}", nn.Sequential(Bottleneck(given, wide, 1 if stage == 0 else 2)))

    def forward(self, x):
        x = nn.functional.max_pool2d(torch.relu(self.bn1(self.conv1(x))), 3, 2, 1)
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))


class Model(nn.Module):
    """`label_classes`: DN-DETR's label embedding makes the content. Else `patterns` do, or it is zero."""

    def __init__(self, d=64, heads=4, width=96, queries=17, labels=5, patterns=0, label_classes=0):
        super().__init__()
        self.backbone = nn.ModuleList([nn.Module()])
        self.backbone[0].body = ResNet()
        self.input_proj = nn.Conv2d(16, d, 1)
        self.transformer = nn.Module()
        self.transformer.encoder = TransformerEncoder(TransformerEncoderLayer(d, heads, width), 1, d_model=d)
        self.transformer.decoder = second.TransformerDecoder(
            second.TransformerDecoderLayer(d, heads, width, 0.0, "prelu"), 3, d, 4
        )
        if patterns:
            self.transformer.patterns = nn.Embedding(patterns, d)
        if label_classes:
            self.label_enc = nn.Embedding(label_classes + 1, d - 1)
        self.refpoint_embed = nn.Embedding(queries, 4)
        self.class_embed = nn.Linear(d, labels)
        self.bbox_embed = self.transformer.decoder.bbox_embed = second.ReluMLP(d, d, d, 4)

    def forward(self, pixels, pos):
        """Logits and boxes of the last layer; `pos` [S, B, D] is the sine embedding of the feature map's cells."""
        memory = self.input_proj(self.backbone[0].body(pixels)).flatten(2).permute(2, 0, 1)
        memory = self.transformer.encoder(memory, pos=pos)
        batch, (queries, _) = memory.shape[1], self.refpoint_embed.weight.shape
        contents = torch.zeros(1, memory.shape[-1])
        if hasattr(self.transformer, "patterns"):
            contents = contents + self.transformer.patterns.weight
        if hasattr(self, "label_enc"):
            contents = contents + torch.cat([self.label_enc.weight[-1], torch.zeros(1)])
        content = torch.cat([row.expand(queries, batch, -1) for row in contents])
        anchors = self.refpoint_embed.weight[:, None].expand(-1, batch, -1).repeat(len(contents), 1, 1)
        states, references = self.transformer.decoder(content, memory, pos=pos, refpoints_unsigmoid=anchors)
        boxes = torch.sigmoid(self.bbox_embed(states) + second.logit_1e3(references))
        return self.class_embed(states)[-1], boxes[-1]

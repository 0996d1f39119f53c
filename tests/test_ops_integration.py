"""The ops among PyTorch's own machinery: opcheck, torch.compile, export, autocast, checkpointing, torch.func."""

import torch

from dab_fast import ops


def embed_inputs(queries=5, feats=8):
    return (
        torch.rand(2, queries, 4) * 0.9 + 0.05,
        torch.randn(2, queries, 2 * feats),
        torch.randn(2, queries, 2),
    )


def test_opcheck_box_position_embed():
    boxes, scale, logits = embed_inputs()
    for permuted in (boxes, boxes.transpose(0, 1).contiguous().transpose(0, 1)):
        args = (permuted, scale, logits, 8, 1e4, "yxwh", torch.float32, True, "triton")
        torch.library.opcheck(torch.ops.dab_fast.box_position_embed.default, args)
    sine, query = ops.box_position_embed(boxes, scale, logits, num_feats=8)
    args = (sine, query, boxes, scale, logits, 8, 1e4, "yxwh", True, True, True, "triton")
    torch.library.opcheck(torch.ops.dab_fast.box_position_embed_backward.default, args)
    args = (None, query, boxes, scale[0, 0], None, 8, 1e4, "yxwh", False, True, False, "triton")
    torch.library.opcheck(torch.ops.dab_fast.box_position_embed_backward.default, args)


def grads(function, inputs):
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    outputs = function(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    sum((x * torch.linspace(-1, 1, x.numel()).view_as(x)).sum() for x in outputs).backward()
    return [*outputs, *(x.grad for x in inputs)]


def embed(boxes, scale, logits):
    return ops.box_position_embed(boxes, scale, logits, num_feats=8)


def test_compile_full_graph_and_dynamic():
    compiled = torch.compile(embed, fullgraph=True, dynamic=True, backend="aot_eager")
    with ops.backend("triton"):
        for queries in (5, 9):
            inputs = embed_inputs(queries)
            torch.testing.assert_close(grads(compiled, inputs), grads(embed, inputs), rtol=0, atol=0)

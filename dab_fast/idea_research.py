"""The import that replaces two classes of IDEA-Research/DAB-DETR: see `TransformerDecoder`."""

from dab_fast.adapters.idea_research.dropin import TransformerDecoder, TransformerDecoderLayer

__all__ = ["TransformerDecoder", "TransformerDecoderLayer"]

"""Text towers by family."""

from tempme_vl.text.bert import BertFusion, BertShape, BertTextEncoder, VideoKeys, bert_from_umt, bert_to_umt
from tempme_vl.text.clip import ClipTextEncoder

__all__ = [
    "BertFusion",
    "BertShape",
    "BertTextEncoder",
    "ClipTextEncoder",
    "VideoKeys",
    "bert_from_umt",
    "bert_to_umt",
]

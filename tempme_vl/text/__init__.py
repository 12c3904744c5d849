"""Text towers of this package; those that other libraries build stand in `clip` and `hf`."""

from tempme_vl.text.base import TextEncoder
from tempme_vl.text.bert import BertFusion, BertShape, BertTextEncoder, VideoKeys, bert_from_umt, bert_to_umt
from tempme_vl.text.blip import BlipShape, BlipTextEncoder, blip_vocabulary
from tempme_vl.text.decoder import BertDecoder, QuestionKeys, decoder_to_umt, load_umt_decoder

__all__ = [
    "BertDecoder",
    "BertFusion",
    "BertShape",
    "BertTextEncoder",
    "BlipShape",
    "BlipTextEncoder",
    "QuestionKeys",
    "TextEncoder",
    "VideoKeys",
    "bert_from_umt",
    "bert_to_umt",
    "blip_vocabulary",
    "decoder_to_umt",
    "load_umt_decoder",
]

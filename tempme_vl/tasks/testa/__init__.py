"""TESTA's models (EMNLP Findings 2023): retrieval, pre-training with captions, and captions themselves.

Its question answering is a head of `tempme_vl.tasks.qa`.
"""

from tempme_vl.tasks.testa.captioning import TestaCaptioner
from tempme_vl.tasks.testa.create import create_testa_pretraining_model, create_testa_retrieval_model
from tempme_vl.tasks.testa.pretraining import TestaPretrainingModel
from tempme_vl.tasks.testa.retrieval import TestaRetrievalModel

__all__ = [
    "TestaCaptioner",
    "TestaPretrainingModel",
    "TestaRetrievalModel",
    "create_testa_pretraining_model",
    "create_testa_retrieval_model",
]

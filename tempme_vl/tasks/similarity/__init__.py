"""How videos and texts are compared in retrieval. A new way is a file with a `SimilarityHead`, and a line in
`tempme_vl.registries`; see docs/add_a_head.md."""

from tempme_vl.tasks.similarity.base import PairContext, SimilarityHead, token_embeddings

__all__ = ["PairContext", "SimilarityHead", "token_embeddings"]

"""A text and segments as a model's fusion layers judge them: UMT's and TESTA's score of whether both match (VTM).

Letters: V segments of M merged tokens, D their width in the tower, L words, E embedding width.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from tempme_vl.tasks.retrieval import MatchingRetrievalModel

AT_ONCE = 8  # segments, each with keys and values of its own (43 MB of UMT-B without merging)


@torch.inference_mode()
def text_parts(model: MatchingRetrievalModel, ids: Tensor, mask: Tensor, device: torch.device) -> dict[str, Tensor]:
    """What the model has of one text, ids and mask (L,): "text" (1, E) and its `fine_text_parts`."""
    batch = {"text_ids": ids[None].to(device), "text_mask": mask[None].to(device)}
    return {**batch, **model(batch)}


@torch.inference_mode()
def match_scores(
    model: MatchingRetrievalModel, text: tuple[Tensor, Tensor], tokens: Sequence[np.ndarray], coarse: np.ndarray
) -> np.ndarray:
    """(V,): the logits of a match, to which TESTA adds the cosines, as `tempme_vl.evaluation.rerank.rerank` has them.

    Args:
        text: the two `fine_text_parts` of one text, on the model's device.
        tokens: V times (M, D), what the tower gave behind its norm.
        coarse: (V,), the cosines of the first stage.
    """
    states, mask = text
    logits = []
    for first in range(0, len(tokens), AT_ONCE):
        own = torch.from_numpy(np.stack(tokens[first : first + AT_ONCE])).to(states.device)
        keys = model.keys_values(own)
        pairs = states.expand(len(own), *states.shape[1:]), mask.expand(len(own), -1)
        logits.append(model.match_logits(*pairs, keys).float().cpu().numpy())
    return np.concatenate(logits) + (coarse if model.adds_similarity else 0.0)

"""Where in a hit the query was found: the merged tokens that are nearest to it, their frames and patches.

Letters: T tokens that are named, F frames, G patches a side, L parts of the query, M merged tokens, E their width.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tempme_vl.search.embed import Layout


@dataclass(frozen=True)
class Location:
    """The merged tokens of a segment that are nearest to a query, the nearest first.

    Attributes:
        tokens: (T,) int64, their numbers among the segment's.
        scores: (T,) float32, by which they are ranked (`token_scores`).
        times: (F,) float32, seconds after the file's first frame, of the frames that were looked at.
        frames: (T, F) bool, of which frames each token holds something.
        patches: (T, F, G, G) bool, which patches it holds, row by row; one at least.
        resize: "shortest": the patches cover a frame's central square; "squash": all of it.
    """

    tokens: np.ndarray
    scores: np.ndarray
    times: np.ndarray
    frames: np.ndarray
    patches: np.ndarray
    resize: str

    def heat(self) -> np.ndarray:
        """(F, G, G) float32: of each patch the score of the best of these tokens that holds it; 0 where none does."""
        scored = np.where(self.patches, self.scores[:, None, None, None], -np.inf).max(axis=0, initial=-np.inf)
        return np.where(np.isfinite(scored), scored, 0.0).astype(np.float32)


def max_sim_of(parts: np.ndarray, tokens: np.ndarray) -> float:
    """The mean over a query's parts (L, E) of each one's highest cosine with a token (M, E)."""
    return float((parts @ tokens.T).max(axis=1).mean())


def token_scores(parts: np.ndarray, tokens: np.ndarray, attention: np.ndarray | None) -> np.ndarray:
    """(M,): the highest cosine of each token (M, E) with a query's parts (L, E), times its attention (M,).

    A head that compares CLS tokens has trained no other token to be near texts, and in CLIP the cosines of patches are
    high where nothing is (CLIP Surgery, Li et al. 2023). What such a head compares is a sum over tokens, to each
    its attention times what it says (Gandelsman et al., ICLR 2024): so the cosine counts by the attention.

    Args:
        attention: None where the parts are compared with the tokens themselves.
    """
    cosines = (parts @ tokens.T).max(axis=0)
    # one below zero stays: by its attention a token that is looked at would fall behind one that nobody looks at
    return cosines if attention is None else np.where(cosines > 0, cosines * attention, cosines)


def locate(scores: np.ndarray, source: np.ndarray, times: np.ndarray, layout: Layout, top: int) -> Location:
    """The tokens of the highest scores (M,), of those that hold a patch.

    Args:
        source: (F, N0), which token holds each input token.
        top: T, or as many as there are.
    """
    held = source[:, layout.prefix :]
    nearest = np.argsort(-scores, kind="stable")
    best = nearest[np.isin(nearest, held)][:top]
    frames = (source[None] == best[:, None, None]).any(axis=2)
    patches = (held[None] == best[:, None, None]).reshape(len(best), layout.frames, layout.grid, layout.grid)
    return Location(best, scores[best].astype(np.float32), times, frames, patches, layout.resize)

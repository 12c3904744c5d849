"""A data set through a model: what is kept, where, and that ranks make one whole."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import Dataset
from training.processes import run

from tempme_vl.evaluation import encode as encode_module
from tempme_vl.evaluation.encode import Rows, encode_all, encode_own
from tempme_vl.evaluation.retrieval import Embeddings, embed

CPU = torch.device("cpu")


class Numbers(Dataset):
    def __init__(self, count: int):
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"x": torch.tensor([float(index), 1.0]), "valid": int(index != 1), "video": torch.full((3,), index)}


def model(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    assert "valid" not in batch
    wide = torch.arange(1000.0).expand(len(batch["x"]), 1000) + batch["x"][:, :1]
    return {"video": wide[:, :2], "tokens": wide.view(-1, 500, 2), "half": batch["x"].bfloat16()}


@pytest.mark.parametrize("batch_size", [1, 3, 7, 50])
def test_rows_are_in_order_and_nothing_else_is_kept(batch_size: int) -> None:
    kept = encode_all(model, Numbers(7), CPU, ("video", "valid", "half", "x"), batch_size, workers=0)
    assert set(kept) == {"video", "valid", "half", "x"}
    assert kept["video"].tolist() == [[i, i + 1] for i in range(7)]  # the model's, not the item's
    assert kept["valid"].tolist() == [1, 0, 1, 1, 1, 1, 1]
    assert kept["half"].dtype == torch.bfloat16 and kept["x"][:, 0].tolist() == list(range(7))
    for rows in kept.values():  # a view would hold all that the model computed
        assert rows.untyped_storage().nbytes() == rows.nbytes and not rows.requires_grad


def test_short_shards_repeat_their_last_item() -> None:
    own = encode_own(model, Numbers(7), CPU, ("x",), [[5, 2, 3]], batch_size=2, workers=0)
    assert own["x"][:, 0].tolist() == [5, 2, 3]


def test_rows_of_a_tensor() -> None:
    whole = torch.arange(20).view(10, 2)
    rows = Rows(whole[4:7], first=4, total=10)
    assert len(rows) == 10 and rows.shape == (10, 2)
    assert torch.equal(rows[4:7], whole[4:7]) and torch.equal(rows[5:6], whole[5:6])
    for there in (slice(3, 5), slice(6, 8), slice(0, 10)):
        with pytest.raises(IndexError, match=r"not here, but 4 to 7"):
            rows[there]


class Videos(Numbers):
    pass


class Captions(Dataset):
    def __len__(self) -> int:
        return 9

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"text_ids": torch.tensor([index]), "text_mask": torch.ones(1, dtype=torch.int64)}


def both(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    if "text_ids" in batch:
        words = batch["text_ids"].float().expand(-1, 3)
        return {"text": words, "states": words[:, None]}
    return model(batch)


class Second:
    fine_video_parts, fine_text_parts = ("tokens",), ("states", "text_mask")


def embedded(videos: int, second: Second | None = None) -> Embeddings:
    owners = [min(i, videos - 1) for i in range(9)]
    return embed(both, Videos(videos), Captions(), owners, CPU, 2, workers=0, second=second)


def embedded_by_rank(videos: int, gathered_bytes: int) -> tuple[Embeddings, list[int]]:
    dist.init_process_group("gloo")
    encode_module.GATHERED_BYTES = gathered_bytes
    made = embedded(videos, Second())
    dist.destroy_process_group()
    tokens = made.fine_video["tokens"]
    return made, [tokens.first, len(tokens.own)]


@pytest.mark.parametrize(("videos", "places"), [(7, [[0, 4], [4, 3]]), (1, [[0, 1], [1, 0]])])
def test_two_ranks_hold_what_one_does_and_tokens_once(videos: int, places: list[list[int]]) -> None:
    alone = embedded(videos, Second())
    ranks = run(embedded_by_rank, videos, 24, world=2)
    assert [place for _, place in ranks] == places
    for made, _ in ranks:
        for name in ("video", "text", "video_of_caption", "valid"):
            assert torch.equal(getattr(made, name), getattr(alone, name)), name
        for name in ("states", "text_mask"):
            assert torch.equal(made.fine_text[name], alone.fine_text[name]), name
        tokens, whole = made.fine_video["tokens"], alone.fine_video["tokens"]
        assert tokens.shape == whole.shape
        assert torch.equal(tokens.own, whole[tokens.first : tokens.first + len(tokens.own)])


def test_tokens_are_kept_only_for_re_ranking() -> None:
    made = embedded(7)
    assert not made.fine_video and not made.fine_text

"""Captions to ids and masks."""

from __future__ import annotations

import pytest
import torch

from tempme_vl.text.tokenizers import CLIPTokenizer

START, END = 49406, 49407


def test_start_words_end_padding() -> None:
    ids, mask = CLIPTokenizer(8)("a red square")
    assert ids.dtype == mask.dtype == torch.int64
    assert ids.shape == mask.shape == (8,)
    assert mask.tolist() == [1, 1, 1, 1, 1, 0, 0, 0]
    assert (ids[0], ids[4]) == (START, END)
    assert ids[5:].tolist() == [0, 0, 0]


@pytest.mark.parametrize("words", [6, 7, 30])
def test_what_is_too_long_is_cut_and_keeps_its_end_token(words: int) -> None:
    ids, mask = CLIPTokenizer(8)(" ".join(["word"] * words))
    assert mask.tolist() == [1] * 8
    assert (ids[0], ids[-1]) == (START, END)
    assert len(set(ids[1:-1].tolist())) == 1


def test_a_word_with_the_number_of_padding_is_a_word() -> None:
    ids, mask = CLIPTokenizer(8)("stop !~ now")
    assert ids[2] == 0
    assert mask.tolist() == [1, 1, 1, 1, 1, 1, 0, 0]
    assert ids[5] == END


def test_an_empty_caption_is_start_and_end() -> None:
    assert CLIPTokenizer(4)("")[1].tolist() == [1, 1, 0, 0]


def test_max_words_counts_start_and_end() -> None:
    with pytest.raises(ValueError, match="at least 2; got 1"):
        CLIPTokenizer(1)

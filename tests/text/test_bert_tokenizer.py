"""Texts to word pieces: UMT's cleaning and its missing [SEP], cutting, padding, and where vocabularies come from."""

from __future__ import annotations

import pickle
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from transformers import BertTokenizer

from tempme_vl.text.tokenizers import SPECIAL_TOKENS, WordPieceTokenizer, bert_vocabulary, clean_text, word_vocabulary

VOCAB = (*SPECIAL_TOKENS, "a", "dog", "##s", "run", "##ning", "t", "shirt", "person", "cafe", "\u2028", "[", "]", "pad")


def pieces(text: str, **settings: int) -> list[str]:
    ids, mask = WordPieceTokenizer(VOCAB, **settings)(text)
    assert not ids[~mask.bool()].any()
    return [VOCAB[i] for i in ids[mask.bool()]]


def test_start_pieces_padding_and_no_end() -> None:
    ids, mask = WordPieceTokenizer(VOCAB, max_words=8)("A dog running")
    assert ids.dtype == mask.dtype == torch.int64
    assert ids.tolist() == [2, 5, 6, 8, 9, 0, 0, 0]
    assert mask.tolist() == [1, 1, 1, 1, 1, 0, 0, 0]


def test_an_answer_has_its_end() -> None:
    assert pieces("dogs", max_words=5, end=True) == ["[CLS]", "dog", "##s", "[SEP]"]
    assert pieces("", max_words=5, end=True) == ["[CLS]", "[SEP]"]
    assert pieces("", max_words=5) == ["[CLS]"]


@pytest.mark.parametrize("words", [4, 5, 30])
def test_what_is_too_long_is_cut_at_the_end(words: int) -> None:
    text = " ".join(["dog"] * words)
    assert pieces(text, max_words=5) == ["[CLS]"] + ["dog"] * 4
    assert pieces(text, max_words=5, end=True) == ["[CLS]"] + ["dog"] * 4, "the [SEP] is cut like a piece"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A dog, running!", "a dog running"),
        ("what's a T-shirt / dog?", "whats a t shirt dog"),
        ("  <person>\truns \n", "person runs"),
        ('(a) *dog* #1: "yes"; ~no.', "a dog 1 yes no"),
        ("a_b & c", "a_b & c"),
        ("...", ""),
    ],
)
def test_cleaning(text: str, expected: str) -> None:
    assert clean_text(text) == expected
    assert clean_text(expected) == expected


def test_texts_are_cleaned_before_they_are_split() -> None:
    assert pieces("Dog's") == ["[CLS]", "dog", "##s"]
    assert pieces("T-Shirt") == ["[CLS]", "t", "shirt"]
    assert pieces("<person>") == ["[CLS]", "person"]


def test_special_tokens_cannot_be_written() -> None:
    assert pieces("[PAD] dog") == ["[CLS]", "[", "pad", "]", "dog"]


@pytest.mark.parametrize("text", ["a dog running", "Café dogs xyz", "dogs [a] & run", "", "T SHIRT runs"])
def test_equals_transformers_without_its_end(text: str, tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("".join(f"{piece}\n" for piece in VOCAB))
    theirs = BertTokenizer.from_pretrained(str(tmp_path))(clean_text(text))["input_ids"]
    ids, mask = WordPieceTokenizer(VOCAB)(text)
    assert ids[mask.bool()].tolist() == theirs[:-1]
    assert VOCAB[theirs[-1]] == "[SEP]"


def test_every_word_of_the_texts_is_known() -> None:
    texts = ["A red square moves left.", "two squares; one Café", "left-right [sic]", "a_b c&d"]
    vocab = word_vocabulary(texts)
    assert vocab[:5] == ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
    assert list(vocab[5:]) == sorted(set(vocab[5:]))
    assert {"cafe", "left", "right", "[", "square", "squares"} <= set(vocab)
    assert word_vocabulary(reversed(texts)) == vocab
    tokenizer = WordPieceTokenizer(vocab)
    for text in texts:
        assert 1 not in tokenizer(text)[0].tolist()
    assert tokenizer("unheard of")[0][:4].tolist() == [2, 1, 1, 0]


@pytest.mark.parametrize("question", [False, True])
def test_a_small_vocabulary_of_blip_knows_all_that_it_was_made_of(question: bool) -> None:
    texts = ("Two women's teams, in a close-up.", "Who's that (on the left)?", "a.b: it is 5 o'clock!")
    vocab = word_vocabulary(texts, blip=True)
    tokenize = WordPieceTokenizer(vocab, max_words=16, end=True, blip=True, question=question)
    for text in texts:
        ids, mask = tokenize(text)
        assert vocab.index("[UNK]") not in ids[mask.bool()].tolist()
    assert word_vocabulary(["a dog runs"], blip=True) == word_vocabulary(["a dog runs"])


def test_a_vocabulary_of_a_folder(tmp_path: Path) -> None:
    path = tmp_path / "vocab.txt"
    for text in ("\n".join(VOCAB) + "\n", "\n".join(VOCAB), "\r\n".join(VOCAB) + "\r\n"):
        path.write_bytes(text.encode())
        assert bert_vocabulary(tmp_path) == bert_vocabulary(str(tmp_path)) == VOCAB


def test_a_vocabulary_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "vocab.txt").write_text("\n".join(VOCAB))
    asked = []

    def download(repo: str, file: str) -> str:
        asked.append((repo, file))
        return str(tmp_path / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub, "get_session", lambda: SimpleNamespace(head=lambda url, timeout: None))
    assert bert_vocabulary("bert-base-uncased") == VOCAB
    assert asked == [("bert-base-uncased", "vocab.txt")]


def test_no_vocabulary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").touch()
    with pytest.raises(ValueError, match=r"expected vocab.txt in .*; found \['config.json'\]"):
        bert_vocabulary(tmp_path)
    with pytest.raises(ValueError, match=r"expected a folder with vocab.txt, or a model .*; got 'no/such/folder/here'"):
        bert_vocabulary("no/such/folder/here")

    def unreachable(*_: str) -> str:
        raise LocalEntryNotFoundError("no such file")

    monkeypatch.setattr(huggingface_hub, "get_session", lambda: SimpleNamespace(head=lambda url, timeout: None))
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", unreachable)
    with pytest.raises(ValueError, match="got 'bert-base-uncased': no such file"):
        bert_vocabulary("bert-base-uncased")


@pytest.mark.parametrize(
    ("vocab", "message"),
    [
        (VOCAB[1:], r"missing \['\[PAD\]'\]"),
        ((*VOCAB, "dog"), "19 pieces, 18 distinct"),
        (VOCAB[::-1], r"\[PAD\] first .* first \('pad',\)"),
        ((), "got 0 pieces"),
    ],
)
def test_a_vocabulary_that_cannot_be_used(vocab: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WordPieceTokenizer(vocab)


def test_max_words_counts_the_start() -> None:
    with pytest.raises(ValueError, match="at least 2; got 1"):
        WordPieceTokenizer(VOCAB, max_words=1)


def test_workers_get_an_equal_tokenizer() -> None:
    tokenizer = WordPieceTokenizer(VOCAB, max_words=6, end=True)
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy == tokenizer
    assert torch.equal(copy("a dog runs")[0], tokenizer("a dog runs")[0])

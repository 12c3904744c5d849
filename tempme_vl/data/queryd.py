"""QuerYD (Oncescu et al., ICASSP 2021): videos and what volunteers say of them for blind people, as TESTA reads it."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import NoReturn

from tempme_vl.data.dataset import DataSet, Place, Texts
from tempme_vl.data.files import AnnotationError, as_file_id, as_texts, check_regular, errors_at, read_lines
from tempme_vl.data.splits import RetrievalSplit, find_annotations, make_split, video_stem
from tempme_vl.messages import few, shown

CAPTIONS = "raw_captions_combined_filtered.pkl"
LISTS = "exists_{split}_list.txt"


def read_split(place: Place, split: str) -> RetrievalSplit:
    """Reads exists_{train,val,test}_list.txt, a name of a video a line, and raw_captions_combined_filtered.pkl,
    `{name: [[word, ...], ...]}`.

    The caption of a video is all its words in order, joined by blanks. Neither file was at hand when this was written.
    """
    captions_path, list_path = find_annotations(place.root, [CAPTIONS, LISTS.format(split=split)])
    said = _captions(captions_path)
    captions: dict[str, list[str]] = {}
    for where, line in read_lines(list_path):
        with errors_at(where):
            video_id = as_file_id(video_stem(line.strip()))
            if video_id in captions:
                raise ValueError(f"{video_id} again")
            if video_id not in said:
                raise ValueError(f"{video_id} has no captions in {captions_path}")
            captions[video_id] = [said[video_id]]
    return make_split(f"queryd/{split}", list_path, captions, place)


def _captions(path: Path) -> dict[str, str]:
    """The paragraph of each video."""
    entries = load_plain(path)
    if not isinstance(entries, dict):
        raise AnnotationError(f"{path}: expected {{name: [[word, ...], ...]}}; got {shown(entries)}")
    said: dict[str, str] = {}
    for name, sentences in entries.items():
        with errors_at(f"{path}, entry {shown(name)}"):
            video_id = as_file_id(video_stem(name) if isinstance(name, str) else name)
            if video_id in said:
                raise ValueError(f"{video_id} again")
            said[video_id] = _paragraph(sentences)
    return said


def _paragraph(sentences: object) -> str:
    if not isinstance(sentences, list) or not sentences:
        raise ValueError(f"expected a list of sentences, each a list of words; got {shown(sentences)}")
    return " ".join(word.strip() for words in sentences for word in as_texts("a sentence", words))


def load_plain(path: Path) -> object:
    """What a pickled file holds: numbers, texts, lists, dictionaries.

    A pickle can name functions to call, and so run any program; here it can name nothing.

    Raises:
        AnnotationError: no regular file, no pickle, or one with objects of other kinds.
    """
    check_regular(path)
    try:
        with path.open("rb") as file:
            loaded: object = _Plain(file).load()
            if file.read(1):
                raise pickle.UnpicklingError("something stands behind its end")
            return loaded
    # what a damaged pickle raises is not limited to errors of pickle's own
    except Exception as error:
        raise AnnotationError(
            f"{path}: expected a pickle of texts, lists and dictionaries: {shown(str(error) or type(error).__name__)}"
        ) from error


class _Plain(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> NoReturn:
        raise pickle.UnpicklingError(f"it asks for {few([f'{module}.{name}'])}")


DATASET = DataSet(
    title="QuerYD (Oncescu et al., ICASSP 2021), paragraphs",
    files=f"{LISTS.format(split='{train,val,test}')} and {CAPTIONS}",
    captions=Texts(read_split),
    max_words=128,
    num_frames=32,
)

"""LSMDC (Rohrbach et al., 2015): segments of movies with one sentence each. The data are given out under a licence."""

from __future__ import annotations

from tempme_vl.data.dataset import DataSet, Place, Texts
from tempme_vl.data.files import AnnotationError, as_file_id, as_text, errors_at, read_lines
from tempme_vl.data.splits import RetrievalSplit, find_annotations, make_split
from tempme_vl.messages import shown

FILES = {
    "train": "LSMDC16_annos_training.csv",
    "val": "LSMDC16_annos_val.csv",
    "test": "LSMDC16_challenge_1000_publictect.csv",
}


def read_split(place: Place, split: str) -> RetrievalSplit:
    """Reads the split's file: tab-separated, without quoting: video, four times, sentence. 32 words, 12 frames.

    Only three lines of the test file were at hand when this was written; a line of another form is an AnnotationError
    that names it. Several sentences of one video become its captions.
    """
    (path,) = find_annotations(place.root, [FILES[split]], ("lsmdc_data",))
    captions: dict[str, list[str]] = {}
    for where, line in read_lines(path):
        fields = line.split("\t")
        if len(fields) != 6 or not fields[0].strip() or not fields[5].strip():
            raise AnnotationError(f"{where}: expected video, 4 times and a sentence between tabs; got {shown(line)}")
        with errors_at(where):
            captions.setdefault(as_file_id(fields[0].strip()), []).append(as_text("sentence", fields[5]))
    return make_split(f"lsmdc/{split}", path, captions, place, ("LSMDC_Videos", "avi"))


DATASET = DataSet(
    title="LSMDC (Rohrbach et al., 2015), given out under a licence",
    files=", ".join(FILES.values()),
    captions=Texts(read_split),
)

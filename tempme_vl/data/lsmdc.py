"""LSMDC (Rohrbach et al., 2015): segments of movies with one sentence each. The data are given out under a licence."""

from __future__ import annotations

from pathlib import Path

from tempme_vl.data.files import AnnotationError, as_file_id, as_text, errors_at, read_lines
from tempme_vl.data.splits import RetrievalSplit, find_annotations, known_split, make_split
from tempme_vl.messages import shown

FILES = {
    "train": "LSMDC16_annos_training.csv",
    "val": "LSMDC16_annos_val.csv",
    "test": "LSMDC16_challenge_1000_publictect.csv",
}


def read_split(root: str | Path, split: str, video_root: str | Path | None = None) -> RetrievalSplit:
    """Reads the split's file: tab-separated, without quoting: video, four times, sentence. 32 words, 12 frames.

    Only three lines of the test file were at hand when this was written; a line of another form is an AnnotationError
    that names it. Several sentences of one video become its captions.
    """
    split = known_split("lsmdc", split, FILES)
    (path,) = find_annotations(root, [FILES[split]], ("lsmdc_data",))
    captions: dict[str, list[str]] = {}
    for place, line in read_lines(path):
        fields = line.split("\t")
        if len(fields) != 6 or not fields[0].strip() or not fields[5].strip():
            raise AnnotationError(f"{place}: expected video, 4 times and a sentence between tabs; got {shown(line)}")
        with errors_at(place):
            captions.setdefault(as_file_id(fields[0].strip()), []).append(as_text("sentence", fields[5]))
    return make_split(f"lsmdc/{split}", path, captions, root, video_root, ("LSMDC_Videos", "avi"))

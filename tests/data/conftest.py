"""The tests on real files are collected only where their folders are named in the environment."""

import os

collect_ignore = []
if "TEMPME_ANNOTATIONS" not in os.environ:
    collect_ignore.append("test_real_annotations.py")
if not {"TEMPME_VIDEOS", "TEMPME_VIDEOS_ODD"} <= set(os.environ):
    collect_ignore.append("test_real_videos.py")

"""Files that runs write, by name."""

BROKEN_VIDEOS = "broken_videos.jsonl"
MISSING_VIDEOS = "missing_videos.txt"

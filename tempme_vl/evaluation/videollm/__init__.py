"""A compressed video-language model evaluated on questions, and compression methods compared on one model."""

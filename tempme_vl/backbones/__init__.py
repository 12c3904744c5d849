"""Encoders of other libraries taken apart, and UMT's; `tempme_vl.families` gives them names."""

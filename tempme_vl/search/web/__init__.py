"""A server of an index: a REST interface and a page. It needs FastAPI: pip install 'tempme_vl[search]'."""

"""A model as a file that other runtimes run: ONNX or OpenVINO (`tempme-vl export`, docs/export.md)."""

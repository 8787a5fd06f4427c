"""Models out: the Hub and its cards, ONNX, the layout of the authors' code."""

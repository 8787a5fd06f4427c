"""What leaves the package: pseudo-labels, published models, ONNX."""

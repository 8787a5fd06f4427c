"""Pseudo-labels as files: written by a trained model, read by whatever learns from them."""

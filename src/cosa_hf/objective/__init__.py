"""The paper's equations: pure functions of tensors, without a model, data or input/output."""

"""The stages of the method, one a file; pure functions of tensors wherever they can be."""

"""Constraints, and the cost of a model by how many heads and neurons each block keeps."""

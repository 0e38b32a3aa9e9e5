"""Tensors as bytes: their memory, the file of ``torch.save`` around it, and the ranges of a stored chunk."""

"""Which bytes are a tensor's, in memory and in a data blob?

Others use `memory` (a tensor as bytes, of its own memory where possible), `copies` (between tensors), `torch_file` (the
file of ``torch.save`` around these bytes), `chunks` (rectangular parts of tensors), `regions` (which ranges of a stored
chunk hold a part of it) and `overlaps` (tensors that share memory).
"""

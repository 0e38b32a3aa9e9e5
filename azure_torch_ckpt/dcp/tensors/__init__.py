"""Which bytes are a tensor's, in memory and in a data blob?

Others use `memory` (a tensor's memory as bytes), `copies` (between tensors), `views` (any tensor as bytes to send),
`torch_file` (the file of ``torch.save`` around these bytes), `chunks` and `coverage` (rectangular parts of tensors),
`regions` (which ranges of a stored chunk hold a part of it) and `overlaps` (tensors that share memory).
"""

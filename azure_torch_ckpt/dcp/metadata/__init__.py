"""A checkpoint's ``.metadata``: written as a pickle that torch reads, read without running anything that it names."""

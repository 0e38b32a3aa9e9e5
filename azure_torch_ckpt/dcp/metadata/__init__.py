"""What is in ``.metadata``, and how is it read without trusting it?

It is written as a pickle that torch reads, and read without running anything that it names. Others use `schema` alone.
"""

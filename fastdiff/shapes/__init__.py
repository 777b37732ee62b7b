"""A tiny SDXL that draws coloured shapes: the trained checkpoint, and the grammar of its captions.

May import no other room. What trained and judges it stands apart, in `training`.
"""

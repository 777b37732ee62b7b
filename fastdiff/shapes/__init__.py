"""A tiny SDXL that draws coloured shapes: its grammar, renderer, oracle, training and the trained checkpoint.

Submodules are imported on demand: `captions` and `render` need only numpy and Pillow, `oracle` needs
scikit-image (the `test` extra), `architecture`, `train` and `evaluate` need torch and diffusers.
"""

"""How the embedded checkpoint was made and is judged: renderer, oracle, training stages, evaluation.

May import `shapes`, and for evaluating the pipelines. `oracle` needs scikit-image (the `test` extra).
"""

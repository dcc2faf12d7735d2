"""One module per place that weights come from; ``vlbench.models.load`` chooses among them.

Each exports ``load(ref, *, weights=None, seed=0) -> TorchBackbone``: ``ref`` is what follows the prefix of ``--model``,
``weights`` is None (the named pretrained weights), ``"random"`` (a fresh initialisation with ``seed``) or a file.
"""

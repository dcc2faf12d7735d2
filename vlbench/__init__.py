"""vlbench: pretrain visual backbones under different recipes and measure what each is worth.

Importing this package loads no torch; every heavy import happens inside the function that needs it.
"""

__version__ = "0.1.0"

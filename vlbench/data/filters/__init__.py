"""ALIGN's filters of noisy image-text pairs over webdataset shards: exact, restartable, in bounded memory.

``settings`` has the rules; ``scan`` reads a shard once; ``tables`` counts over all shards on the disk; ``verdict``
decides and copies; ``run`` puts the steps in order.
"""

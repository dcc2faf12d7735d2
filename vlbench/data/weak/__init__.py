"""mu-VLA's weakly aligned corpus: sentences that were never paired with an image, found by the image's object tags.

Source tags: [M:file] zmykevin/UVLP, the released code; [H:file] its history before 35ab995, where the scripts of the
retrieval are.
"""

"""mu-VLA's weakly aligned corpus: sentences without their images, found by the tags of an image's objects.

Source tags: [M:file] zmykevin/UVLP, the released code; [H:file] its history before 35ab995, where the scripts of the
retrieval are.
"""

"""Region features: what a detector says of an image, from the files of the field or from torchvision's detectors.

Source tags: [M:file] zmykevin/UVLP, mu-VLA's released code.
"""

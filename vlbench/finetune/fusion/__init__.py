"""Questions about images, answered by one small transformer over words and what a backbone says of the image.

Source tags: [M:file] zmykevin/UVLP at 254e4e5, mu-VLA's released code; [M@9a8ef56:file] its commit of 2022-04-08, which
still holds the configurations that were run.
"""

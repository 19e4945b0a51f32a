"""Code that builder, index and deploy share, such as errors, output, files and settings. It has no work of one program."""

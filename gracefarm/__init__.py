"""Code that builder, index and deploy share, such as errors, output, files and settings. It belongs to no single program."""

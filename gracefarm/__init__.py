"""Code that builder, index and deploy share: errors, console, files, settings, tables, pins. It has no work of one program."""

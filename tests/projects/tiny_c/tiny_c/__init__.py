from tiny_c._core import add as add

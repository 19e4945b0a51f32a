"""Code that runs on a node. It is sent over SSH as one archive, run by the node's `python3`, and leaves no files.

It uses only the standard library and Python 3.10, since a new node may have nothing else (Ubuntu 22.04). The exceptions are
functions that are run by the Python of an environment; their docstrings say so. Each public function of a module takes one
JSON object and returns one; `deploy.fleet.calls` calls them by name.
"""

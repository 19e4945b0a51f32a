"""What runs on a node: shipped there over SSH as one archive, run by the node's own `python3`, gone when it ends.

Standard library alone and nothing newer than Python 3.10, for a fresh node has no more than that (Ubuntu 22.04). The one
exception is a function that says which environment's Python runs it. Each public function of a module here takes one JSON
object and returns one; `deploy.fleet.calls` calls them by name.
"""

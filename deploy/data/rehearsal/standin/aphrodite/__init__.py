"""A simulation of aphrodite-engine 0.6.4.post1 for gracefarm's rehearsal, without GPU and computations.

It has the same options, joins a Ray cluster in the same way, refuses the same input, reads the same files, and fails and hangs
in the same ways as the engine. It shares no code with it.
"""

__version__ = "0.6.4.post1"
ABOUT = f"STAND-IN for aphrodite-engine {__version__}, made by gracefarm's rehearsal: no GPU, no mathematics"

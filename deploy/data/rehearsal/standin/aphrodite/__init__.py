"""A stand-in for aphrodite-engine 0.6.4.post1, made by gracefarm's rehearsal: everything but the GPU and the mathematics.

It takes the same options, joins the same Ray cluster in the same way, refuses what the engine refuses, reads the same files,
and dies, lies and hangs as the engine does. It shares no code with it.
"""

__version__ = "0.6.4.post1"
ABOUT = f"STAND-IN for aphrodite-engine {__version__}, made by gracefarm's rehearsal: no GPU, no mathematics"

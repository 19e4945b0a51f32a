"""The rehearsal: nodes on this machine. Everything is real except the GPUs and the engine's computations."""

"""The rehearsal: nodes of this one machine, with everything but the GPUs and the engine's mathematics real."""

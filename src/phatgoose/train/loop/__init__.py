"""The loop of all phases: optimiser, checkpoints, data, random generators, devices."""

"""The benchmark: `load` measures a server from outside, `step` the engine from inside, `run` does both."""

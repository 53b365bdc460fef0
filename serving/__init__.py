"""The models of this process: prompts in, answers out, as the wire's objects."""

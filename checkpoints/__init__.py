"""The files of a model: a name or path in, a local directory that can be loaded out."""

"""Calls of tools as models write them; each form is a class, with its prompt, its grammar and its parser."""

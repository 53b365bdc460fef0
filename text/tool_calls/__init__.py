"""Calls of tools as models write them; each form is one file with its prompt, its grammar and its parser."""

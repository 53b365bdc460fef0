"""Between text and tokens: messages, tools, structures, and the parsing of what a model writes."""

"""The recipes' options and their defaults: plain data, read from a command line without importing torch."""

"""The command lines of the tools: each module has a `main` that parses, calls the library and reports."""

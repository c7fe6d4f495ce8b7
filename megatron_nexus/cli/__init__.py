"""The command line: `main` has the table of verbs, each of which is a module with a function `run(argv)`."""

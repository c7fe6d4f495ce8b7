.PHONY: check format

check:  ## formatting, lint, types and tests, in .venv
	bash tests/run

format:  ## put the code into the form that check asks for
	.venv/bin/ruff format .
	.venv/bin/ruff check --fix .

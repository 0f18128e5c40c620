"""Prints docs/transformers.md for the installed transformers."""

import sys

from . import coverage

if __name__ == "__main__":
    sys.stdout.write(coverage.page(coverage.entries(), coverage.norm_entries()))

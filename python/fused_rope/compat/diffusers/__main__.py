"""Prints docs/diffusers.md for the installed diffusers."""

import sys

from . import coverage

if __name__ == "__main__":
    sys.stdout.write(coverage.page(coverage.entries()))

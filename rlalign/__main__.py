"""`python -m rlalign`: the command line."""

from rlalign.cli import main

main()

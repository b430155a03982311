"""`python -m taxiway` is the command line."""

from taxiway.cli import main

if __name__ == "__main__":
    main(prog_name="taxiway")

"""`python -m kaleidoscope` is the `kaleidoscope` command."""

from kaleidoscope.cli import main

if __name__ == "__main__":
    main()

"""`python -m mechattr`: the command line."""

from mechattr.cli import main

if __name__ == "__main__":
    main()

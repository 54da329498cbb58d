"""`python -m lib` is `itl`."""

from lib.cli import main

if __name__ == "__main__":
    main()

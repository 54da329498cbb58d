"""`python -m lib` is `itl`."""

from lib.cli.app import main

if __name__ == "__main__":
    main()

"""`python -m eclosion` is `eclosion`."""

from eclosion.cli import main

if __name__ == "__main__":
    main()

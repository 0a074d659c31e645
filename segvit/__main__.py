"""`python -m segvit` is `segvit`."""

from segvit.cli import main

if __name__ == "__main__":
    main()

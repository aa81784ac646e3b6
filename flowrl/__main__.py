"""`python -m flowrl ...`, for torchrun."""

from flowrl.cli import main

if __name__ == "__main__":
    main()

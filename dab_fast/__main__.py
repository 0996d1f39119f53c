"""python -m dab_fast: the command `dab-fast`."""

from dab_fast.cli.main import main

if __name__ == "__main__":
    main()

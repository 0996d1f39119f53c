"""The command `dab-fast`; `main.py` reads its arguments."""

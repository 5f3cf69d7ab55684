"""`python -m dualforce`: the command `dualforce`."""

from __future__ import annotations

from dualforce.cli import main

if __name__ == "__main__":
    main()
